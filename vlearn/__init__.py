"""vlearn: variational optimizers for PyTorch, and each training example's sensitivity read from their state."""

from vlearn import audit, conjugate, integrations, optim, plot, posterior, sensitivity
from vlearn.audit import Recorder, label_issues
from vlearn.optim import EVON, IVON, KFACVON, VOGN, VON, FullVON, VAdamW
from vlearn.posterior import predict
from vlearn.record import MemoryMap, TrainingRecord
from vlearn.report_page import report
from vlearn.sensitivity import (
    IndexedDataset,
    UnrepeatedDistributedSampler,
    check_removals,
    influence,
    leave_group_out,
    sweep,
)

__version__ = "0.1.0"
__all__ = [
    "EVON",
    "IVON",
    "KFACVON",
    "VOGN",
    "VON",
    "FullVON",
    "IndexedDataset",
    "MemoryMap",
    "Recorder",
    "TrainingRecord",
    "UnrepeatedDistributedSampler",
    "VAdamW",
    "audit",
    "check_removals",
    "conjugate",
    "influence",
    "integrations",
    "label_issues",
    "leave_group_out",
    "optim",
    "plot",
    "posterior",
    "predict",
    "report",
    "sensitivity",
    "sweep",
]
