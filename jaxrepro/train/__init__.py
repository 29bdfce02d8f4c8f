"""The training substrate: state, step, loop, checkpoints, metrics."""
