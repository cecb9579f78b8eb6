"""Tables and numbers of the README and the manual, written from `results/`: `python -m benchmarks.tables`."""
