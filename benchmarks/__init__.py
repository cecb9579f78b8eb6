"""Benchmarks: one script per claim; each prints its table and writes numbers and pictures to `results/`."""
