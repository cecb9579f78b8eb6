"""The life cycle of weight draws: who makes them, when the weights are the draw and when the mean, and the contexts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from enum import Enum
from itertools import count
from typing import Any

import torch
from torch import Tensor

from vlearn._torch_internals import next_sequence_number, set_versions
from vlearn.collectives import process_count
from vlearn.optim.distributed.local_gradients import LocalGradients
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.kernels.entries import as_real
from vlearn.optim.kernels.multi_tensor import cast, reconcile, reconciled
from vlearn.optim.kernels.nonfinite import are_zero, first_nonfinite, is_low_precision
from vlearn.optim.parameters.parameters import ByName, Parameters, state_dtype
from vlearn.optim.sampling.accumulator import Contribution, DrawAverage, PassSums
from vlearn.optim.sampling.blocks import ParameterSlice, SliceBlock, discard_draws, keep_means, partition
from vlearn.optim.sampling.draw import Draw, DrawState, Origin
from vlearn.optim.sampling.gradient_origin import GradientOrigin
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.sampling.protocols import Curvature, PassListener, Structure
from vlearn.sharded.tensors import whole

_ENSEMBLE_VERSIONS = count(2**30)  # that weights have in no other state: more than they are ever written


class Context(Enum):
    """The context of `sampled_params` that is open."""

    NONE = "none"
    TRAINING = "sampled_params(train=True)"
    ENSEMBLE = "sampled_params()"


class Sampler:
    """Makes the draws of an optimizer, and puts draw and mean into the weights.

    Several draws of one step are averaged; all but the last are summed up when the next begins.

    Args:
        parameters: those of the optimizer.
        processes: those that train the parameters.
        structure: how the posterior is drawn from.
        curvature: what is averaged over draws beside the gradient.
        generator: of the noise; None for torch's global ones.

    Attributes:
        average: of the earlier draws of this step.
        previous: the last step's draw, kept while the watch has its pass.
        listener: the watch, if the model is watched.
        context: the context of `sampled_params` that is open.
        in_closure: whether `step(closure)` runs.
        num_skipped: steps left out for a gradient that was not finite.
    """

    def __init__(
        self,
        parameters: Parameters,
        processes: Processes,
        structure: Structure,
        curvature: Curvature,
        generator: torch.Generator | None,
    ):
        self.parameters = parameters
        self.generator = generator
        self.processes = processes
        self.average = DrawAverage()
        self.previous: Draw | None = None
        self.listener: PassListener | None = None
        self.context = Context.NONE
        self.in_closure = False
        self.num_skipped = 0
        self._structure, self._curvature = structure, curvature
        self._gradient_origin = GradientOrigin()
        self._hooked_parameters: dict[Tensor, Any] = {}
        self._buffers: dict[Tensor, Tensor] = {}  # of draws that are over, for the next
        self._node_at_end = -1  # the number of the first node of a graph after the last step

    def __del__(self) -> None:
        # An optimizer that goes while its draw is in the weights leaves the mean.
        with suppress(Exception):
            if self.listener is not None:
                self.listener.remove()
            self.discard()

    @property
    def draw(self) -> Draw | None:
        """The draw that waits for step()."""
        return self._gradient_origin.draw

    @draw.setter
    def draw(self, draw: Draw | None) -> None:
        self._gradient_origin.draw = draw

    @property
    def gradient_outside_draw(self) -> Tensor | None:
        """A parameter whose present gradient has a part that was computed outside the draw."""
        return self._gradient_origin.outside_draw

    def follow_gradients(self, parameters: list[Tensor]) -> None:
        """Note from now on where the gradients of these parameters come from."""
        self._gradient_origin.listen(parameters, self._hooked_parameters)

    # -- states ------------------------------------------------------------------------------------------

    def init_states(self) -> None:
        """Make sure that every parameter that is drawn has its state, with a master copy where it needs one."""
        with torch.inference_mode(False):
            self._structure.init_states()
            for p in self.parameters.every():
                state, dtype = self.parameters.state.get(p, {}), state_dtype(p)
                # The model may have been cast, or the state saved by a run of another dtype.
                if "momentum" in state and state["momentum"].dtype != dtype:
                    state |= {k: v.to(dtype) for k, v in state.items() if k != "step" and v.is_floating_point()}
                if state and is_low_precision(p) != ("mean" in state):
                    if is_low_precision(p):
                        means = {} if self.draw is None else self.draw.means()
                        state["mean"] = (means[p] if p in means else p).detach().float()
                    else:
                        del state["mean"]

    # -- draws -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _make_draw(self, origin: Origin) -> Draw:
        """Put a new draw into the weights; on any exit but the normal one they are the mean."""
        self.init_states()
        uses_passes = self._curvature.needs_pass and origin is not Origin.ENSEMBLE
        first_node = next_sequence_number()
        draw = Draw(
            origin,
            self._new_noise(origin),
            pass_sums=PassSums() if uses_passes else None,
            weights_changed=self.processes.weights_changed,
            first_node=first_node if first_node != self._node_at_end else None,
        )
        try:
            with torch.inference_mode(False):
                for block in self._partition():
                    draw.blocks.append(block)
                    keep_means(block.slices)
                    self._reconcile_master_copies(block.slices)
                    self._structure.draw_block(block, draw.noise)
                self._structure.draw_jointly(draw.blocks, draw.noise)
            if origin is not Origin.ENSEMBLE:
                self._keep_local_gradients(draw)
        except BaseException:
            for block in draw.blocks:
                discard_draws(block.slices)
            if draw.local_gradients is not None:
                draw.local_gradients.remove()
            raise
        draw.mark_changed()
        draw.note_versions()
        return draw

    def _partition(self) -> Iterator[SliceBlock]:
        for group in self.parameters.groups:
            self.follow_gradients(group["params"])
            compiled = group.get("compiled", False)
            for with_prior in (False, True):
                trainable = [
                    p for p in group["params"] if p.requires_grad and self.parameters.has_prior(p) is with_prior
                ]
                for slices in partition(trainable, self._buffers, compiled, self._structure.is_whole):
                    yield SliceBlock(group, slices)

    def _reconcile_master_copies(self, slices: list[ParameterSlice]) -> None:
        """User edits of the weights override the float32 master copies."""
        masters = [self.parameters.master_copy(piece.parameter) for piece in slices]
        pairs = [(piece.of(m), piece.buffer) for piece, m in zip(slices, masters, strict=True) if m is not None]
        if pairs:
            reconcile(*map(list, zip(*pairs, strict=True)))

    def _new_noise(self, origin: Origin) -> Noise:
        """Where a draw's noise comes from; an ensemble's from another process only if all draw, for a sharded model."""
        parameters, processes = self.parameters.trainable(), self.processes
        mesh, ddp, several = processes.mesh, processes.ddp, process_count() > 1
        if mesh is not None and self.parameters.any_group_has("sync"):
            raise RuntimeError(
                "sync=True averages whole gradients over processes, but the parameters are sharded (fully_shard, "
                "tensor parallelism), which averages them itself: drop sync=True."
            )
        all_draw = mesh is not None or not several or origin is not Origin.ENSEMBLE
        shared = parameters and processes.share_draw and all_draw
        if several and shared and not ddp.searched and ddp.group_of(parameters) is None:
            ddp.search(parameters)
        if several:
            ddp.check_running(parameters)
        if shared:
            wrapped = several and (mesh is None or ddp.first(parameters) is not None)
            groups = [] if mesh is None else mesh.get_all_groups()
            groups += [ddp.group_of(parameters)] if wrapped else []
            device = parameters[0].device if mesh is None else torch.device(mesh.device_type)
            return Noise.shared(self.generator, self.parameters.every(), device, groups)
        return Noise.own(self.generator) if several else Noise(self.generator)

    def _keep_local_gradients(self, draw: Draw) -> None:
        """With draws of their own, processes must keep their own gradients."""
        if self.processes.own_draws:
            keep = not self.processes.several_with("sync")
            draw.local_gradients = LocalGradients(draw.parameters, self.processes.ddp, keep)
            draw.local_gradients.listen()

    def begin(self, origin: Origin) -> None:
        """Make a new draw that waits for step(), beside finished ones of the same step."""
        draw = self.draw
        if draw is not None and draw.has_gradient:
            if draw.is_automatic:
                raise RuntimeError(
                    f"a draw made by {draw.origin.value} already has gradients and waits for step(): "
                    "call step() before sampled_params(train=True)."
                )
            nonfinite = first_nonfinite([(p, draw.gradient_of(p)) for p in draw.parameters])
            if not self.processes.agree_on(nonfinite is not None, at_step=False):
                self.sum_up(draw)
            else:  # a step that a gradient scaler skipped
                self.num_skipped += 1
                self.average = DrawAverage()
            for p in draw.gradients:
                p.grad = None
        if draw is not None:
            draw.discard()
            self.draw = None
        self.draw = self._make_draw(origin)

    def begin_automatic(self) -> None:
        """Make sure of an active draw, which a training forward of a watched model needs."""
        draw = self.draw
        if self.previous is not None:
            self._buffers = self.previous.reusable_buffers()
            self.previous = None
        if self.context is not Context.NONE or self.in_closure:
            return
        if draw is None:
            self.begin(Origin.AUTOMATIC)
        elif draw.is_automatic:
            self._resume(draw)
        else:
            raise RuntimeError(
                "a training forward pass outside sampled_params(train=True), but a draw made there waits for step(): "
                "call step() first, or run this pass inside the context."
            )

    def begin_closure(self, first: bool) -> None:
        """Make sure of an active draw for one call of a closure: for the first a watched model's pending one."""
        if first and self.draw is not None:
            self.draw.resume()
            self.draw.origin = Origin.CLOSURE
        else:
            self.begin(Origin.CLOSURE)

    def _resume(self, draw: Draw) -> None:
        """Put a draw back; a new one if it lacks parameters that were unfrozen since and nothing hangs on it yet."""
        if draw.has_gradient or all(p in draw.slices_of for p in self.parameters.trainable()):
            draw.resume()
        else:
            self.begin(draw.origin)

    def discard(self) -> None:
        """Forget every draw of this step and put the mean into the weights."""
        if self.draw is not None:
            self.draw.discard()
        self.draw, self.average, self.previous, self._buffers = None, DrawAverage(), None, {}
        if self.listener is not None:
            self.listener.forget_calls()
            self.listener.forget_pass()

    def consume(self, draw: Draw, keep: bool) -> None:
        """End a step: the mean is in the weights, and no draw waits any more.

        Args:
            draw: the last one of the step.
            keep: the draw is wanted afterwards, in the buffers.
        """
        draw.discard()
        draw.mark_changed()
        self._node_at_end = next_sequence_number()
        self.draw, self.average, self.previous = None, DrawAverage(), draw if keep else None
        if not keep:
            self._buffers = draw.reusable_buffers()

    def recover(self) -> None:
        """Restore a consistent state after an interrupt in a forward pass: torch then runs no forward hooks."""
        if self.listener is not None:
            self.listener.forget_calls()
        if self.draw is not None and self.draw.state is DrawState.DISCARDED:
            self.discard()
        elif self.draw is not None:
            self.draw.restore()

    # -- gradients ---------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """The user is about to zero the gradients: those of finished draws of this step stay counted."""
        self.recover()
        self._gradient_origin.clear()
        for p, (gradient, _) in (self.draw.gradients if self.draw is not None else {}).items():
            if p.grad is gradient:
                p.grad = None  # the draw keeps it; zeroing in place would lose it

    def forget_zeroed_passes(self) -> None:
        """A backward pass begins: where gradients have been zeroed, the passes that they came from do not count."""
        draw = self.draw
        if draw is None or draw.pass_sums is None:
            return
        if are_zero(p.grad for p in draw.parameters if p.grad is not None):
            draw.pass_sums.clear()

    def check_local_gradients(self, draw: Draw) -> None:
        """Raise RuntimeError if this process's own gradients do not explain those in `p.grad`."""
        if draw.local_gradients is not None:
            draw.local_gradients.check(draw.gradient_of, self.parameters.names)

    def sum_up(self, draw: Draw) -> None:
        """Add a finished draw's gradient and curvature to the sums, before its buffers go."""
        for p, (gradient, version) in draw.gradients.items():
            if gradient._version != version and not bool(gradient.any()):
                raise RuntimeError(
                    f"the gradient of {self.parameters.names()[p]!r} was zeroed in place while its draw waits for "
                    "step(): call optimizer.zero_grad(), or zero_grad(set_to_none=True)."
                )
        self.check_local_gradients(draw)
        draw.follow_storage()
        self.average.add(c for block in draw.blocks for c in self.contributions(draw, block))
        if draw.pass_sums is not None and draw.pass_sums.count:
            self.average.add_layer_statistics(draw.pass_sums.layer_statistics())

    def contributions(self, draw: Draw, block: SliceBlock) -> list[Contribution]:
        """What one draw contributes, for the slices of a block that have a gradient."""
        given = [(piece, g) for piece in block.slices if (g := draw.gradient_of(piece.parameter)) is not None]
        if not given:
            return []
        slices = [piece for piece, _ in given]
        means = [piece.exact_mean(self.parameters) for piece in slices]
        dtype, count = means[0].dtype, len(slices)
        wide = cast([*(piece.of(g) for piece, g in given), *(piece.draw for piece in slices)], dtype)
        gradients, draws = wide[:count], wide[count:]
        own = gradients
        if draw.local_gradients is not None:
            local = [draw.local_gradients.of(piece.parameter, g) for piece, g in given]
            own = cast([piece.of(g) for piece, g in zip(slices, local, strict=True)], dtype)
        noise = list(torch._foreach_sub(draws, means))
        curvatures = self._curvature.of_draw(draw, block.group, slices, noise, own)
        return list(map(Contribution, slices, gradients, curvatures or [None] * len(slices)))

    # -- contexts ----------------------------------------------------------------------------------------

    @contextmanager
    def sampled(self, train: bool) -> Iterator[None]:
        """The context that `VariationalOptimizer.sampled_params` opens."""
        if self.context is not Context.NONE:
            raise RuntimeError("sampled_params inside sampled_params: leave the first context before entering another.")
        if self.in_closure and train:
            raise RuntimeError("sampled_params(train=True) inside step(closure), which draws itself: use one of them.")
        self.recover()
        with self._training_context() if train else self._ensemble_context():
            self.context = Context.TRAINING if train else Context.ENSEMBLE
            try:
                yield
            finally:
                self.context = Context.NONE
                self.recover()

    @contextmanager
    def _training_context(self) -> Iterator[None]:
        self.begin(Origin.CONTEXT)
        draw = self.draw
        assert draw is not None
        # Gradients may also be written by hand, without a backward pass that tells us. Inside, each is an alias of the
        # one that was there, so that this very tensor is seen when it is assigned again.
        before = {p: p.grad for p in draw.parameters if p.grad is not None}
        aliases = {p: gradient.detach() for p, gradient in before.items()}
        versions = {p: alias._version for p, alias in aliases.items()}
        for p, alias in aliases.items():
            p.grad = alias
        try:
            yield
        except BaseException:
            self._put_back(before, aliases)
            self._discard_after_exception(draw)
            raise
        if self.draw is not draw:  # load_state_dict inside the context has dropped it
            self._put_back(before, aliases)
            return
        written = (
            p.grad is not None and (p.grad is not aliases.get(p) or p.grad._version != versions[p])
            for p in draw.parameters
        )
        draw.has_gradient = draw.has_gradient or any(written)
        self._put_back(before, aliases)
        if draw.has_gradient:
            draw.keep_gradients()
            if self.listener is not None:
                self.listener.collect()
            draw.finish()
        else:
            draw.discard()
            self.draw = None

    @staticmethod
    def _put_back(gradients: dict[Tensor, Tensor], aliases: dict[Tensor, Tensor]) -> None:
        """Give the parameters the gradients whose aliases they still have."""
        for p, gradient in gradients.items():
            if p.grad is aliases[p]:
                p.grad = gradient

    def _discard_after_exception(self, draw: Draw) -> None:
        """Discard the draw; its gradients must not reach step()."""
        if draw.has_gradient:
            for p in draw.parameters:
                self._gradient_origin.record_outside(p)
        draw.discard()
        if self.draw is draw:
            self.draw = None
        if self.listener is not None:
            self.listener.forget_pass()

    @contextmanager
    def _ensemble_context(self) -> Iterator[None]:
        with self.at_mean():
            draw, versions = None, {p: p._version for p in self.parameters.trainable()}
            try:
                draw = self._make_draw(Origin.ENSEMBLE)
                # A graph of before waits for its weights to come back; one of inside must never find others.
                set_versions(dict.fromkeys(draw.parameters, next(_ENSEMBLE_VERSIONS)))
                yield
            finally:
                if draw is not None:
                    draw.discard()
                    set_versions({p: versions[p] for p in draw.parameters})
                    self._buffers = draw.reusable_buffers()

    def train(self) -> None:
        """Put a draw into the weights, or the one that waits for `step()` again: micro-batches share it."""
        if self.context is not Context.NONE:
            raise RuntimeError("train() inside sampled_params, which draws itself: use one of them.")
        if self.draw is not None and self.draw.origin is Origin.CONTEXT:
            raise RuntimeError(
                "train() while a draw of sampled_params(train=True) waits for step(): call step() first."
            )
        self.recover()
        if self.draw is None:
            self.begin(Origin.TRAIN)
        else:
            self._resume(self.draw)

    def eval(self) -> None:
        """Put the mean into the weights; a draw made by `train()` or automatically waits for `step()`."""
        if self.context is not Context.NONE:
            raise RuntimeError("eval() inside sampled_params: leave the context, which restores the mean.")
        self.recover()
        if self.draw is not None:
            self.draw.finish()

    def means(self, named: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """The posterior mean by parameter name, wherever it waits while a draw is in the weights.

        Of complex parameters in pairs. That of a sharded one is whole: all processes must read it.
        """
        return ByName(named, self._mean_of)

    def _mean_of(self, p: Tensor) -> Tensor:
        master, draw = self.parameters.master_copy(p), self.draw
        mean = as_real(p.data if draw is None else draw.means().get(p, p.data))
        return whole(mean if master is None else reconciled(master, mean))

    def at_mean(self) -> AbstractContextManager[None]:
        """A context in which the weights are the mean whatever draw is active; it is put back afterwards."""
        return self.draw.at_mean() if self.draw is not None else nullcontext()
