"""Which example each row of every recorded call is of, where an index gives the examples, as gradients show.

Graphs are batched by concatenating their nodes; an index says which graph each node is of (`told_rows`). Whether a call
has a row for each node, for each graph or for something else that is as many by chance, and whether the index is
right, sizes do not tell. So for every kind of pass the model is run again with its outputs weighted by 1 and, for each
digit d of an output's example to base 8, by 2^d:

    gradients   what comes to a row is 2^d times what came with 1, exactly, if it comes from one example, which the
                digits then name: it must be the one that the index says
    values      all that belongs to one half of the examples is changed, and the outputs of the other half must stay

What neither shows: examples that meet without a gradient before the first of these rows, in what is no tensor among the
model's inputs; a model that passed, and then comes to let them meet as `vlearn.per_example.independence` says; and what
gives the index, if it is right for one batch and wrong for a later one. Of rows whose gradient is lost in rounding
nothing is known, nor needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.model_checks import ModelChecks, remember
from vlearn.capture.names import argument_of
from vlearn.capture.pytrees import tensor_leaves, with_leaves
from vlearn.capture.trace import Trace, is_close
from vlearn.layers.example_rows import ExampleRows
from vlearn.per_example.measured_axes import hand_over
from vlearn.per_example.replay import as_recorded, rerun, rerun_with

ExampleIndex = str | Callable[..., Tensor | Sequence[Tensor]]
AGREE = 1e-4
ROUNDING = 30  # times eps, relative to the largest gradient that comes to a call
CHANGED = 1.5  # times what it is


def check_example_index(example_index: Any) -> None:
    """Raise ValueError unless it is None, the name of an argument, or a callable."""
    if not (example_index is None or isinstance(example_index, str) or callable(example_index)):
        raise ValueError(
            f"example_index is a {type(example_index).__name__}, but each batch has its own: pass the name of the "
            "argument of the model's forward that has it, or a callable of the forward's arguments."
        )


def told_rows(
    example_index: ExampleIndex, model: nn.Module, args: Any, kwargs: Any, num_examples: int | None = None
) -> list[ExampleRows]:
    """Which example each row of concatenated tensors is of: one for each number of rows that the user tells.

    Args:
        example_index: see `vlearn.optim.optimizer.VariationalOptimizer.watch`.
        model: what is called with these arguments.
        num_examples: the size of the batch; None: the largest number in the index, plus 1.
    Raises:
        ValueError: if these are no numbers of examples.
    """
    if isinstance(example_index, str):
        given: Any = argument_of(model, example_index, args, kwargs)
    else:
        given = example_index(*args, **kwargs)
    told = [_checked(index) for index in (given if isinstance(given, tuple | list) and given else [given])]
    largest = max(int(index.max()) for index in told)
    if num_examples is not None and largest >= num_examples:
        raise ValueError(
            f"example_index names example {largest}, but the batch has {num_examples} targets: let it give the example "
            "of each row, from 0, and the loader one target for each example."
        )
    count = largest + 1 if num_examples is None else num_examples
    return [ExampleRows(index, count, example_index) for index in told]


def _checked(index: Any) -> Tensor:
    """An index that was told, as a tensor of its own."""
    is_one = isinstance(index, Tensor) and index.dim() == 1 and len(index) > 0
    if not is_one or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        given = f"shape {tuple(index.shape)} and {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(
            f"example_index gives {given}, but it must give whole numbers [rows], the example of each row, as "
            "torch_geometric's data.batch, or several such tensors."
        )
    if bool((index < 0).any()):
        raise ValueError("example_index gives a negative number: let it number the examples from 0.")
    return index.detach().long().clone()


def find_example_rows(trace: Trace, weights: dict[Tensor, Tensor]) -> None:
    """Find which examples the rows of each recorded call are of; none may see another.

    Args:
        trace: a recorded forward and backward pass; the `output_rows` of its calls, so far by size, are set.
        weights: the value of each parameter during the pass.
    Raises:
        RuntimeError: if the rows of a call are not of the examples that the index says, an example's output depends on
            the other examples, or the loss on an output that has no row for each.
    """
    root = trace.root
    assert root is not None
    ends = _examples_of_outputs(trace)
    calls = [call for call in trace.layer_calls if call.reached and (call.parameters or call.inside)]
    if trace.num_examples < 2:
        return
    checks = ModelChecks.of(root)
    kind = (
        tuple((call.path, call.number, *call.output_axes) for call in calls),
        trace.kind,
        tuple(id(rows.told_by) for rows in trace.example_rows),
    )
    known: list[_Rows] | None = checks.example_rows.get(kind, (None, None))[1]
    if known is None or not all(_has_sizes(trace, *each) for each in zip(calls, known, strict=True)):
        with as_recorded(trace):
            seen = _see(trace, weights, calls, ends)
            agreeing = {output: _agreeing(trace, examples) for output, examples in seen.of_calls.items()}
            _check_others(trace, seen, agreeing)
            _check_values(trace, weights, calls, ends, seen)
        known = [_rows_of(call, agreeing) for call in calls]
        if all(_is_certain(examples, agreeing[output]) for output, examples in seen.of_calls.items()):
            remember(checks.example_rows, kind, (trace.example_rows[0].told_by, known))  # which so keeps its id
    for call, rows in zip(calls, known, strict=True):
        if rows is None:
            for part in (trace,) if trace.probed is None else (trace, trace.probed):
                hand_over(part.layer_calls, trace.layer_calls.index(call))
        else:
            call.output_rows[:] = [None if at is None else trace.example_rows[at] for at in rows]
            checks.with_examples[call.path, call.number] = None


_Candidate = tuple[int | None, Tensor]  # which of the told indices, None: one row for each example; the example of each
# The first of these for each output of a call, None for one without rows. None in the place of the list: the rows go by
# no candidate, and the model's call explains the parameters.
_Rows = list[int | None] | None


class _Seen(NamedTuple):
    """The example of each row, -1 where no gradient comes.

    Attributes:
        of_calls: by call and output; of_inputs: by place among the leaves of the model's arguments.
    """

    of_calls: dict[tuple[LayerCall, int], Tensor]
    of_inputs: dict[int, Tensor]


def _examples_of_outputs(trace: Trace) -> dict[int, Tensor]:
    """The example of each row of the outputs that the loss depends on, by place among the output's tensors."""
    ends: dict[int, Tensor] = {}
    for position, cotangent in zip(trace.positions, trace.cotangents, strict=True):
        if cotangent is None or not cotangent.dim():
            continue
        candidates = _candidates(trace, len(cotangent))
        if not candidates:
            raise RuntimeError(
                f"the loss depends on an output of shape {tuple(cotangent.shape)}, but example_index names "
                f"{trace.num_examples} examples: let the model return one row for each example, of which the last must "
                "have rows too."
            )
        ends[position] = candidates[0][1].to(cotangent.device)
    if not ends:
        raise RuntimeError(
            "the loss depends on no output with a row for each example, which would show whether example_index is "
            "right: let the model return its scores, and compute the loss of them."
        )
    return ends


def _candidates(trace: Trace, count: int) -> list[_Candidate]:
    """By what so many rows may go."""
    told = [(at, rows.index) for at, rows in enumerate(trace.example_rows) if len(rows) == count]
    one_each = (None, torch.arange(count, device=trace.example_rows[0].index.device))
    return [one_each, *told] if count == trace.num_examples else [*told]


def _has_sizes(trace: Trace, call: LayerCall, rows: _Rows) -> bool:
    """Whether what was found of a call in an earlier pass of its kind fits the number of its rows."""
    if rows is None:
        return call.stand_in is not None
    counts = [trace.num_examples if at is None else len(trace.example_rows[at]) for at in rows]
    outputs = zip(call.shapes, call.output_axes, counts, strict=True)
    return all(axis is None or shape[0] == count for shape, axis, count in outputs)


def _see(trace: Trace, weights: dict[Tensor, Tensor], calls: list[LayerCall], ends: dict[int, Tensor]) -> _Seen:
    leaves = tree_flatten((trace.args, trace.kwargs))[0]
    inputs = {
        place: leaf.detach().requires_grad_()
        for place, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() and _candidates(trace, len(leaf))
    }
    probes: dict[tuple[LayerCall, int], Tensor] = {}

    def add_probe(call: LayerCall, place: int, leaf: Tensor) -> Tensor:
        probes[call, place] = torch.zeros_like(leaf, requires_grad=True)
        return leaf + probes[call, place]

    try:
        # Not the leaves themselves, which the model may write in place.
        part = _with_inputs(trace, {place: leaf.clone() for place, leaf in inputs.items()})
        outputs = rerun_with(part, weights, calls, _each_output(add_probe))
        for call in calls:
            if any(axis is not None and (call, place) not in probes for place, axis in enumerate(call.output_axes)):
                raise RuntimeError(f"{call} gives something else")
        rows = [(outputs[position], examples) for position, examples in ends.items()]
        plain = [torch.arange(1, e.numel() + 1, device=e.device, dtype=e.dtype).cos().reshape(e.shape) for e, _ in rows]
        places = [*probes.values(), *inputs.values()]
        gradients = [
            torch.autograd.grad(
                [end for end, _ in rows],
                places,
                [c if digit is None else _times_power(c, digit) for c, digit in zip(plain, digits, strict=True)],
                retain_graph=True,
                allow_unused=True,
            )
            for digits in zip(*[[None, *_digits(examples, trace.num_examples)] for _, examples in rows], strict=True)
        ]
    except Exception as error:
        raise RuntimeError(
            "the model does not run again as it did, so that it cannot be seen whether example_index is right "
            f"({type(error).__name__}: {error})."
        ) from error
    names = [f"what the model makes of the output of {call}" for call, _ in probes]
    names += [f"what the model makes of its input of shape {tuple(leaf.shape)}" for leaf in inputs.values()]
    seen = [_named(*of_tensor) for of_tensor in zip(names, places, *gradients, strict=True)]
    return _Seen(dict(zip(probes, seen, strict=False)), dict(zip(inputs, seen[len(probes) :], strict=True)))


def _digits(examples: Tensor, num_examples: int) -> list[Tensor]:
    """The digits of examples' numbers to base 8, as many as the numbers of all have, the lowest first."""
    count = next(count for count in range(1, 64) if 8**count >= num_examples)
    return [examples // 8**place % 8 for place in range(count)]


def _times_power(tensor: Tensor, digit: Tensor) -> Tensor:
    """Rows times 2^digit."""
    return tensor * (2.0**digit).to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1))


def _named(name: str, like: Tensor, gradient: Tensor | None, *of_digits: Tensor | None) -> Tensor:
    """The example of each row by its gradients, -1 where none comes.

    Raises:
        RuntimeError: if those of several examples come to a row.
    """
    examples = torch.full((len(like),), -1, device=like.device)
    if gradient is None or not gradient.numel():
        return examples
    rows = gradient.reshape(len(like), -1)
    size, place = rows.abs().max(1)
    noise = ROUNDING * min(torch.finfo(rows.dtype).eps, torch.finfo(torch.float32).eps) * size.max()
    reached = size > noise
    examples[reached] = 0
    for digit, with_digit in enumerate(of_digits):
        weighted = torch.zeros_like(rows) if with_digit is None else with_digit.reshape(rows.shape)
        ratio = weighted.gather(1, place.unsqueeze(1)) / rows.gather(1, place.unsqueeze(1))
        power = ratio.real.log2().round().squeeze(1)
        difference = (weighted - rows * (2.0**power).unsqueeze(1)).abs().amax(1)
        is_one = (power >= 0) & (power < 8) & (difference <= (AGREE * size + noise) * 2.0**power)
        if not bool(is_one[reached].all()):
            raise RuntimeError(_SEE_ONE_ANOTHER.format(name))
        examples[reached] += power[reached].long() * 8**digit
    return examples


_SEE_ONE_ANOTHER = (
    "{} depends on the other examples of the batch, so no example has a gradient of its own: let the model compute "
    "nothing over all rows (LayerNorm, or statistics by example, instead of the batch's), or use another batch size if "
    "it is a table that is as long by chance."
)


def _agreeing(trace: Trace, seen: Tensor) -> list[_Candidate]:
    """The candidates that rows may go by, as far as was seen."""
    candidates = _candidates(trace, len(seen))
    return [each for each in candidates if bool(((seen == each[1].to(seen.device)) | (seen < 0)).all())]


def _rows_of(call: LayerCall, agreeing: dict[tuple[LayerCall, int], list[_Candidate]]) -> _Rows:
    found = [agreeing.get((call, place)) for place in range(len(call.shapes))]
    return None if [] in found else [each[0][0] if each else None for each in found]


def _is_certain(seen: Tensor, agreeing: list[_Candidate]) -> bool:
    """Whether the same will be found again: some gradient came, and tells the candidates apart."""
    return bool((seen >= 0).any()) and all(torch.equal(agreeing[0][1], index) for _, index in agreeing[1:])


def _check_others(trace: Trace, seen: _Seen, agreeing: dict[tuple[LayerCall, int], list[_Candidate]]) -> None:
    """Raise RuntimeError unless rows that go by nothing that was told are as many by chance.

    An index that they disagree with must have been seen to be right there by other calls.
    """
    right = [torch.zeros(len(rows), dtype=torch.bool, device="cpu") for rows in trace.example_rows]
    for output, examples in seen.of_calls.items():
        at = agreeing[output][0][0] if agreeing[output] else None
        if at is not None:
            right[at] |= (examples >= 0).cpu()
    for (call, place), examples in seen.of_calls.items():
        for at, index in _candidates(trace, len(examples)) if not agreeing[call, place] else ():
            differs = ((examples >= 0) & (examples != index.to(examples.device))).cpu()
            if call.stand_in is None or (at is not None and bool((differs & ~right[at]).any())):
                raise RuntimeError(
                    f"{call}: its {len(examples)} rows go into other rows of the model's output than example_index "
                    "says, so no example has a gradient of its own: let it give, for each row, the row of the output "
                    "that is its example's."
                )


def _check_values(
    trace: Trace, weights: dict[Tensor, Tensor], calls: list[LayerCall], ends: dict[int, Tensor], seen: _Seen
) -> None:
    """Raise RuntimeError if the outputs of some examples change where others' rows do, in inputs and calls."""
    leaves = tree_flatten((trace.args, trace.kwargs))[0]
    first = torch.arange(trace.num_examples, device="cpu") < trace.num_examples // 2
    with torch.no_grad():
        outputs = rerun(trace, weights)
        for others in (first, ~first):

            def change(leaf: Tensor, examples: Tensor, others: Tensor = others) -> Tensor:
                """Only the rows that are of others."""
                changed = (others.to(leaf.device)[examples] & (examples >= 0)).reshape(-1, *[1] * (leaf.dim() - 1))
                return torch.where(changed, CHANGED * leaf, leaf)

            inputs = {place: change(leaves[place], examples) for place, examples in seen.of_inputs.items()}
            try:
                changed = rerun_with(
                    _with_inputs(trace, inputs),
                    weights,
                    calls,
                    _each_output(lambda call, place, leaf: change(leaf, seen.of_calls[call, place])),
                )
            except Exception:  # a model that checks its inputs
                return
            for position, examples in ends.items():
                before, after = outputs[position], changed[position]
                stays = ~others.to(examples.device)[examples]
                if before.shape != after.shape or not is_close(after[stays], before[stays], AGREE):
                    if all(map(torch.equal, outputs, rerun(trace, weights))):  # else it draws numbers of its own
                        raise RuntimeError(_SEE_ONE_ANOTHER.format("an output"))


def _with_inputs(trace: Trace, inputs: dict[int, Tensor]) -> Trace:
    """The pass with other arguments, by their places among the leaves."""
    part = copy.copy(trace)
    leaves, structure = tree_flatten((trace.args, trace.kwargs))
    part.args, part.kwargs = tree_unflatten([inputs.get(place, leaf) for place, leaf in enumerate(leaves)], structure)
    return part


def _each_output(change: Callable[[LayerCall, int, Tensor], Tensor]) -> Callable[[LayerCall, Any], Any]:
    """Change each output of a call that has rows of examples, for `rerun_with`."""

    def change_all(call: LayerCall, output: Any) -> Any:
        leaves, changed = tensor_leaves(output), {}
        for place, (position, axis, shape) in enumerate(
            zip(call.positions, call.output_axes, call.shapes, strict=True)
        ):
            if axis is not None and leaves[position].shape == shape:
                changed[position] = change(call, place, leaves[position])
        return with_leaves(output, changed)

    return change_all
