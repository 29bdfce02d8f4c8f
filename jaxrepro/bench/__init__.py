"""Benchmarks with peers in the same run: `python -m jaxrepro.bench NAME [--shape=...] [--json]`.

A benchmark is a module of this package with

    SHAPES = {"tiny": {...}, ...}             sizes by name; the first is the default
    def bench(shape: Mapping, rounds: int) -> harness.Report

and is found by its name. What it imports must run where only jax, flax, optax, numpy and transformers
are installed.
"""
