"""A recorded pass whose examples have gradients of their own: what every per-example quantity is computed from."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.pytrees import rows_along, rows_of, tensor_leaves, versions
from vlearn.capture.trace import Trace
from vlearn.layers.example_axes import axis_of
from vlearn.layers.example_rows import ExampleRows
from vlearn.per_example.independence import check_independent
from vlearn.per_example.measured_axes import find_example_axes
from vlearn.per_example.measured_rows import find_example_rows
from vlearn.per_example.module_call import separate_outputs
from vlearn.per_example.row_sums import check_row_sums
from vlearn.per_example.vmap_fallback import Weights


@dataclass(frozen=True, eq=False)
class RecordedPass:
    """One forward and backward pass, checked as a whole by `validated`.

    Attributes:
        trace: the calls of the layers, with the gradients of their outputs.
        weights: the value of each tracked parameter during the pass.
        scale: the gradient of an example's own loss over the gradient that the backward pass brought: the denominator
            of a mean loss, divided by what the loss was multiplied with.
        stands_for: the parameter that the pass has in the place of one of the model's, where it has another.
    """

    trace: Trace
    weights: Weights
    scale: float = 1.0
    stands_for: Mapping[Tensor, Tensor] = field(default_factory=dict)

    @classmethod
    def validated(cls, trace: Trace, weights: Weights, scale: float = 1.0) -> RecordedPass:
        """The pass of a trace without problems, whose backward pass has come.

        Raises:
            RuntimeError: if the examples have no gradients of their own: a layer does not have them along dimension 0,
                they see one another, a module that no rule covers refuses them, an input was written since, or their
                gradients do not add up to that of the pass.
        """
        for part in (trace,) if trace.probed is None else (trace, trace.probed):
            separate_outputs(part, weights)
        if not trace.example_rows:
            find_example_axes(trace, weights)
        for call in trace.layer_calls:
            if call.reached and call.parameters:
                call.check_unchanged()
        if trace.example_rows:
            find_example_rows(trace, weights)
        else:
            check_independent(trace, weights)
        check_row_sums(trace, weights)
        return cls(trace, weights, scale)

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return self.trace.num_examples

    @property
    def num_with_loss(self) -> int:
        """The number of examples that the loss depends on, at least 1: those whose targets are ignored are none."""
        total = self.num_examples
        rows = [c for c in self.trace.cotangents if c is not None and c.shape[:1] == (total,)]
        if not rows:
            return total
        return max(1, int(torch.stack([c.reshape(total, -1).ne(0).any(1) for c in rows]).any(0).sum()))

    def calls_of(self, wanted: Container[Tensor]) -> dict[Tensor, list[LayerCall]]:
        """The calls that the backward pass reached, of each wanted parameter that has any."""
        return {p: calls for p, calls in self.trace.calls_by_parameter().items() if p in wanted}

    def subset(self, examples: Tensor) -> RecordedPass:
        """The pass of some of the examples, by their numbers ``[K]`` within the batch."""
        return replace(self, trace=_subset(self.trace, examples))

    def probed(self) -> RecordedPass:
        """The pass with the gradients of the optimizer's probe, which are those of the examples' own losses.

        Raises:
            RuntimeError: if there are none, or the loss reaches a layer by another way than the probed output.
        """
        trace, probe = self.trace, self.trace.probe
        if probe is not None and probe.problem is not None:
            raise RuntimeError(str(probe.problem)) from probe.problem
        if trace.probed is None:
            raise RuntimeError("the loss does not depend on the output that the curvature is taken of.")
        for call, probed in zip(trace.layer_calls, trace.probed.layer_calls, strict=True):
            if call.parameters and not probed.reached and any(c is not None and bool(c.any()) for c in call.cotangents):
                raise RuntimeError(
                    f"the loss depends on {call} by another way than the output that the curvature is taken of, so "
                    "that its curvature would be none: give the loss of one output, or take curvature='empirical', "
                    "which counts the whole loss, as 'price' does where there is one."
                )
        return replace(self, trace=trace.probed, scale=1.0)


def _subset(trace: Trace, examples: Tensor) -> Trace:
    """The trace of the examples ``[K]`` (numbers within the batch)."""
    part = copy.copy(trace)
    part.examples, part.num_examples = examples, len(examples)
    part.args, part.kwargs = rows_of((trace.args, trace.kwargs), trace.input_axes, examples)
    part.versions = versions((part.args, part.kwargs))

    def rows(tree: Any) -> Any:
        return rows_of(tree, [axis_of(leaf, trace.num_examples) for leaf in tree_leaves(tree)], examples)

    part.output, part.cotangents = rows(trace.output), rows(trace.cotangents)
    outputs = zip(tensor_leaves(trace.output), trace.output_versions, tensor_leaves(part.output), strict=True)
    part.output_versions = [_version(*each) for each in outputs]
    part.layer_calls = [_subset_of_call(call, examples) for call in trace.layer_calls]
    return part


def _subset_of_call(call: LayerCall, examples: Tensor) -> LayerCall:
    chosen = [None if rows is None else rows.of(examples.tolist()) for rows in call.output_rows]
    taken = [examples if each is None else each.rows for each in chosen or [None] * len(call.shapes)]
    args, kwargs = rows_of((call.args, call.kwargs), call.input_axes, taken[0])
    of_outputs = list(zip(call.output_axes, taken, strict=True))
    outputs = zip(call.outputs, of_outputs, strict=False)  # not all calls keep theirs
    return replace(
        call,
        args=args,
        kwargs=kwargs,
        versions=versions((args, kwargs)),
        shapes=[
            shape if axis is None else (*shape[:axis], len(rows), *shape[axis + 1 :])
            for shape, (axis, rows) in zip(call.shapes, of_outputs, strict=True)
        ],
        cotangents=[
            None if each is None else rows_along(each, *of_output)
            for each, of_output in zip(call.cotangents, of_outputs, strict=True)
        ],
        outputs=[
            (rows := rows_along(out, *of_output), _version(out, before, rows)) for (out, before), of_output in outputs
        ],
        output_rows=[None if each is None else ExampleRows(each.example, len(examples)) for each in chosen],
        whole=(call, examples),
    )


def _version(tensor: Tensor, recorded: int, rows: Tensor) -> int:
    """The version of the chosen rows; none that they have if the tensor was written since it was recorded."""
    return rows._version if tensor._version == recorded else -1
