"""Sensitivities of every example over training, kept on disk; needs numpy only."""

from vlearn.record.memory_map import MemoryMap

__all__ = ["MemoryMap"]
