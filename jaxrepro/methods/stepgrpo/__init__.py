"""StepGRPO: step-wise group relative policy optimisation (R1-VL), arXiv:2503.12937."""
