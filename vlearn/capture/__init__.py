"""Recording one forward and backward pass of a model, layer by layer; and how to give a layer type a rule."""

from vlearn.layers import (
    Bias,
    Elementwise,
    Indexed,
    Outer,
    Rule,
    bias_form,
    channels_first,
    features_last,
    from_channels_first,
    register,
)

__all__ = [
    "Indexed",
    "Outer",
    "Rule",
    "Elementwise",
    "Bias",
    "channels_first",
    "features_last",
    "from_channels_first",
    "register",
    "bias_form",
]
