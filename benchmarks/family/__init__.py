"""The benchmark of the optimizers side by side: `python -m benchmarks.family`."""
