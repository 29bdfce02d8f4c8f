"""Bi-level Mean Field: Dynamic Grouping for Large-Scale MARL, arXiv:2505.06706."""
