"""Rules of linear layers, embeddings and normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlearn.layers.gradient_forms import Elementwise, Indexed, Outer
from vlearn.layers.registry import Rule, bias_form, channels_first, features_last, from_channels_first, register

register(
    nn.Linear,
    Rule(
        forms={
            "weight": lambda module, x, b: Outer(features_last(module, x), b, module.weight.shape),
            "bias": bias_form,
        },
        linear=lambda module, x: F.linear(x, module.weight),
    ),
)
register(nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Linear)
register("torch_geometric.nn.dense.linear.Linear", nn.Linear)

# Hugging Face's linear layer of GPT-2 holds its weight as [I, O].
register(
    "transformers.pytorch_utils.Conv1D",
    Rule(
        forms={
            "weight": lambda module, x, b: Outer(features_last(module, x), b, module.weight.shape, transposed=True),
            "bias": bias_form,
        },
        linear=lambda module, x: x @ module.weight,
    ),
)


def _embedding_refuses(module: nn.Embedding) -> str | None:
    if module.max_norm is not None:
        return (
            f"max_norm={module.max_norm} makes its forward pass overwrite rows of its own weight, so that their "
            "gradient is not that of what was looked up: use max_norm=None, and clip the rows after the step."
        )
    if module.scale_grad_by_freq:
        return (
            "scale_grad_by_freq=True divides an example's gradient by how often the whole batch has its tokens, so no "
            "example has a gradient of its own: use scale_grad_by_freq=False."
        )
    return None


def _embedding_weight(module: nn.Embedding, x: Tensor, b: Tensor) -> Indexed:
    padding = module.padding_idx
    if padding is not None:  # one that was set later may count from the end
        padding %= len(module.weight)
    return Indexed(x.flatten(1) if x.dim() > 1 else x.unsqueeze(1), b, module.weight.shape, padding)


def _one_embedding_a_row(module: nn.Embedding, tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), 1, math.prod(tensor.shape[1:-1]), tensor.shape[-1])


register(
    nn.Embedding,
    Rule(
        forms={"weight": _embedding_weight},
        rows=_one_embedding_a_row,
        accepts=lambda module, x: x.dim() >= 1,
        refuses=_embedding_refuses,
    ),
)


def _normalised_features(normalise: Callable[[Any, Tensor], Tensor]) -> Rule:
    """Rule of a layer that normalises over the last axes, with a gain for each of their entries."""

    def rows(module: Any, tensor: Tensor) -> Tensor:
        axes = len(module.normalized_shape)
        return tensor.reshape(
            len(tensor), 1, math.prod(tensor.shape[1 : tensor.dim() - axes]), math.prod(tensor.shape[-axes:])
        )

    return Rule(
        forms={
            "weight": lambda module, x, b: Elementwise(rows(module, normalise(module, x)), b, module.weight.shape),
            "bias": bias_form,
        },
        rows=rows,
        accepts=lambda module, x: x.dim() > len(module.normalized_shape),
    )


def _normalised_channels(
    normalise: Callable[[Any, Tensor], Tensor], accepts: Callable[[Any, Tensor], bool], **more: Any
) -> Rule:
    """Rule of a layer with a gain for each channel, axis 1."""
    return Rule(
        forms={
            "weight": lambda module, x, b: Elementwise(
                channels_first(module, normalise(module, x)), b, module.weight.shape
            ),
            "bias": bias_form,
        },
        rows=channels_first,
        from_rows=from_channels_first,
        accepts=accepts,
        **more,
    )


register(nn.LayerNorm, _normalised_features(lambda m, x: F.layer_norm(x, m.normalized_shape, None, None, m.eps)))
register(nn.RMSNorm, _normalised_features(lambda m, x: F.rms_norm(x, m.normalized_shape, None, m.eps)))
register(
    nn.GroupNorm,
    _normalised_channels(
        lambda m, x: F.group_norm(x, m.num_groups, None, None, m.eps), accepts=lambda module, x: x.dim() >= 2
    ),
)

# The same by Hugging Face, who have a class of it for each model.
for _name in ("llama.modeling_llama.Llama", "mistral.modeling_mistral.Mistral", "qwen2.modeling_qwen2.Qwen2"):
    register(
        f"transformers.models.{_name}RMSNorm",
        Rule(
            forms={
                "weight": lambda module, x, b: Elementwise(
                    features_last(module, F.rms_norm(x, x.shape[-1:], None, module.variance_epsilon)),
                    b,
                    module.weight.shape,
                )
            }
        ),
    )


class BatchStatistics(NamedTuple):
    """What a batch normalisation subtracts and divides by, by channel ``[C]``.

    Attributes:
        mean: μ.
        variance: σ², the mean square.
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, x: Tensor) -> BatchStatistics:
        """Those of a batch ``[N, C, ...]``."""
        variance, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
        return cls(mean, variance)

    def put_into(self, module: nn.Module) -> None:
        """Let a module in eval mode normalise by them."""
        module._buffers["running_mean"], module._buffers["running_var"] = self


def batch_norm_rule(statistics: Callable[[Any], tuple[Tensor | None, Tensor | None]]) -> Rule:
    """Rule of a batch normalisation whose statistics do not depend on the batch: a fixed affine map.

    Args:
        statistics: module -> (mean, variance) by channel ``[C]``.
    """

    def linear(module: Any, x: Tensor) -> Tensor:
        slope = (statistics(module)[1] + module.eps).rsqrt()  # pyright: ignore[reportOptionalOperand]
        slope = slope if module.weight is None else slope * module.weight
        return x * slope.reshape(-1, *[1] * (x.dim() - 2))

    def normalise(module: Any, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # torch takes no bfloat16 ones without scale and shift
        mean, variance = (each.to(wide) for each in statistics(module) if each is not None)
        return F.batch_norm(x, mean, variance, None, None, False, 0.0, module.eps)

    return _normalised_channels(
        normalise,
        accepts=lambda module, x: not module.training and module.running_mean is not None and x.dim() >= 2,
        linear=linear,
    )


for _type in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register(_type, batch_norm_rule(lambda module: (module.running_mean, module.running_var)))

for _dimensions, _type in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1):
    register(
        _type,
        _normalised_channels(
            lambda m, x: F.instance_norm(x, eps=m.eps),
            accepts=lambda module, x, d=_dimensions: x.dim() == d + 2 and not module.track_running_stats,
        ),
    )
