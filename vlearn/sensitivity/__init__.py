"""The memory-perturbation equation: what removing examples would change, read from a posterior."""

from vlearn.sensitivity.batches import IndexedDataset
from vlearn.sensitivity.live import Sensitivities
from vlearn.sensitivity.sweep import SensitivityTable, sweep

__all__ = ["IndexedDataset", "Sensitivities", "SensitivityTable", "sweep"]
