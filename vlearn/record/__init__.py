"""What is known of every example over training, kept on disk; needs numpy only."""

from vlearn.record.memory_map import MemoryMap
from vlearn.record.training_record import TrainingRecord

__all__ = ["MemoryMap", "TrainingRecord"]
