"""Per-example gradients from one forward and one backward pass. Needs torch alone."""

from vlearn.capture import convolutions, layers
from vlearn.capture.forms import Indexed, Outer, Scale, Shift
from vlearn.capture.rules import Rule, channels_first, features_last, from_channels_first, register, shift

__all__ = [
    "Indexed",
    "Outer",
    "Rule",
    "Scale",
    "Shift",
    "channels_first",
    "convolutions",
    "features_last",
    "from_channels_first",
    "layers",
    "register",
    "shift",
]
