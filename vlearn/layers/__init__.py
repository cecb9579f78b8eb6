"""Layer rules: the per-example gradients of each layer type, as algebra. Needs torch alone."""

from vlearn.layers import convolution, linear_and_norm
from vlearn.layers.gradient_forms import Bias, Elementwise, Indexed, Outer
from vlearn.layers.registry import Rule, bias_form, channels_first, features_last, from_channels_first, register

__all__ = [
    "Indexed",
    "Outer",
    "Rule",
    "Elementwise",
    "Bias",
    "channels_first",
    "convolution",
    "features_last",
    "from_channels_first",
    "linear_and_norm",
    "register",
    "bias_form",
]
