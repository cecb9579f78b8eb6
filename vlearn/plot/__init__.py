"""One figure per file: a record or plain arrays in, matplotlib Axes out."""

from vlearn.plot.generalization import generalization
from vlearn.plot.memory_map import memory_map
from vlearn.plot.removals import removals
from vlearn.plot.thumbnails import thumbnails

__all__ = ["generalization", "memory_map", "removals", "thumbnails"]
