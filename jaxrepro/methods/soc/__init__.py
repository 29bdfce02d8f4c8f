"""Supervised Optimism Correction, arXiv:2504.07527."""
