"""Gaussian posteriors over a model's parameters: mean, covariance, draws, divergence."""

from vlearn.posterior.diagonal import Diagonal
from vlearn.posterior.from_laplace import from_laplace
from vlearn.posterior.from_optimizer import from_optimizer
from vlearn.posterior.full import Full
from vlearn.posterior.kronecker import Kronecker, KroneckerFactors
from vlearn.posterior.predict import predict
from vlearn.posterior.product import ProductPosterior

__all__ = [
    "Diagonal",
    "Full",
    "Kronecker",
    "KroneckerFactors",
    "ProductPosterior",
    "from_laplace",
    "from_optimizer",
    "predict",
]
