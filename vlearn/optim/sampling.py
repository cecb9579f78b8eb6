"""Where the weights are: draws of the posterior, their mean, and the contexts between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlearn.optim.average import Average, Contribution, worst
from vlearn.optim.captured import Captured
from vlearn.optim.draw import Draw, Slot, blocks, mark_changed
from vlearn.optim.local import LocalGradients
from vlearn.optim.noise import Noise, process_count
from vlearn.optim.nonfinite import first_nonfinite
from vlearn.optim.stray import Arrivals
from vlearn.optim.wrappers import Wrappers

if TYPE_CHECKING:
    from vlearn.optim.watch import Watch


class Sampler:
    """The part of a variational optimizer that draws; a mixin, it uses the optimizer's groups and state.

    A draw is active (the weights are the draw), finished (they are the mean, the draw waits for `step()`), or there
    is none. Several draws of one step are averaged; all but the last are summed up when the next begins.
    """

    param_groups: list[dict[str, Any]]
    state: Any
    generator: torch.Generator | None
    nonfinite_count: int
    _watch: Watch | None

    def _forget(self) -> None:
        """Start without draw and watch; nothing of this is saved."""
        self._arrivals = Arrivals()
        self._hooked: dict[Tensor, Any] = {}
        self._average = Average()  # of earlier draws of the same step
        self._wrappers = Wrappers()  # that average gradients over processes
        self._spent: Draw | None = None  # the last step's, kept while the watch has its captures
        self._buffers: dict[Tensor, Tensor] = {}  # of draws that are over, for the next
        self._in_context = ""  # or "training", "ensemble"
        self._in_closure = False

    @property
    def _draw(self) -> Draw | None:
        """The draw that waits for step()."""
        return self._arrivals.draw

    @_draw.setter
    def _draw(self, draw: Draw | None) -> None:
        self._arrivals.draw = draw

    # -- what the optimizer adds -------------------------------------------------------------------------

    def _perturb(self, group: dict[str, Any], block: list[Slot]) -> None:
        """Write mean + noise into the weights of a block; the buffers hold the mean."""
        raise NotImplementedError

    def _perturb_all(self, blocks: Iterator[tuple[dict[str, Any], list[Slot]]]) -> None:
        """Draw block by block; a posterior that joins parameters collects the blocks first."""
        for group, block in blocks:
            self._perturb(group, block)

    def _statistic(
        self, draw: Draw, group: dict[str, Any], block: list[Slot], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """What one draw adds to the average beside its gradient; may overwrite the noise θ - m.

        On a step without captures, for a rule that needs them, what leaves the state as it is; the noise may be empty
        then.
        """
        raise NotImplementedError

    def _has_statistic(self, p: Tensor) -> bool:
        """Whether `_statistic` says anything of a parameter; it is zero else. The same in all processes."""
        return True

    def _needs_captures(self) -> bool:
        """Whether the update rule wants the captures of the training passes."""
        return False

    def _collect(self) -> None:
        """Take what the update rule wants from the captures of the last training pass, before they go."""
        raise NotImplementedError

    def _prepare_states(self) -> None:
        """Make sure that every parameter that will be drawn has its state."""
        raise NotImplementedError

    def _names(self) -> dict[Tensor, str]:
        """Name of every parameter."""
        raise NotImplementedError

    def moving(self) -> list[Tensor]:
        """The parameters that are drawn."""
        raise NotImplementedError

    def _exact_mean(self, slot: Slot) -> Tensor:
        """The mean of a slot in the precision of the state: the master copy where the weights are narrower."""
        master = self.state[slot.parameter].get("mean")
        return slot.mean if master is None else slot.of(master)

    # -- several processes -------------------------------------------------------------------------------

    def _over_processes(self, setting: str) -> bool:
        """Whether there are several processes and any group has `sync` or `shared_noise`."""
        return any(group[setting] for group in self.param_groups) and process_count() > 1

    def _agreed(self, code: int, at_step: bool) -> int:
        """The greatest code of all processes whose step is one: none may wait for another that does not come."""
        parameters = self.moving() if process_count() > 1 else []
        if not parameters or not self._averages(wrapper := self._wrappers.first(parameters)):
            return code
        group = None if wrapper is None or self._over_processes("sync") else wrapper.process_group
        return worst(code, at_step, parameters[0].device, group)

    def _averages(self, wrapper: DistributedDataParallel | None) -> bool:
        """Whether `step()` averages anything over processes.

        Args:
            wrapper: around the parameters.
        """
        if wrapper is not None and wrapper._join_config.enable:
            return False  # it raises: others may have stopped
        shared = self._over_processes("shared_noise")
        return self._over_processes("sync") or (self._needs_captures() if shared else wrapper is not None)

    def _group_over(self, parameters: Iterable[Tensor]) -> Any:
        """The processes over which `step()` averages what it learns from examples of parameters; None: it does not."""
        if process_count() == 1:
            return None
        everyone = torch.distributed.group.WORLD
        if self._over_processes("sync"):
            return everyone
        if self._over_processes("shared_noise"):
            moving = (p for group in self.param_groups for p in group["params"] if p.requires_grad)
            return self._wrappers.group_of(moving) or everyone
        return self._wrappers.group_of(parameters)

    def _new_noise(self, own: bool) -> Noise:
        """Where the next draw's noise comes from; an ensemble's never from another process, which may not draw."""
        if process_count() == 1:
            return Noise(self.generator)
        parameters, wrappers = self.moving(), self._wrappers
        shared = not own and self._over_processes("shared_noise")
        if shared and not wrappers.searched and wrappers.group_of(parameters) is None:
            wrappers.search(parameters)
        wrappers.check_running(parameters)
        if shared and parameters:
            return Noise.shared(self.generator, parameters[0].device, wrappers.group_of(parameters))
        return Noise.own(self.generator)

    def _follow_gradients(self, draw: Draw) -> None:
        """With draws of their own, processes must keep their own gradients."""
        if process_count() > 1 and not self._over_processes("shared_noise"):
            draw.local = LocalGradients(draw.parameters, self._wrappers, keep=not self._over_processes("sync"))
            draw.local.listen()

    # -- draws -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _make_draw(self, origin: str) -> Draw:
        """Put a new draw into the weights; on any exit but the normal one they are the mean."""
        self._prepare_states()
        self._noise = self._new_noise(own=origin == "ensemble")
        draw = Draw(origin, captured=Captured() if self._needs_captures() else None)
        drawn: list[Slot] = []
        try:
            with torch.inference_mode(False):
                self._perturb_all(self._blocks(draw, drawn))
            if origin != "ensemble":
                self._follow_gradients(draw)
        except BaseException:
            for slot in drawn:
                slot.drop_draw()
            if draw.local is not None:
                draw.local.remove()
            raise
        mark_changed(draw.parameters)
        return draw

    def _blocks(self, draw: Draw, drawn: list[Slot]) -> Iterator[tuple[dict[str, Any], list[Slot]]]:
        """Blocks of what moves, with their groups, whose mean is in the buffers too; they become the draw's."""
        for index, group in enumerate(self.param_groups):
            self._arrivals.listen(group["params"], self._hooked)
            moving = [p for p in group["params"] if p.requires_grad]
            for block in blocks(moving, self._buffers, group.get("compiled", False)):
                for slot in block:
                    slot.buffer.copy_(slot.weights)
                    slot.mean_in_weights = False
                    drawn.append(slot)
                    self._follow_edit(slot)
                yield group, block
                draw.blocks.append((index, block))

    def _follow_edit(self, slot: Slot) -> None:
        master = self.state[slot.parameter].get("mean")
        if master is not None:
            slot.of(master).copy_(_followed(slot.of(master), slot.buffer))

    def _drop_draws(self) -> None:
        """Forget every draw of this step and put the mean into the weights."""
        if self._draw is not None:
            self._draw.drop()
        self._draw, self._average, self._spent, self._buffers = None, Average(), None, {}
        if self._watch is not None:
            self._watch.forget_calls()
            self._watch.trace = None  # its weights are gone

    def _settle(self) -> None:
        """Make good what an interrupt broke off: after one, torch calls no forward hook."""
        if self._watch is not None:
            self._watch.forget_calls()
        if self._draw is not None and self._draw.dropped:
            self._drop_draws()
        elif self._draw is not None:
            self._draw.unpeek()

    def _begin(self, origin: str) -> None:
        """A new draw that waits for step(), beside finished ones of the same step."""
        draw = self._draw
        if draw is not None and draw.has_gradient:
            if draw.origin in ("automatic", "train"):
                raise RuntimeError(
                    f"a draw made {_made_by(draw)} already has gradients and waits for step(): "
                    "call step() before sampled_params(train=True)."
                )
            nonfinite = first_nonfinite([(p, self._gradient_of(draw, p)) for p in draw.parameters])
            if not self._agreed(nonfinite is not None, at_step=False):
                self._sum_up(draw)
            else:  # a step that a gradient scaler skipped
                self.nonfinite_count += 1
                self._average = Average()
            for p in draw.gradients:
                p.grad = None
        if draw is not None:
            draw.drop()
            self._draw = None
        self._draw = self._make_draw(origin)

    def _begin_automatic(self) -> None:
        """What a training forward of a watched model needs: an active draw."""
        draw = self._draw
        if self._spent is not None:
            self._buffers = self._spent.reusable_buffers()
            self._spent = None
        if self._in_context or self._in_closure:
            return
        if draw is None:
            self._begin("automatic")
        elif draw.origin in ("automatic", "train"):
            self._resume(draw)
        else:
            raise RuntimeError(
                "a training forward pass outside sampled_params(train=True), but a draw made there waits for step(): "
                "call step() first, or run this pass inside the context."
            )

    def _resume(self, draw: Draw) -> None:
        """Put a draw back; a new one if it lacks parameters that were unfrozen since and nothing hangs on it yet."""
        if draw.has_gradient or all(p in draw.slots_of for p in self.moving()):
            draw.resume()
        else:
            self._begin(draw.origin)

    def _gradient_of(self, draw: Draw, p: Tensor) -> Tensor | None:
        if not p.requires_grad:
            return None
        if p.grad is not None:
            return p.grad
        kept = draw.gradients.get(p)
        return None if kept is None else kept[0]

    def _keep_gradients(self, draw: Draw) -> None:
        draw.gradients = {p: (p.grad, p.grad._version) for p in draw.parameters if p.grad is not None}

    def _sum_up(self, draw: Draw) -> None:
        """Add a finished draw's gradient and statistic to the sums, before its buffers go."""
        for p, (gradient, version) in draw.gradients.items():
            if gradient._version != version and not bool(gradient.any()):
                raise RuntimeError(
                    f"the gradient of {self._names()[p]!r} was zeroed in place while its draw waits for step(): "
                    "call optimizer.zero_grad(), or zero_grad(set_to_none=True)."
                )
        self._check_local(draw)
        blocks_of = ((self.param_groups[index], block) for index, block in draw.blocks)
        self._average.add(c for group, block in blocks_of for c in self._contributions(draw, group, block))
        if draw.captured is not None:
            self._average.add_joint(draw.captured.joint())

    def _check_local(self, draw: Draw) -> None:
        if draw.local is not None:
            draw.local.check(lambda p: self._gradient_of(draw, p), self._names)

    def _contributions(self, draw: Draw, group: dict[str, Any], block: list[Slot]) -> list[Contribution]:
        """(slot, gradient, statistic) of one draw, for the slots of a block that have a gradient."""
        found = [(slot, g) for slot in block if (g := self._gradient_of(draw, slot.parameter)) is not None]
        if not found:
            return []
        slots = [slot for slot, _ in found]
        exact = [self._exact_mean(slot) for slot in slots]
        gradients = [slot.of(g).to(mean.dtype) for (slot, g), mean in zip(found, exact, strict=True)]
        own = gradients
        if draw.local is not None:
            own = [
                slot.of(draw.local.of(slot.parameter, g)).to(mean.dtype)
                for (slot, g), mean in zip(found, exact, strict=True)
            ]
        noise = [slot.sample - mean for slot, mean in zip(slots, exact, strict=True)]
        return list(zip(slots, gradients, self._statistic(draw, group, slots, noise, own), strict=True))

    # -- contexts ----------------------------------------------------------------------------------------

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """The weights are a draw from the posterior inside, and the mean after any exit.

        Args:
            train: the draw and the gradients computed inside belong to the next `step()`. Entered k times before
                it, k draws are averaged (do not divide their losses by k); clip gradients inside each, and use no
                gradient scaler with k > 1. False: a draw for predicting; nothing is recorded, a draw that waits
                for `step()` is put back as it was.

        Raises:
            RuntimeError: if entered inside another sampled_params, or (train=True) while a draw made in another
                way has gradients and waits for step().
        """
        if self._in_context:
            raise RuntimeError("sampled_params inside sampled_params: leave the first context before entering another.")
        if self._in_closure and train:
            raise RuntimeError("sampled_params(train=True) inside step(closure), which draws itself: use one of them.")
        self._settle()
        with self._training_context() if train else self._ensemble_context():
            self._in_context = "training" if train else "ensemble"
            try:
                yield
            finally:
                self._in_context = ""
                self._settle()

    @contextmanager
    def _training_context(self) -> Iterator[None]:
        self._begin("context")
        draw = self._draw
        assert draw is not None
        before = [(p.grad, None if p.grad is None else p.grad._version) for p in draw.parameters]
        try:
            yield
        except BaseException:
            self._abandon(draw)
            raise
        if self._draw is not draw:  # load_state_dict inside the context has dropped it
            return
        # Gradients may also have been written by hand, without a backward pass that tells us.
        written = (
            p.grad is not None and (p.grad is not old or p.grad._version != version)
            for p, (old, version) in zip(draw.parameters, before, strict=True)
        )
        draw.has_gradient = draw.has_gradient or any(written)
        if draw.has_gradient:
            self._keep_gradients(draw)
            self._collect()
            draw.finish()
        else:
            draw.drop()
            self._draw = None

    def _abandon(self, draw: Draw) -> None:
        """After an exception: the draw goes, and gradients it left are not a step's."""
        if draw.has_gradient:
            for p in draw.parameters:
                self._arrivals.mark(p)
        draw.drop()
        if self._draw is draw:
            self._draw = None
        if self._watch is not None:
            self._watch.trace = None

    @contextmanager
    def _ensemble_context(self) -> Iterator[None]:
        waiting = self._draw
        with waiting.at_mean() if waiting is not None else nullcontext():
            draw = None
            try:
                draw = self._make_draw("ensemble")
                yield
            finally:
                if draw is not None:
                    draw.drop()
                    self._buffers = draw.reusable_buffers()

    def train(self) -> None:
        """Put a draw into the weights, or the one that waits for `step()` again: micro-batches share it."""
        if self._in_context:
            raise RuntimeError("train() inside sampled_params, which draws itself: use one of them.")
        if self._draw is not None and self._draw.origin == "context":
            raise RuntimeError(
                "train() while a draw of sampled_params(train=True) waits for step(): call step() first."
            )
        self._settle()
        if self._draw is None:
            self._begin("train")
        else:
            self._resume(self._draw)

    def eval(self) -> None:
        """Put the mean into the weights; a draw made by `train()` or automatically waits for `step()`."""
        if self._in_context:
            raise RuntimeError("eval() inside sampled_params: leave the context, which restores the mean.")
        self._settle()
        if self._draw is not None:
            self._draw.finish()

    def at_mean(self) -> AbstractContextManager[None]:
        """A context in which the weights are the mean whatever draw is active; it is put back afterwards."""
        return self._draw.at_mean() if self._draw is not None else nullcontext()


class MeanView(Mapping[str, Tensor]):
    """Posterior mean by parameter name, wherever it waits while a draw is in the weights."""

    def __init__(self, optimizer: Sampler, parameters: dict[str, Tensor]):
        self._optimizer, self._parameters = optimizer, parameters

    def __getitem__(self, name: str) -> Tensor:
        p = self._parameters[name]
        master = self._optimizer.state[p].get("mean")
        draw = self._optimizer._draw
        mean = p.data if draw is None else draw.means().get(p, p.data)
        return mean if master is None else _followed(master, mean)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _followed(master: Tensor, mean: Tensor) -> Tensor:
    """The master mean; but where the weights are not it, rounded, the user has written them, and they win."""
    return torch.where(master.to(mean.dtype) == mean, master, mean.float())


def _made_by(draw: Draw) -> str:
    return {"automatic": "by a training forward pass", "train": "by train()"}.get(draw.origin, "by " + draw.origin)
