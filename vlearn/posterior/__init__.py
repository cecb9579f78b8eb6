"""Posteriors over a model's parameters: fitted, read from other libraries or from disk; and what they predict."""

from vlearn.gaussians.diagonal import Diagonal
from vlearn.gaussians.full import Full
from vlearn.gaussians.kronecker import Kronecker, KroneckerFactors
from vlearn.gaussians.merge import merge
from vlearn.gaussians.product import ProductPosterior
from vlearn.posterior.fit import fit
from vlearn.posterior.from_laplace import from_laplace
from vlearn.posterior.from_optimizer import from_optimizer
from vlearn.posterior.measured_scale import MeasuredScale, measured_scale
from vlearn.posterior.predict import predict
from vlearn.posterior.storage import load
from vlearn.posterior.training_time import training_time

__all__ = [
    "Diagonal",
    "Full",
    "Kronecker",
    "KroneckerFactors",
    "MeasuredScale",
    "ProductPosterior",
    "fit",
    "from_laplace",
    "from_optimizer",
    "load",
    "measured_scale",
    "merge",
    "predict",
    "training_time",
]
