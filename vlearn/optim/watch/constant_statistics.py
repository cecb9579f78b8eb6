"""BatchNorm in train mode with the batch's statistics taken as constants: an approximation, which the user chooses.

With the mean μ and the variance σ² of the batch held, γ (x - μ)/σ + β is an affine map of each example alone, and each
has a gradient of its own. Left out is how an example moves the others' outputs through μ and σ²: the rows do not add up
to the gradient that trains. K-FAC and VOGN are used so in the literature (Osawa et al., 2019, arXiv:1906.02506).

The gradients that came through the user's own graph hold these terms. So the pass is made once more with constants, and
the recorded gradients of the output go back through that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlearn.capture.hooks import hooked, record
from vlearn.capture.pytrees import tensor_leaves
from vlearn.capture.trace import Trace, is_close
from vlearn.layers.linear_and_norm import BatchStatistics, batch_norm_rule
from vlearn.per_example.replay import as_recorded, call_in_place, direct_cotangents, placed, same_random_numbers
from vlearn.per_example.vmap_fallback import Weights


def with_constant_statistics(trace: Trace, weights: Weights) -> Trace:
    """The same pass with every batch normalisation a fixed affine map.

    Args:
        trace: a recorded forward and backward pass, with `batch_norms`.
        weights: the value of each tracked parameter during the pass.
    Raises:
        RuntimeError: if it cannot be repeated, or a module normalises two batches in it.
    """
    root = trace.root
    assert root is not None
    trace.check_unchanged()
    statistics: dict[nn.Module, BatchStatistics] = {}

    def hold(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in statistics:
            raise RuntimeError(
                f"{trace.paths[module]} ({type(module).__name__}) normalises two batches in one forward pass, of which "
                "batch_norm='constant' can hold one: concatenate the inputs, or put it in eval mode (module.eval())."
            )
        (x,) = tensor_leaves((args, kwargs))
        statistics[module] = held = BatchStatistics.of(x.detach())
        held.put_into(module)

    with as_recorded(trace), placed(weights):
        for module in trace.batch_norms:  # so that `hold` writes into a dict that is thrown away
            module.training, module._buffers = False, dict(module._buffers)
        with (
            same_random_numbers(trace),
            hooked(trace.batch_norms, enter=hold),
            record(root, trace.tracked, trace.num_examples, trace.example_rows, is_replay=True) as replayed,
        ):
            outputs = tensor_leaves(call_in_place(root, trace.args, trace.kwargs))
        if replayed.problems:
            raise RuntimeError(f"sensitivities are not defined for this step: {replayed.problems[0]}")
        _check_repeats(trace, outputs)
        replayed.statistics = statistics
        for module, held in statistics.items():  # again, for what checkpointing computes again in the backward pass
            held.put_into(module)
        for call in replayed.layer_calls:
            held = statistics.get(call.module)
            if held is not None and call.rule is not None:  # its forms are taken when the module has its own again
                call.rule = batch_norm_rule(lambda module, held=held: held)
        return _pulled_back(trace, replayed, outputs)


def _pulled_back(trace: Trace, replayed: Trace, outputs: list[Tensor]) -> Trace:
    """The repeated pass with the recorded gradients of the output, and with those of the probe if there is one."""
    reached = zip(trace.positions, trace.cotangents, strict=True)
    pairs = [(outputs[at], c) for at, c in reached if c is not None and outputs[at].requires_grad]
    if trace.cotangents_are_total:
        pairs = direct_cotangents(pairs)
    ends, cotangents = [end for end, _ in pairs], [cotangent.to(end.dtype) for end, cotangent in pairs]
    probe, place = trace.probe, trace.probed_output
    result = replayed.pulled_back(ends, cotangents, retain_graph=probe is not None)
    result.cotangents, result.cotangents_are_total, result.probe = trace.cotangents, trace.cotangents_are_total, probe
    residual = None if place is None else trace.cotangents[place]
    if probe is not None and place is not None and residual is not None:
        at = trace.positions[place]
        wanted = probe.cotangent_of(tensor_leaves(trace.output)[at], residual)
        if wanted is not None:
            result.probed = replayed.pulled_back([outputs[at]], [wanted.to(outputs[at].dtype)])
            result.probed.cotangents = trace.cotangents
    return result


def _check_repeats(trace: Trace, outputs: list[Tensor]) -> None:
    recorded = tensor_leaves(trace.output)
    for at in trace.positions:
        unchanged = recorded[at]._version == trace.output_versions[at]
        if unchanged and not is_close(outputs[at].detach(), recorded[at], trace.tolerance):
            raise RuntimeError(
                "repeating the forward pass gave other outputs, so its batch statistics cannot be taken as constants: "
                "the model uses weights or buffers that have changed since, or random numbers that are not torch's "
                "default ones."
            )
