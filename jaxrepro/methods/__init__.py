"""One package a paper."""
