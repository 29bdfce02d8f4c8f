"""Reinforcement learning for language models, as pure functions."""
