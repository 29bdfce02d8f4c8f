"""VORTA: Efficient Video Diffusion via Routing Sparse Attention, arXiv:2505.18809."""
