"""What is learned: data sets, networks, and the batches that sweeps read."""
