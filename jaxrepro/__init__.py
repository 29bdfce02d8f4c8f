"""Ten recent papers, reimplemented JAX-first."""

__version__ = "0.1.0"
