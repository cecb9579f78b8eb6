"""Gaussian posteriors over a model's parameters: mean, covariance, draws, divergence."""

from vlearn.posterior.diagonal import Diagonal
from vlearn.posterior.from_laplace import from_laplace
from vlearn.posterior.from_optimizer import from_optimizer
from vlearn.posterior.full import Full
from vlearn.posterior.kronecker import Factors, Kronecker
from vlearn.posterior.mixed import Mixed
from vlearn.posterior.predict import predict

__all__ = ["Diagonal", "Factors", "Full", "Kronecker", "Mixed", "from_laplace", "from_optimizer", "predict"]
