"""The benchmark of data attribution against retraining: `python -m benchmarks.attribution`."""
