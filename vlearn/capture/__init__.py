"""Per-example gradients from one forward and one backward pass. Needs torch alone."""
