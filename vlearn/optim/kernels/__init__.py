"""Elementwise work on tensors: compiled kernels, random numbers, the search for non-finite gradients."""
