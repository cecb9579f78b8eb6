"""A pass of a sharded model, made again with whole weights: its own layers had those but for a moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vlearn.capture.hooks import hooks_paused, record
from vlearn.capture.pytrees import tensor_leaves
from vlearn.capture.random_state import random_numbers_from
from vlearn.capture.trace import Trace
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.replay import call_in_place, native_recurrence
from vlearn.sharded.whole_model import whole_model


def with_whole_weights(model: nn.Module, trace: Trace, weights: Mapping[Tensor, Tensor], scale: float) -> RecordedPass:
    """The pass of a model that `fully_shard` has sharded, with whole parameters in the places of its own.

    All processes that have shards must ask for it, each with its own pass.

    Args:
        model: what is watched.
        trace: of the root alone, whose backward pass has come.
        weights: those of the pass, sharded.
        scale: see `RecordedPass`.
    Raises:
        RuntimeError: if tensor parallelism has sharded the model, or the examples have no gradients of their own.
    """
    trace.check_unchanged()
    copy = whole_model(model, weights)
    assert trace.root is not None
    root, in_train_mode = copy.module_of[trace.root], {copy.module_of[module] for module in trace.in_train_mode}
    tracked = [copy.parameter_of[p] for p in weights if p.requires_grad and p in copy.parameter_of]
    for module in root.modules():
        module.training = module in in_train_mode
    device = next((p.device.type for p in tracked), "cpu")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
        random_numbers_from(trace.random_state),
        native_recurrence(root.modules()),
        hooks_paused(),
        record(root, tracked, trace.num_examples, trace.example_rows, is_replay=True) as again,
    ):
        output = call_in_place(root, trace.args, trace.kwargs)
    if again.problems:
        raise RuntimeError(f"sensitivities are not defined for this step: {again.problems[0]}")
    leaves, own = tensor_leaves(output), tensor_leaves(trace.output)
    came = {at: c for at, c in zip(trace.positions, trace.cotangents, strict=True) if c is not None}
    if any(leaves[at].shape != own[at].shape or not leaves[at].requires_grad for at in came):
        raise RuntimeError(
            "repeating the forward pass gave outputs of other shapes, so the pass cannot be made again with whole "
            "weights: let the model's outputs depend on its inputs and weights alone."
        )
    again.cotangents = [came[at].to(leaves[at].dtype) if at in came else None for at in again.positions]
    outputs = [leaves[at] for at in again.positions if at in came]
    pulled_back = again.pulled_back(outputs, [c for c in again.cotangents if c is not None])
    recorded = RecordedPass.validated(pulled_back, {p: p.detach() for p in tracked}, scale)
    return replace(recorded, stands_for=copy.parameter_of)
