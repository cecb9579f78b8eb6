"""Gaussians over named parameters, by the structure of their covariance: products, draws, divergence."""

from vlearn.gaussians.diagonal import Diagonal
from vlearn.gaussians.full import Full
from vlearn.gaussians.kronecker import Kronecker, KroneckerFactors
from vlearn.gaussians.product import ProductPosterior

__all__ = ["Diagonal", "Full", "Kronecker", "KroneckerFactors", "ProductPosterior"]
