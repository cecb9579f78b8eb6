"""The tables of the READMEs, written from `results/`: `python -m benchmarks.tables`."""
