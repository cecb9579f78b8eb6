"""The memory-perturbation equation: what removing examples would change, read from a posterior."""

from vlearn.linearized.numbering import IndexedDataset, UnrepeatedDistributedSampler
from vlearn.sensitivity import measures
from vlearn.sensitivity.check_removals import RemovalCheck, check_removals
from vlearn.sensitivity.influence import Influence, influence
from vlearn.sensitivity.leave_group_out import GroupTable, leave_group_out
from vlearn.sensitivity.live import Sensitivities
from vlearn.sensitivity.sweep import sweep
from vlearn.sensitivity.table import SensitivityTable

__all__ = [
    "GroupTable",
    "IndexedDataset",
    "Influence",
    "RemovalCheck",
    "Sensitivities",
    "SensitivityTable",
    "UnrepeatedDistributedSampler",
    "check_removals",
    "influence",
    "leave_group_out",
    "measures",
    "sweep",
]
