"""Posteriors fitted to a trained network: Laplace approximations by this library's own captures."""
