"""The sampling contract that every variational optimizer shares.

A draw θ ~ q is put into the weights, a backward pass leaves the gradient at θ in `p.grad`, and `step()`
turns gradient and noise into an update of the posterior. Four loops do this:

    (a) plain      a training forward of a watched model draws
    (b) context    `with optimizer.sampled_params(train=True): ...`
    (c) closure    `optimizer.step(closure)`
    (d) modes      `optimizer.train()` ... `optimizer.eval()`

The weights are the posterior mean whenever no draw is active.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlearn.optim.average import Average, Contribution
from vlearn.optim.draw import Draw, Slot, blocks, mark_changed
from vlearn.optim.stray import Arrivals
from vlearn.optim.watch import Watch, watchers
from vlearn.posterior import Diagonal
from vlearn.sensitivity.live import Sensitivities

LOOPS = (
    "Use one of the four loops: (a) {name}(model, ...) or optimizer.watch(model), then, with the model in train mode, "
    "zero_grad, forward, backward, step; (b) zero_grad, forward, backward inside "
    "`with optimizer.sampled_params(train=True):`, then step; (c) optimizer.step(closure); "
    "(d) optimizer.train(), then zero_grad, forward, backward, step."
)


class VariationalOptimizer(Optimizer):
    """Base class of the family: draws, the four loops, restoration of the mean, watching.

    A subclass says how a block of parameters is drawn (`_perturb`), what is averaged over draws beside the
    gradient (`_statistic`) and how both update the posterior (`_update`).
    """

    def __init__(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any], generator: torch.Generator | None):
        self.generator = generator
        self.nonfinite_count = 0
        self._forget()
        model = params if isinstance(params, nn.Module) else None
        super().__init__(list(model.named_parameters()) if model is not None else params, defaults)  # pyright: ignore
        if model is not None:
            self.watch(model)

    def _forget(self) -> None:
        """Start without draw and watch; nothing of this is saved."""
        self._draw: Draw | None = None  # waits for step()
        self._average = Average()  # of earlier draws of the same step
        self._spent: Draw | None = None  # the last step's, kept while the watch has its captures
        self._in_context = False
        self._in_closure = False
        self._arrivals = Arrivals(self._gradient_arrived)
        self._watch: Watch | None = None
        self._updates = 0

    # -- what a subclass adds ----------------------------------------------------------------------------

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """Fill `state[p]` before the first draw of p."""
        raise NotImplementedError

    def _perturb(self, group: dict[str, Any], block: list[Slot]) -> None:
        """Write mean + noise into the weights of a block; the buffers hold the mean."""
        raise NotImplementedError

    def _statistic(self, group: dict[str, Any], noise: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """What one draw adds to the average beside its gradient; may overwrite the noise θ - m."""
        raise NotImplementedError

    def _update(
        self, group: dict[str, Any], block: list[Slot], gradients: list[Tensor], statistics: list[Tensor]
    ) -> None:
        """Update the state and the exact means of a block from averages over the step's draws."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if a parameter group's settings break a rule."""
        raise NotImplementedError

    # -- groups and state --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            param_group = _with_betas(param_group, self.defaults)
            self._check_group({**self.defaults, **param_group})
        self._drop_draws()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError(
                    f"{type(self).__name__} has no posterior over complex parameters: use torch.view_as_real."
                )
        try:
            self.num_data  # noqa: B018  differing ess without num_data
        except ValueError:
            self.param_groups.pop()
            raise
        self._arrivals.listen(group["params"])

    @property
    def num_data(self) -> float:
        """Number of training examples N, the scale of sensitivities.

        Raises:
            ValueError: if it was not given and the parameter groups differ in ess.
        """
        given = {group["num_data"] or group["ess"] for group in self.param_groups}
        if len(given) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(given))
            raise ValueError(
                f"ess={listed} differ between parameter groups, so the number of examples is unclear: pass num_data."
            )
        return given.pop()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "generator": self.generator,
            "nonfinite_count": self.nonfinite_count,
            "watch": self._watch,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        whole = "generator" in state  # load_state_dict passes state and param_groups alone
        watch = state.pop("watch", None)
        super().__setstate__(state)
        if whole:
            self._forget()
            for group in self.param_groups:
                self._arrivals.listen(group["params"])
            if watch is not None:
                self._watch = watch.bind(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drop_draws()
        self._updates += 1  # posteriors read from the old state are stale
        super().load_state_dict(state_dict)
        # torch casts the float32 state of a narrower parameter to the parameter's dtype: take it as it was saved.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(saved, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if is_narrow(p) and value.dtype != self.state[p][key].dtype:
                    self.state[p][key] = value.to(device=p.device, copy=True)

    def __del__(self) -> None:
        # An optimizer that goes while its draw is in the weights leaves the mean.
        with suppress(Exception):
            self.unwatch()
            self._drop_draws()

    def _names(self) -> dict[Tensor, str]:
        """Name of every parameter: as given, else as in the watched model, else by position."""
        names: dict[Tensor, str] = {}
        watched = self._watch.names if self._watch is not None else {}
        for group in self.param_groups:
            given = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = given[i] if given else watched.get(p, f"param_{len(names)}")
                names[p] = name.replace("_orig_mod.", "")
        return names

    def moving(self) -> list[Tensor]:
        """The parameters that are drawn: those that require grad."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def next_step(self) -> int:
        """Number of the update that the next gradients will make, from 1."""
        return 1 + max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    def _exact_mean(self, slot: Slot) -> Tensor:
        """The mean of a slot in the precision of the state: the master copy where the weights are narrower."""
        master = self.state[slot.parameter].get("mean")
        return slot.mean if master is None else slot.of(master)

    @staticmethod
    def _state_dtype(p: Tensor) -> torch.dtype:
        return torch.float32 if is_narrow(p) else p.dtype

    def _prepare_states(self) -> None:
        with torch.inference_mode(False):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.requires_grad and not self.state[p]:
                        self._init_state(p, group)
                        if is_narrow(p):
                            self.state[p]["mean"] = p.detach().float()

    # -- draws -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _make_draw(self, origin: str) -> Draw:
        """Put a new draw into the weights; on any exit but the normal one they are the mean."""
        self._prepare_states()
        draw = Draw(origin)
        drawn: list[Slot] = []
        try:
            with torch.inference_mode(False):
                for index, group in enumerate(self.param_groups):
                    self._arrivals.listen(group["params"])
                    for block in blocks(p for p in group["params"] if p.requires_grad):
                        for slot in block:
                            slot.buffer.copy_(slot.weights)
                            slot.mean_in_weights = False
                            drawn.append(slot)
                            self._follow_edit(slot)
                        self._perturb(group, block)
                        draw.blocks.append((index, block))
        except BaseException:
            for slot in drawn:
                slot.drop_draw()
            raise
        mark_changed(draw.parameters)
        return draw

    def _follow_edit(self, slot: Slot) -> None:
        """Where the weights are not the rounded master mean, the user has written them: they win."""
        master = self.state[slot.parameter].get("mean")
        if master is not None:
            rows = slot.of(master)
            rows.copy_(torch.where(rows.to(slot.buffer.dtype) == slot.buffer, rows, slot.buffer.float()))

    def _drop_draws(self) -> None:
        """Forget every draw of this step and put the mean into the weights."""
        draw, self._draw = self._draw, None
        if draw is not None:
            draw.drop()
        self._average, self._spent = Average(), None
        if self._watch is not None:
            self._watch.trace = None  # its weights are gone

    def _begin(self, origin: str) -> None:
        """A new draw that waits for step(), beside finished ones of the same step."""
        draw = self._draw
        if draw is not None and draw.has_gradient:
            if draw.origin in ("automatic", "train"):
                raise RuntimeError(
                    f"a draw made {_made_by(draw)} already has gradients and waits for step(): "
                    "call step() before sampled_params(train=True)."
                )
            if self._is_finite(draw):
                self._sum_up(draw)
            else:  # a step that a gradient scaler skipped
                self.nonfinite_count += 1
                self._average = Average()
            for p in draw.gradients:
                p.grad = None
        if draw is not None:
            self._draw = None
            draw.drop()
        self._draw = self._make_draw(origin)

    def _begin_automatic(self) -> None:
        """What a training forward of a watched model needs: an active draw."""
        draw = self._draw
        self._spent = None
        if self._in_context or self._in_closure:
            return
        if draw is None:
            self._begin("automatic")
        elif draw.origin in ("automatic", "train"):
            draw.resume()
        else:
            raise RuntimeError(
                "a training forward pass outside sampled_params(train=True), but a draw made there waits for step(): "
                "call step() first, or run this pass inside the context."
            )

    def _gradient_of(self, draw: Draw, p: Tensor) -> Tensor | None:
        if not p.requires_grad:
            return None
        if p.grad is not None:
            return p.grad
        kept = draw.gradients.get(p)
        return None if kept is None else kept[0]

    def _keep_gradients(self, draw: Draw) -> None:
        draw.gradients = {p: (p.grad, p.grad._version) for p in draw.parameters if p.grad is not None}

    def _is_finite(self, draw: Draw) -> bool:
        return self._first_nonfinite(draw.parameters, draw) is None

    def _first_nonfinite(self, parameters: list[Tensor], draw: Draw) -> Tensor | None:
        gradients = [(p, g) for p in parameters if (g := self._gradient_of(draw, p)) is not None]
        # A sum is finite only if every term is; it costs a twentieth of isfinite().all().
        sums = [g.sum(dtype=torch.float32 if is_narrow(g) else None) for _, g in gradients]
        if not sums or all(math.isfinite(value) for value in _to_floats(sums)):
            return None
        return next((p for p, g in gradients if not bool(g.isfinite().all())), None)

    def _sum_up(self, draw: Draw) -> None:
        """Add a finished draw's gradient and statistic to the sums, before its buffers go."""
        for p, (gradient, version) in draw.gradients.items():
            if gradient._version != version and not bool(gradient.any()):
                raise RuntimeError(
                    f"the gradient of {self._names()[p]!r} was zeroed in place while its draw waits for step(): "
                    "call optimizer.zero_grad(), or zero_grad(set_to_none=True)."
                )
        blocks_of = ((self.param_groups[index], block) for index, block in draw.blocks)
        self._average.add(c for group, block in blocks_of for c in self._contributions(draw, group, block))

    def _contributions(self, draw: Draw, group: dict[str, Any], block: list[Slot]) -> list[Contribution]:
        """(slot, gradient, statistic) of one draw, for the slots of a block that have a gradient."""
        found = [(slot, g) for slot in block if (g := self._gradient_of(draw, slot.parameter)) is not None]
        if not found:
            return []
        slots = [slot for slot, _ in found]
        exact = [self._exact_mean(slot) for slot in slots]
        gradients = [slot.of(g).to(mean.dtype) for (slot, g), mean in zip(found, exact, strict=True)]
        noise = [slot.sample - mean for slot, mean in zip(slots, exact, strict=True)]
        return list(zip(slots, gradients, self._statistic(group, noise, gradients), strict=True))

    # -- gradients that no draw explains -------------------------------------------------------------------

    def _gradient_arrived(self, p: Tensor) -> bool:
        if self._draw is None or not self._draw.active:
            return False
        self._draw.has_gradient = True
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; gradients of finished draws of this step stay counted."""
        self._arrivals.clear()
        if self._draw is not None and self._draw.gradients:
            for p, (gradient, _) in self._draw.gradients.items():
                if p.grad is gradient:
                    p.grad = None  # the draw keeps it; zeroing in place would lose it
        super().zero_grad(set_to_none)

    # -- the loops ---------------------------------------------------------------------------------------

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """The weights are a draw from the posterior inside, and the mean after any exit.

        Args:
            train: the draw and the gradients computed inside belong to the next `step()`. Entered k times before
                it, k draws are averaged. False: a draw for predicting; nothing is recorded, a draw that waits
                for `step()` is put back as it was.

        Raises:
            RuntimeError: if entered inside another sampled_params, or (train=True) while a draw made in another
                way has gradients and waits for step().
        """
        if self._in_context:
            raise RuntimeError("sampled_params inside sampled_params: leave the first context before entering another.")
        if self._in_closure and train:
            raise RuntimeError("sampled_params(train=True) inside step(closure), which draws itself: use one of them.")
        with self._training_context() if train else self._ensemble_context():
            self._in_context = True
            try:
                yield
            finally:
                self._in_context = False

    @contextmanager
    def _training_context(self) -> Iterator[None]:
        self._begin("context")
        draw = self._draw
        assert draw is not None
        try:
            yield
        except BaseException:
            self._abandon(draw)
            raise
        if self._draw is not draw:  # load_state_dict inside the context has dropped it
            return
        if draw.has_gradient:
            self._keep_gradients(draw)
            draw.finish()
        else:
            self._draw = None
            draw.drop()

    def _abandon(self, draw: Draw) -> None:
        """After an exception: the draw goes, and gradients it left are not a step's."""
        if draw.has_gradient:
            for p in draw.parameters:
                self._arrivals.mark(p)
        if self._draw is draw:
            self._draw = None
        draw.drop()
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

    def train(self) -> None:
        """Put a draw into the weights, or the one that waits for `step()` again: micro-batches share it."""
        if self._in_context:
            raise RuntimeError("train() inside sampled_params, which draws itself: use one of them.")
        if self._draw is not None and self._draw.origin == "context":
            raise RuntimeError(
                "train() while a draw of sampled_params(train=True) waits for step(): call step() first."
            )
        if self._draw is None:
            self._begin("train")
        else:
            self._draw.resume()

    def eval(self) -> None:
        """Put the mean into the weights; a draw made by `train()` or automatically waits for `step()`."""
        if self._in_context:
            raise RuntimeError("eval() inside sampled_params: leave the context, which restores the mean.")
        if self._draw is not None:
            self._draw.finish()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the posterior from every draw since the last step; the weights are its mean afterwards.

        Args:
            closure: computes the loss and its gradients (zero_grad, forward, backward); called `mc_samples`
                times, each under a draw of its own. May return None.
        Returns:
            The closure's loss, averaged over its calls.
        Raises:
            RuntimeError: without a draw, inside sampled_params, or with gradients of no draw.
            FloatingPointError: if a gradient is not finite (`nonfinite="raise"`); state and weights are as before.
        """
        if self._in_context:
            raise RuntimeError("step() inside sampled_params: leave the context first.")
        try:
            loss = self._run(closure) if closure is not None else None
            draw = self._checked_draw(closure is not None)
            if self._may_update(draw):
                self._apply(draw)
        except BaseException:
            self._drop_draws()
            raise
        return loss

    def _run(self, closure: Callable[[], Any]) -> Any:
        if self._draw is not None and self._draw.origin == "context":
            raise RuntimeError(
                "step(closure) while a draw of sampled_params(train=True) waits: call step() without it."
            )
        losses = []
        self._in_closure = True
        try:
            for call in range(self._mc_samples()):
                if call == 0 and self._draw is not None:
                    self._draw.resume()
                else:
                    if call > 0 and self._draw is not None:
                        self._keep_gradients(self._draw)
                    self._begin("closure")
                with torch.enable_grad():
                    losses.append(closure())
        finally:
            self._in_closure = False
        given = [loss for loss in losses if loss is not None]
        return (given[0] if len(given) == 1 else sum(given) / len(given)) if given else None

    def _mc_samples(self) -> int:
        return max(group["mc_samples"] for group in self.param_groups)

    def _checked_draw(self, has_closure: bool) -> Draw:
        draw, stray = self._draw, self._arrivals.stray
        loops = LOOPS.format(name=type(self).__name__)
        if draw is None:
            mode = ""
            if self._watch is not None and not self._watch.model.training:
                mode = " The watched model is in eval mode, where it predicts with the mean: call model.train()."
            raise RuntimeError(f"step() without a draw of the weights.{mode} {loops}")
        if stray is not None:
            raise RuntimeError(
                f"the gradient of {self._names()[stray]!r} comes from a backward pass outside any draw, so it is "
                f"not at the sampled weights: call zero_grad() first. {loops}"
            )
        drawn = set(draw.parameters)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not p.requires_grad:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients ({self._names()[p]!r}): "
                        "use sparse=False."
                    )
                if p not in drawn:
                    raise RuntimeError(
                        f"the gradient of {self._names()[p]!r} comes from outside the draw, which did not have this "
                        f"parameter: call zero_grad() after unfreezing or adding parameters. {loops}"
                    )
        if not has_closure and draw.origin in ("automatic", "train") and self._mc_samples() > 1:
            raise RuntimeError(
                f"mc_samples={self._mc_samples()}, but a step without closure uses one draw: use step(closure), or "
                "enter sampled_params(train=True) that many times."
            )
        return draw

    def _may_update(self, draw: Draw) -> bool:
        """Apply the `nonfinite` rule of the groups."""
        for group in self.param_groups:
            if group["nonfinite"] == "ignore":
                continue
            p = self._first_nonfinite(group["params"], draw)
            if p is None:
                continue
            if group["nonfinite"] == "raise":
                raise FloatingPointError(
                    f"the gradient of {self._names()[p]!r} is not finite; the step was not taken and state and "
                    'weights are as before: lower lr, clip gradients, or pass nonfinite="skip".'
                )
            self.nonfinite_count += 1
            self._drop_draws()
            return False
        return True

    def _apply(self, draw: Draw) -> None:
        keep = self._watch is not None and self._watch.needs_sample
        synchronised = any(group["sync"] for group in self.param_groups) and torch.distributed.is_initialized()
        if synchronised:
            self._sum_up(draw)
            dtypes = [self._state_dtype(p) for p in draw.parameters]
            self._average.over_processes(draw.parameters, dtypes)
        try:
            for index, block in draw.blocks:
                group = self.param_groups[index]
                last = None if synchronised else self._contributions(draw, group, block)
                slots, gradients, statistics = self._average.of(block, last)
                if slots:
                    self._update(group, slots, gradients, statistics)
                for slot in slots:
                    if is_narrow(slot.weights):
                        slot.mean.copy_(self._exact_mean(slot))
                for slot in block:
                    slot.show_mean() if keep else slot.drop_draw()
        finally:
            draw.drop()
            mark_changed(draw.parameters)
            self._draw, self._average, self._spent = None, Average(), draw if keep else None
            self._updates += 1

    # -- the posterior and what is read from it ------------------------------------------------------------

    def posterior(self) -> Diagonal:
        """The posterior as a view of the optimizer's state: no copy, stale after the next step."""
        raise NotImplementedError

    def at_mean(self) -> AbstractContextManager[None]:
        """A context in which the weights are the mean whatever draw is active; it is put back afterwards."""
        return self._draw.at_mean() if self._draw is not None else nullcontext()

    def watch(
        self,
        model: nn.Module,
        loss_reduction: str | Callable[[], float] = "mean",
        loss_scale: float | Callable[[], float] = 1.0,
        every: int = 1,
    ) -> None:
        """Draw in every training forward of the model, and keep what sensitivities need of it.

        Args:
            model: called in the training loop; every submodule gets hooks, so it may also be called in parts.
            loss_reduction: how the loss that `backward()` starts from reduces the examples' own losses: "mean",
                "sum", or a callable that gives the denominator (class weights, unignored targets).
            loss_scale: what that loss is multiplied with beyond this: `1 / k` when it is divided for accumulation,
                `scaler.get_scale`. A callable is read at backward.
            every: keep captures only on every so many steps.
        """
        watch = Watch(model, loss_reduction, loss_scale, every)
        self.unwatch()
        self._unwatch_rivals(model)
        self._watch = watch.bind(self)

    def _unwatch_rivals(self, model: nn.Module) -> None:
        """Two optimizers that both draw the same parameters would draw on top of each other."""
        own = {p for group in self.param_groups for p in group["params"]}
        for other in watchers(model):
            if other is not self and any(p in own for group in other.param_groups for p in group["params"]):
                other.unwatch()
                warnings.warn(
                    f"these parameters were watched by another {type(other).__name__}, which is unwatched now.",
                    stacklevel=4,
                )

    def unwatch(self) -> None:
        """Remove every hook from the watched model; a draw that waits is dropped."""
        if self._watch is not None:
            self._drop_draws()
            self._watch.remove()
            self._watch = None

    def sensitivities(self, deviation: bool = False) -> Sensitivities:
        """Each example's sensitivity, from the training step's own forward and backward pass.

        Σ is the state at the call, the weights are the step's draw. Nothing is computed unless this is called.

        Args:
            deviation: also the change of the model's output if the example were removed, by one more
                forward pass.
        Returns:
            One row per example of the last minibatch.
        Raises:
            RuntimeError: if the model is not watched, no backward pass has come since its last training forward
                pass, or examples have no gradient of their own.
        """
        if self._watch is None:
            raise RuntimeError(
                f"sensitivities() needs a watched model: use {type(self).__name__}(model, ...) or "
                "optimizer.watch(model)."
            )
        return self._watch.sensitivities(deviation)


class MeanView(Mapping[str, Tensor]):
    """Posterior mean by parameter name, wherever it waits while a draw is in the weights."""

    def __init__(self, optimizer: VariationalOptimizer, parameters: dict[str, Tensor]):
        self._optimizer, self._parameters = optimizer, parameters

    def __getitem__(self, name: str) -> Tensor:
        p = self._parameters[name]
        master = self._optimizer.state[p].get("mean")
        draw = self._optimizer._draw
        if master is not None or draw is None:
            return p.data if master is None else master
        slot = next((slot for slot in draw.slots if slot.parameter is p), None)
        return p.data if slot is None or slot.mean_in_weights else slot.whole_buffer

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def is_narrow(tensor: Tensor) -> bool:
    """Whether a floating tensor has fewer than 32 bits, so that its state is kept in float32."""
    return torch.finfo(tensor.dtype).bits < 32


def _to_floats(scalars: list[Tensor]) -> list[float]:
    """Values of scalar tensors with one transfer per device and dtype."""
    alike: dict[tuple, list[Tensor]] = {}
    for scalar in scalars:
        alike.setdefault((scalar.device, scalar.dtype), []).append(scalar)
    return [value for same in alike.values() for value in torch.stack(same).tolist()]


def _made_by(draw: Draw) -> str:
    return {"automatic": "by a training forward pass", "train": "by train()"}.get(draw.origin, "by " + draw.origin)


def _with_betas(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`betas` beside beta1 and beta2, as torch's schedulers want them; either may be given."""
    if "betas" in group:
        beta1, beta2 = group["betas"]
    else:
        beta1, beta2 = group.get("beta1", defaults["beta1"]), group.get("beta2", defaults["beta2"])
    return {**group, "beta1": beta1, "beta2": beta2, "betas": (beta1, beta2)}
