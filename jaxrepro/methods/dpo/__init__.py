"""Direct preference optimisation and its variants, after the survey arXiv:2503.11701."""
