"""Draws of the weights: where they and the mean are, and what is summed up over the draws of a step."""
