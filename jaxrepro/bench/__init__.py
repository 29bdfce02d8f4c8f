"""Benchmarks with peers in the same run: `python -m jaxrepro.bench NAME`."""
