"""Training loops with their checkpoints, and what is asked of a trained network."""
