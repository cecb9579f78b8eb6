"""Small networks in float64, each with a batch: every way in which a layer can be used."""

from tests.oracles.networks import blocks, layers, linear, shared, structure, units, whole
from tests.oracles.networks.case import CASES, Case, Model

__all__ = ["CASES", "Case", "Model", "blocks", "layers", "linear", "shared", "structure", "units", "whole"]
