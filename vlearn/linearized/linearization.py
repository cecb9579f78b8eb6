"""One batch at the posterior mean: losses, residuals, curvature, and products with V = J Σ Jᵀ of each example.

f_n  output,  ℓ_n  own loss,  e_n = ∂ℓ_n/∂f_n,  Λ_n = ∂²ℓ_n/∂f_n²,  J_n = ∂f_n/∂θ,  g_n = J_nᵀ e_n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vlearn._warnings import warn_user
from vlearn.capture.hooks import record
from vlearn.capture.pytrees import MAKES_ITS_OWN, Selector, plain, select, shapes, tensor_leaves, with_leaves
from vlearn.capture.trace import Trace, is_close
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.protocol import Posterior, match
from vlearn.linearized.batches import Batch
from vlearn.linearized.covariance_products import covariance_products
from vlearn.linearized.loss_checks import check_own_losses
from vlearn.linearized.output_change import check_deviation, output_deviation
from vlearn.linearized.processes import check_whole
from vlearn.losses.example_loss import ExampleLoss
from vlearn.losses.log_probabilities import LogProbabilities
from vlearn.losses.output_hessian import (
    hessian_by_differences,
    hessian_probe,
    no_special_direction,
    output_hessian,
    product_by_differences,
    random_signs,
    root_probe,
)
from vlearn.per_example.gradients import dense_gradients
from vlearn.per_example.measured_axes import VALUES_AGREE
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.replay import as_recorded, eval_mode, native_recurrence, tangents_in_reverse, without_fastpath

_NO_CURVATURE = (
    "the loss has no second derivative in torch, and an output of {size} entries is too large for differences of its "
    "first: leave out leverage='exact', refined, refine and whatever else needs Λ, or pass leverage='probe' or "
    "leverage=None ({error})."
)
_CUT = (
    "a part of a batch has some of the rows of every target, and in a sweep in parts of every input, that is as long "
    "as the batch; what belongs to all examples must not be, so expand it to a row for each example, keep it in a "
    "buffer of the model or in the loss, or take another batch size."
)
_OTHER_IN_PART = (
    "the output or the loss of an example depends on the other examples of the batch, so no example has one of its "
    f"own: use eval-mode BatchNorm or LayerNorm, and inputs and targets with a row for each example; {_CUT}"
)
DIFFERENCES = 256  # entries of an example's output up to which differences stand in for second derivatives
GRADIENT_ENTRIES = 2**24  # entries of the gradients of one chunk, 64 MiB of float32


@dataclass(eq=False)
class Linearization:
    """A batch's forward pass at the mean, kept for products with the Jacobian.

    Attributes:
        trace: the recorded forward pass.
        covariance: Σ of the parameters that move.
        weights: value of each parameter.
        batch: inputs, targets, example numbers.
        losses: the training loss of each example.
        selector: which of several outputs residual, deviation and curvature speak of.
        prediction: the model's whole output.
        outputs: its tensors that depend on the parameters.
        leaves: the same as leaves of a graph of their own, from which the loss was computed.
        own_loss: ``[N]`` own losses with their graph, ``[N, T]`` of every token where tokens are the examples.
        residuals: gradient of the summed losses with respect to each leaf, None where it depends on none.
        log_probabilities: by their number, the leaves that the loss takes as logits.
        position: the only position whose tokens' losses count, where tokens are the examples.
    """

    trace: Trace
    covariance: Covariance
    weights: dict[Tensor, Tensor]
    batch: Batch
    losses: ExampleLoss
    selector: Selector
    prediction: Any
    outputs: list[Tensor]
    leaves: list[Tensor]
    own_loss: Tensor
    residuals: list[Tensor | None]
    log_probabilities: dict[int, LogProbabilities]
    position: int | None = None

    @property
    def loss(self) -> Tensor:
        """ℓ ``[N]``."""
        return self.own_loss.detach()

    @property
    def chosen(self) -> int:
        """Which of the outputs the selector names."""
        residual = self.selected_residual
        places = [i for i, each in enumerate(self.residuals) if each is residual]
        if not places:
            raise ValueError(f"output={self.selector!r} {MAKES_ITS_OWN}")
        return places[0]

    @property
    def selected_residual(self) -> Tensor:
        """e ``[N, ...]`` of the selected output, with its graph if there is one."""
        return self._selected(self.residuals)

    @property
    def residual(self) -> Tensor:
        """e ``[N, ...]`` of the selected output."""
        return self.selected_residual.detach()

    @property
    def output(self) -> Tensor:
        """f ``[N, ...]``, the selected output."""
        return self.leaves[self.chosen].detach()

    def hessian(self) -> Tensor:
        """Λ ``[N, C, C]`` of the selected output; the residuals need their graph (`second_order`).

        Where the loss has no second derivative in torch (CTC and margin losses), by differences of its first.

        Raises:
            RuntimeError: if it has none and the output has too many entries for that.
        """
        try:
            if self._hides_curvature():
                raise NotImplementedError("it is a function that is differentiated once")
            return output_hessian(self.selected_residual, self.leaves[self.chosen])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self._differences_are_few:
                raise RuntimeError(_NO_CURVATURE.format(size=self.output[0].numel(), error=error)) from error
            return hessian_by_differences(self._residual_at, self.output)

    @torch.enable_grad()
    def check_curvature(self) -> None:
        """Raise RuntimeError if a residual changes with the outputs and has no graph that says how."""
        hidden = [i for i, e in enumerate(self.residuals) if e is not None and not e.requires_grad]
        if not hidden:
            return
        leaves = [_moved(leaf).requires_grad_() for leaf in self.leaves]
        moved = torch.autograd.grad(self._loss_of(leaves).sum(), leaves, allow_unused=True)
        for i in hidden:
            now, before = moved[i], self.residuals[i]
            if now is None or before is None or not torch.equal(now, before):
                error = "it is a function that is differentiated once"
                raise RuntimeError(_NO_CURVATURE.format(size=self.leaves[i][0].numel(), error=error))

    @property
    def _differences_are_few(self) -> bool:
        return self.output[0].numel() <= DIFFERENCES

    def _hides_curvature(self) -> bool:
        """Whether residuals without a graph, as those of a loss that is linear in the output, change with the output.

        A backward pass that is written in Python may hide that it depends on its input.
        """
        if self.selected_residual.requires_grad:
            return False
        return not torch.equal(self._residual_at(_moved(self.output)), self._residual_at(self.output))

    @torch.enable_grad()
    def _residual_at(self, output: Tensor) -> Tensor:
        """e ``[N, ...]`` of the selected output, at another value of it."""
        leaf = output.detach().requires_grad_()
        chosen = self.chosen
        loss = self._loss_of([leaf if i == chosen else other.detach() for i, other in enumerate(self.leaves)])
        return torch.autograd.grad(loss.sum(), leaf)[0]

    def leverage_estimate(self, generator: torch.Generator | None) -> Tensor:
        """tr(ΛV) ``[N]`` from one random direction, without bias: uᵀVu with E[uuᵀ] = Λ.

        Where the loss curves downwards in the output of an example, or has no second derivative in torch and the output
        is large, it is zᵀΛVz of random signs z, Λz by a difference of the first derivatives.

        Args:
            generator: of the direction.
        """
        found = self._probe(generator)
        if found is not None and not bool(found[1].any()):
            return self.quadratic_and_product(found[0], product=False)[0]
        z = random_signs(self.output, generator)
        product = self.quadratic_and_product(z)[1]
        assert product is not None
        curved = product_by_differences(self._residual_at, self.output, z)
        return (curved * product).reshape(len(z), -1).sum(1)

    def probe(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A random direction of the selected output that holds its curvature, see `hessian_probe`.

        Raises:
            RuntimeError: if the loss has no second derivative in torch and its output is large.
        """
        found = self._probe(generator)
        if found is None:
            raise RuntimeError(
                "the loss has no second derivative in torch, and its output is too large for differences of its first: "
                "use curvature='empirical'."
            )
        return found

    @torch.enable_grad()
    def _probe(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor] | None:
        """As `probe`; None where that is not to be had."""
        chosen = self.chosen

        def at_zero() -> tuple[Tensor, Tensor]:
            zero = torch.zeros_like(self.leaves[chosen], requires_grad=True)
            loss = self._loss_of([zero if i == chosen else leaf for i, leaf in enumerate(self.leaves)]).sum()
            return torch.autograd.grad(loss, zero, create_graph=True)[0], zero

        try:
            if not self._hides_curvature():
                return hessian_probe(self.selected_residual, self.leaves[chosen], at_zero, generator)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no second derivative
            pass
        return root_probe(self.hessian(), self.output, generator) if self._differences_are_few else None

    def self_influence_and_deviation(self, deviation: bool, last: bool = False) -> tuple[Tensor, list[Tensor] | None]:
        """Along each example's own gradient: (gᵀΣg ``[N]``, J Σ g of every output).

        Args:
            deviation: also the second.
            last: no other product follows, so that the graph may go.
        """
        residuals = [None if e is None else e.detach() for e in self.residuals]
        return self._products(self.backprop_residuals(last), residuals, deviation)

    def backprop_residuals(self, last: bool = False) -> RecordedPass:
        """The pass with the gradients of each example's own loss.

        Args:
            last: no other product follows, so that the graph may go.
        Raises:
            RuntimeError: if the examples have no gradients of their own.
        """
        pairs = [(o, e.detach()) for o, e in zip(self.outputs, self.residuals, strict=True) if e is not None]
        return self._pulled_back([o for o, _ in pairs], [e for _, e in pairs], last)

    def example_gradients(
        self, limit: int | None = None, members: Tensor | None = None
    ) -> Iterator[tuple[slice, dict[Tensor, Tensor]]]:
        """g_n by parameter ``[n, *shape]``, a chunk of the batch's examples at a time.

        Args:
            limit: largest number of examples at a time; those of `GRADIENT_ENTRIES` by default.
            members: ``[k]`` the only examples that are wanted, of which the chunks then are; None for all.
        """
        recorded = self.backprop_residuals(last=True)
        if members is not None:
            recorded = recorded.subset(members)
        calls_of = recorded.calls_of(self.weights)
        if limit is None:
            limit = max(1, GRADIENT_ENTRIES // sum(p.numel() for p in self.weights))
        for start in range(0, recorded.num_examples, limit):
            examples = slice(start, min(start + limit, recorded.num_examples))
            with as_recorded(self.trace):
                gradients = dense_gradients(recorded, calls_of, examples)
            yield examples, gradients

    def quadratic_and_product(
        self, direction: Tensor, product: bool = True, last: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """For a direction u ``[N, ...]`` of the selected output: (uᵀVu ``[N]``, V u ``[N, ...]``).

        Args:
            product: also the second.
            last: no other product follows, so that the graph may go.
        """
        cotangents = [None if i != self.chosen else direction for i in range(len(self.outputs))]
        quadratic, tangents = self._products(self.backprop(direction, last), cotangents, product)
        return quadratic, None if tangents is None else tangents[self.chosen]

    def backprop(self, direction: Tensor, last: bool = False) -> RecordedPass:
        """The pass with the gradients of ⟨direction ``[N, ...]``, selected output⟩; see `backprop_residuals`."""
        output = self.outputs[self.chosen]
        return self._pulled_back([output], [direction.reshape(output.shape)], last)

    def loss_at(self, changes: list[Tensor]) -> Tensor:
        """Own losses ``[N]`` where each output has changed; NaN where that is no output that the loss takes."""
        leaves = [leaf.detach() for leaf in self.leaves]
        changed = [leaf + change for leaf, change in zip(leaves, changes, strict=True)]
        outside = self.losses.is_outside(self._as_for_loss(changed))
        if outside is None or not bool(outside.any()):
            return self._loss_of(changed)
        for leaf, moved in zip(leaves, changed, strict=True):
            moved[outside] = leaf[outside]
        return self._loss_of(changed).masked_fill(outside, torch.nan)

    @torch.enable_grad()
    def loss_change(self, changes: list[Tensor]) -> Tensor:
        """First-order change of own losses ``[N]``, or ``[N, T]``, where each output moves along a change.

        Needs the graph of the residuals (`second_order`).
        """
        return tangents_in_reverse([self.own_loss], self.leaves, changes)[0].detach()

    def changes_of_chosen(self, change: Tensor) -> list[Tensor]:
        """One change for each output: the given one of the selected, none of the others."""
        chosen = self.chosen
        shape = self.leaves[chosen].shape
        return [change.reshape(shape) if i == chosen else torch.zeros_like(x) for i, x in enumerate(self.leaves)]

    def check_part(self, part: Linearization, rows: Tensor) -> None:
        """Raise RuntimeError unless some examples have in a part of the batch what they have within the whole.

        Args:
            part: that with these rows of the batch alone.
        """
        count = self.loss.shape[:1]
        has_rows = [leaf.shape[:1] == count for leaf in self.leaves]
        within = [leaf[rows.to(leaf.device)] if own else leaf for leaf, own in zip(self.leaves, has_rows, strict=True)]
        for alone, other, own in zip(part.leaves, within, has_rows, strict=True):
            if own:  # what is not the examples' own, as a number for the batch, may be another
                _check_same(alone, other)
        _check_same(part._loss_of(within), self.own_loss[rows.to(self.own_loss.device)])

    def check_one_output(self, asked: str) -> None:
        """Raises ValueError where the loss depends on several outputs: Λ is then no block of one of them."""
        if sum(residual is not None for residual in self.residuals) > 1:
            raise ValueError(
                f"{asked} needs a loss of one output alone, but this one depends on several: leave it out, or pass a "
                "loss_fn that reads one."
            )

    def _pulled_back(self, outputs: list[Tensor], cotangents: list[Tensor], last: bool) -> RecordedPass:
        return RecordedPass.validated(self.trace.pulled_back(outputs, cotangents, not last), self.weights)

    def _products(
        self, recorded: RecordedPass, cotangents: list[Tensor | None], deviation: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        products = covariance_products(recorded, self.covariance, deviation)
        if not deviation:
            return products.self_influence, None
        changes = output_deviation(recorded, products)
        check_deviation(recorded.trace, products.self_influence, changes, cotangents)
        return products.self_influence, changes

    def _loss_of(self, leaves: list[Tensor]) -> Tensor:
        loss = self.losses(self._as_for_loss(leaves), self.batch.target)
        return loss if self.position is None else loss[:, self.position]

    def _as_for_loss(self, leaves: list[Tensor]) -> Any:
        """What the loss is given of these outputs."""
        leaves = _as_logits(leaves, self.log_probabilities)
        return _for_loss(self.prediction, self.trace.positions, leaves, self.selector, self.losses)

    def _selected(self, tensors: list[Tensor | None]) -> Tensor:
        return select(self.trace.as_output(tensors), self.selector)


class OutputTooLargeError(Exception):
    """The output of a batch is larger than was allowed.

    Attributes:
        ends: the first and the last example's part of each tensor of it; None for one without a row for each example.
        entries: of each example.
    """

    def __init__(self, outputs: list[Tensor], count: int):
        super().__init__(f"an output of {[tuple(each.shape) for each in outputs]} is too large at once")
        self.ends = [each[[0, -1]].detach() if each.shape[:1] == (count,) else None for each in outputs]
        self.entries = sum(each.numel() for each in outputs) // count

    def check_end(self, lin: Linearization, place: int) -> None:
        """Raise RuntimeError unless an example has this output also in a part of the batch.

        Args:
            place: 0 of the first example, which is the part's first, or -1 of the last.
        """
        for alone, ends in zip(lin.outputs, self.ends, strict=True):
            if ends is not None:
                _check_same(alone[place], ends[place])


def _check_same(alone: Tensor, within: Tensor) -> None:
    """Raise RuntimeError unless some examples have in a part of their batch what they have within the whole."""
    if not is_close(alone, within, max(VALUES_AGREE, 10 * torch.finfo(within.dtype).eps)):
        raise RuntimeError(_OTHER_IN_PART)


@contextmanager
def part_of_batch() -> Iterator[None]:
    """What fails inside, where a part of a batch is run, says how a batch is cut."""
    try:
        yield
    except (torch.OutOfMemoryError, ValueError, TypeError):  # the latter two of a loss that does not fit, cut or not
        raise
    except Exception as error:
        raise RuntimeError(f"{error}\nThis was in a part of a batch: {_CUT}") from error


def linearize(
    model: nn.Module,
    covariance: Covariance,
    batch: Batch,
    losses: ExampleLoss,
    output: Selector = None,
    second_order: bool = False,
    largest: int | None = None,
) -> Linearization:
    """Run one batch forward, record it, and take the residuals of its losses.

    Args:
        model: in eval mode at the mean, see `at_mean`.
        second_order: keep the graph of the residuals, which the curvature needs.
        largest: entries of the output of all examples beyond which nothing but the forward pass is done.
    Raises:
        RuntimeError: if the examples of a batch have no gradient or no loss of their own.
        OutputTooLargeError: if the output is, of a batch that can be cut.
    """
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p in covariance]
    with torch.enable_grad():
        with record(model, parameters, len(batch.index), batch.example_rows) as trace, without_fastpath():
            prediction = model(*batch.args, **batch.kwargs)
        if batch.members is not None:
            prediction, batch = _of_members(prediction, batch, batch.members)
    if trace.problems:
        raise RuntimeError(f"sensitivities are not defined for this model: {trace.problems[0]}")
    if not trace.positions:
        if not tensor_leaves(prediction):
            raise RuntimeError(
                f"the model gives a {type(prediction).__name__}, in which no tensors are seen: return tensors, or "
                "tuples or dicts of them, or register a dataclass by torch.export.register_dataclass."
            )
        raise RuntimeError("the model's output depends on no parameter of the posterior that requires grad.")
    with torch.enable_grad():
        outputs = [plain(tensor_leaves(prediction)[i]) for i in trace.positions]
        if largest is not None and len(batch.index) > 1 and not batch.example_rows:
            if sum(each.numel() for each in outputs) > largest:
                raise OutputTooLargeError(outputs, len(batch.index))
        leaves = [tensor.detach().requires_grad_() for tensor in outputs]

        def loss_of(leaves: list[Tensor]) -> tuple[Any, Tensor]:
            for_loss = _for_loss(prediction, trace.positions, leaves, output, losses)
            return for_loss, losses(for_loss, batch.target)

        log_probabilities = _log_probabilities(leaves, lambda leaves: loss_of(leaves)[1])
        for_loss, loss = loss_of(_as_logits(leaves, log_probabilities))
        if len(loss) != len(batch.index):
            raise RuntimeError(
                f"the loss gives {len(loss)} values for a batch of {len(batch.index)} examples: use a loss of one "
                "value for each example, and inputs and targets with the examples along dimension 0."
                f"{trace.hint_at_index()}"
            )
        kind = shapes((leaves, batch.target))
        is_known = kind in losses.checked
        residuals = torch.autograd.grad(
            loss.sum(), leaves, retain_graph=second_order or not is_known, create_graph=second_order, allow_unused=True
        )
        if not is_known:
            check_own_losses(loss, leaves, list(residuals), parameters, (for_loss, batch.target), losses)
            losses.checked.add(kind)
    trace.cotangents = list(residuals)
    return Linearization(
        trace=trace,
        covariance=covariance,
        weights={p: p.detach() for p in parameters},
        batch=batch,
        losses=losses,
        selector=output,
        prediction=prediction,
        outputs=outputs,
        leaves=leaves,
        own_loss=loss,
        residuals=list(residuals),
        log_probabilities=log_probabilities,
    )


def _of_members(prediction: Any, batch: Batch, members: Tensor) -> tuple[Any, Batch]:
    """The output and the targets of the only examples that count."""

    def rows(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.shape[:1] == batch.index.shape
        return leaf[members.to(leaf.device)] if has_rows else leaf

    return tree_map(rows, prediction), replace(batch, target=tree_map(rows, batch.target), index=batch.index[members])


@contextmanager
def at_mean(model: nn.Module, posterior: Posterior) -> Iterator[Covariance]:
    """The model in eval mode with the posterior mean as its weights; gives Σ keyed by its parameters.

    A copy that the posterior has only the names of keeps its own weights, as those of an average over the training, and
    a warning says so where they are not the mean.

    Raises:
        ValueError: if the posterior belongs to another model.
        RuntimeError: if the model is sharded.
    """
    check_whole(model)
    parameters = match(model, posterior)
    with posterior.at_mean(), eval_mode(model), native_recurrence(model.modules()):
        _warn_of_other_weights(parameters, posterior)
        yield posterior.covariance(parameters)


def _warn_of_other_weights(parameters: Mapping[str, nn.Parameter], posterior: Posterior) -> None:
    for name, p in parameters.items():
        if posterior.parameters.get(name) is p:
            return  # `Posterior.at_mean` has seen to them
        if not torch.equal(p.detach(), posterior.mean[name].to(p)):
            warn_user(
                f"the model's {name!r} is not the mean of the posterior, which has only its names: the numbers are "
                "those at the model's own weights, as of an average over the training, with a Σ that was learned at "
                "others. Where they should be the mean, load the checkpoint that the posterior was saved with."
            )
            return


def _moved(output: Tensor) -> Tensor:
    """Another output nearby, but further than its dtype rounds."""
    return output.detach() * (1 + max(1e-3, 8 * torch.finfo(output.dtype).eps))


def _log_probabilities(leaves: list[Tensor], loss_of: Callable[[list[Tensor]], Tensor]) -> dict[int, LogProbabilities]:
    """By number, the outputs that are log-probabilities in which the loss is linear."""
    found = {i: each for i, leaf in enumerate(leaves) if (each := LogProbabilities.of(leaf)) is not None}
    if not found:
        return {}
    moved = [(leaf.detach() - 2 - no_special_direction(leaf)).requires_grad_() for leaf in leaves]
    gradients = [torch.autograd.grad(loss_of(each).sum(), each, allow_unused=True) for each in (leaves, moved)]
    pairs = list(zip(*gradients, strict=True))
    return {i: each for i, each in found.items() if all(g is not None for g in pairs[i]) and torch.equal(*pairs[i])}


def _as_logits(leaves: list[Tensor], found: dict[int, LogProbabilities]) -> list[Tensor]:
    return [found[i].as_logits(leaf) if i in found else leaf for i, leaf in enumerate(leaves)]


def _for_loss(
    prediction: Any, positions: list[int], leaves: list[Tensor], output: Selector, losses: ExampleLoss
) -> Any:
    """The model's output with its differentiable tensors replaced, as the loss takes it; torch's take one tensor."""
    whole = with_leaves(prediction, dict(zip(positions, leaves, strict=True)))
    wants_whole = output is None and (isinstance(whole, Tensor) or not losses.is_torchs)
    return whole if wants_whole or not losses.torch_style else select(whole, output)
