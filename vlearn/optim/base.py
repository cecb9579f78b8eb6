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

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vlearn.capture.separate import check_separate
from vlearn.optim.average import Average
from vlearn.optim.checks import check_first_gradients, checked_draw
from vlearn.optim.draw import Draw, Slot, mark_changed
from vlearn.optim.groups import follow_betas, with_betas
from vlearn.optim.loading import loaded_as_saved
from vlearn.optim.nonfinite import first_nonfinite, is_narrow
from vlearn.optim.sampling import Sampler
from vlearn.optim.watch import Watch, watchers
from vlearn.optim.wrappers import averaged, is_sharded, named_parameters
from vlearn.posterior.base import Posterior
from vlearn.sensitivity.live import Selector, Sensitivities

_RULES = ("ignore", "skip", "raise", "fail")  # of `nonfinite`, the stricter the later; "fail": there is no step


class Part(NamedTuple):
    """A block of slots that have a gradient, and its averages over the step's draws."""

    group: dict[str, Any]
    block: list[Slot]
    gradients: list[Tensor]
    statistics: list[Tensor]


class VariationalOptimizer(Sampler, Optimizer):
    """Base class of the family: draws, the four loops, restoration of the mean, watching.

    A subclass says how a block of parameters is drawn (`_perturb`), what is averaged over draws beside the
    gradient (`_statistic`) and how both update the posterior (`_update`). One that joins parameters works on all
    blocks together instead (`_perturb_all`, `_update_all`).
    """

    _copied: tuple[str, ...] = ()  # attributes of a subclass that copies have too

    def __init__(self, params: nn.Module | Iterable[Any], defaults: dict[str, Any], generator: torch.Generator | None):
        self.generator = generator
        self.nonfinite_count = 0
        self._updates = 0  # of the state, by steps and loads: what a posterior view was read at
        self._steps: int | None = None  # taken so far; None: to be read from the state
        self._watch: Watch | None = None
        self._betas: dict[int, Any] = {}  # of each parameter group, as the last step had them
        self._forget()
        model = params if isinstance(params, nn.Module) else None
        super().__init__(named_parameters(model) if model is not None else params, defaults)  # pyright: ignore
        if model is not None:
            self.watch(model)

    # -- what a subclass adds ----------------------------------------------------------------------------

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """Fill `state[p]` before the first draw of p."""
        raise NotImplementedError

    def _update(
        self, group: dict[str, Any], block: list[Slot], gradients: list[Tensor], statistics: list[Tensor]
    ) -> None:
        """Update the state and the exact means of a block from averages over the step's draws."""
        raise NotImplementedError

    def _update_all(self, parts: Iterator[Part], joint: dict[Any, list[Tensor]]) -> None:
        """Update from the averages of each block; a rule that joins parameters collects the parts first.

        Args:
            joint: what the captures gave that is not of one parameter, by its key: one for each of this process's
                draws that has it.
        """
        for part in parts:
            self._update(*part)

    def _update_compiled(self, draw: Draw, group: dict[str, Any], block: list[Slot], keep: bool) -> bool:
        """As `_update` for a block of one slot and the step's only draw, in one kernel that also shows the mean.

        Args:
            keep: the draw is wanted afterwards, in the buffer.
        Returns:
            False if nothing was done because the block does not fit.
        """
        return False

    def _sums_over_examples(
        self, watch: Watch, wanted: Container[Tensor], weights: dict[Tensor, Tensor]
    ) -> dict[Any, Tensor]:
        """What a rule that needs captures sums over the examples of a pass, by parameter in its shape or by other keys.

        Args:
            watch: has the captures.
            wanted: the parameters that have a gradient.
            weights: the sampled weights of the pass.
        """
        raise NotImplementedError

    def _probes(self) -> bool:
        """Whether a rule wants another gradient of the output sent back beside the loss's."""
        return False

    def _probe(self, watch: Watch, output: Tensor, residual: Tensor) -> Tensor:
        """That gradient, in the output's shape, of each example's own loss.

        Args:
            output: the model's.
            residual: the loss's gradient with respect to it.
        """
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if a parameter group's settings break a rule."""
        raise NotImplementedError

    # -- groups and state --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            param_group = with_betas(param_group, self.defaults)
            self._check_group({**self.defaults, **param_group})
        self._drop_draws()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._betas[len(self.param_groups) - 1] = group["betas"]
        for p in group["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError(
                    f"{type(self).__name__} has no posterior over complex parameters: use torch.view_as_real."
                )
            if is_sharded(p):
                self.param_groups.pop()
                raise TypeError(
                    f"{type(self).__name__} draws whole parameters, but one of shape {tuple(p.shape)} is sharded over "
                    "processes (FSDP, tensor parallelism): use DistributedDataParallel."
                )
        try:
            self.num_data  # noqa: B018  differing ess without num_data
        except ValueError:
            self.param_groups.pop()
            raise
        self._arrivals.listen(group["params"], self._hooked)

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
        copied = {name: getattr(self, name) for name in ("generator", "nonfinite_count", *self._copied)}
        return {**super().__getstate__(), **copied, "watch": self._watch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        whole = "generator" in state  # load_state_dict passes state and param_groups alone
        watch = state.pop("watch", None)
        # What is loaded may have been saved before a setting existed.
        for own, loaded in zip(getattr(self, "param_groups", ()), state["param_groups"], strict=False):
            loaded.update({**own, **with_betas(loaded, own)})
        super().__setstate__(state)
        groups = enumerate(self.param_groups)
        self._betas = {n: g["betas"] for n, g in groups if (g["beta1"], g["beta2"]) == g["betas"]}
        if whole:
            self._updates, self._steps, self._watch = 0, None, None
            self._forget()
            for group in self.param_groups:
                self._arrivals.listen(group["params"], self._hooked)
            if watch is not None:
                self._watch = watch.bind(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drop_draws()
        self._updates += 1
        self._steps = None
        with loaded_as_saved(self):
            super().load_state_dict(state_dict)

    def __del__(self) -> None:
        # An optimizer that goes while its draw is in the weights leaves the mean.
        if self._itself is self:
            with suppress(Exception):
                self.unwatch()
                self._drop_draws()

    @property
    def _itself(self) -> VariationalOptimizer:
        """The optimizer, also where self is Lightning's wrapper, which runs our methods on a class made of ours."""
        return vars(self).get("_optimizer", self)

    def __setattr__(self, name: str, value: Any) -> None:
        # The wrapper hands reads on to the optimizer, but not writes.
        owner = self._itself
        object.__setattr__(owner if owner is self or name in vars(owner) else self, name, value)

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

    def _every_parameter(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def moving(self) -> list[Tensor]:
        """The parameters that are drawn: those that require grad."""
        return [p for p in self._every_parameter() if p.requires_grad]

    def next_step(self) -> int:
        """Number of the update that the next gradients will make, from 1."""
        if self._steps is None:
            self._steps = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        return self._steps + 1

    @staticmethod
    def _state_dtype(p: Tensor) -> torch.dtype:
        return torch.float32 if is_narrow(p) else p.dtype

    def _prepare_states(self) -> None:
        with torch.inference_mode(False):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.requires_grad and not self.state[p]:
                        self._init_state(p, group)
                    # The model may have been cast, or the state saved by a run of another dtype.
                    if self.state.get(p) and is_narrow(p) != ("mean" in self.state[p]):
                        if is_narrow(p):
                            means = {} if self._draw is None else self._draw.means()
                            self.state[p]["mean"] = (means[p] if p in means else p).detach().float()
                        else:
                            del self.state[p]["mean"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; gradients of finished draws of this step stay counted."""
        self._settle()
        self._arrivals.clear()
        if self._draw is not None and self._draw.gradients:
            for p, (gradient, _) in self._draw.gradients.items():
                if p.grad is gradient:
                    p.grad = None  # the draw keeps it; zeroing in place would lose it
        super().zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler reads before it unscales and steps: we leave the unscaling to it, if it can."""
        if self._average.count:
            raise RuntimeError(
                f"a gradient scaler unscales the last of {self._average.count + 1} draws alone: with it, enter "
                "sampled_params(train=True) once per step, or use loop (a) or (d)."
            )
        return False

    # -- the loops ---------------------------------------------------------------------------------------

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
        self._settle()
        try:
            loss, finite = self._run(closure) if closure is not None else (None, True)
            draw = self._checked_draw(closure is not None) if finite else None
            if draw is not None:
                self._apply(draw)
        except BaseException:
            self._drop_draws()
            raise
        return loss

    def _run(self, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """(average loss, False if the step is to be skipped for a gradient that is not finite)."""
        if self._draw is not None and self._draw.origin == "context":
            return self._run_after_contexts(closure), True
        check_first_gradients(self)
        losses: list[Any] = []
        self._in_closure = True
        try:
            for call in range(self._mc_samples()):
                if call > 0:
                    draw = self._checked_draw(True)
                    if draw is None:
                        return _average_loss(losses), False
                    self._keep_gradients(draw)
                if call == 0 and self._draw is not None:
                    self._draw.resume()  # a watched model's pending draw
                    self._draw.origin = "closure"
                else:
                    self._begin("closure")
                with torch.enable_grad():
                    losses.append(closure())
        finally:
            self._in_closure = False
        return _average_loss(losses), True

    def _run_after_contexts(self, closure: Callable[[], Any]) -> Any:
        """The draws are made; Lightning still passes a closure, one that does nothing, where users call step()."""
        with torch.enable_grad():
            loss = closure()
        if self._arrivals.stray is not None:
            raise RuntimeError(
                "step(closure) while a draw of sampled_params(train=True) waits: call step() without it."
            )
        return loss

    def _mc_samples(self) -> int:
        return max(group["mc_samples"] for group in self.param_groups)

    def _checked_draw(self, has_closure: bool) -> Draw | None:
        """The draw to update from; None if the `nonfinite` rule of the groups is to skip the step.

        Raises:
            RuntimeError, FloatingPointError: where this process has no step, or another whose step is the same.
        """
        draw, found, rule, problem = None, None, "ignore", None
        try:
            draw = checked_draw(self, has_closure)
            for group in self.param_groups:
                if group["nonfinite"] != "ignore":
                    p = first_nonfinite((p, self._gradient_of(draw, p)) for p in group["params"])
                    if p is not None and rule != "raise":
                        found, rule = p, group["nonfinite"]
        except Exception as error:
            if self._draw is None:
                raise  # the others may not be at step()
            rule, problem = "fail", error
        rule = _RULES[self._agreed(_RULES.index(rule), at_step=True)]
        if problem is not None:
            raise problem
        if rule == "fail":
            raise RuntimeError("another process has no step to take, which its own error explains: none was taken.")
        if rule == "raise":
            where = repr(self._names()[found]) if found is not None else "a parameter in another process"
            raise FloatingPointError(
                f"the gradient of {where} is not finite; the step was not taken and state and "
                'weights are as before: lower lr, clip gradients, or pass nonfinite="skip".'
            )
        if rule == "skip":
            self.nonfinite_count += 1
            self._drop_draws()
            return None
        return draw

    def _apply(self, draw: Draw) -> None:
        follow_betas(self.param_groups, self._betas)
        keep = self._watch is not None and self._watch.needs_sample
        synchronised = self._over_processes("sync")
        if synchronised:
            self._sum_up(draw)
            self._average.over_processes(self._every_parameter(), self._state_dtype, self._names, self._has_statistic)
        elif draw.captured is not None:
            self._average.add_joint(draw.captured.joint())
        try:
            self._update_all(self._parts(draw, keep, synchronised), self._average.joint)
        finally:
            draw.drop()
            mark_changed(draw.parameters)
            self._draw, self._average, self._spent = None, Average(), draw if keep else None
            if not keep:
                self._buffers = draw.reusable_buffers()
            self._updates += 1
            self._steps = None if self._steps is None else self._steps + 1

    def _parts(self, draw: Draw, keep: bool, synchronised: bool) -> Iterator[Part]:
        """Each block with its averages over the step's draws; when the next is asked for, the mean is in the weights.

        Args:
            keep: the draw is wanted afterwards, in the buffers.
            synchronised: the averages hold every draw, of all processes.
        """
        for index, block in draw.blocks:
            group = self.param_groups[index]
            own = draw.local is not None and draw.local.reduced(block[0].parameter)  # p.grad is not the draw's own
            single = not (synchronised or own or self._average.count) and group.get("compiled", False)
            if single and self._update_compiled(draw, group, block, keep):
                continue
            last = None if synchronised else self._contributions(draw, group, block)
            slots, gradients, statistics = self._average.of(block, last)
            if slots and draw.captured is not None and not draw.captured.count:
                # As it is: an average would count draws in which a parameter has no gradient as zero.
                statistics = self._statistic(draw, group, slots, [], gradients)
            elif slots and not synchronised:
                statistics = self._average_statistics(draw, slots, statistics)
            if slots:
                yield Part(group, slots, gradients, statistics)
            self._round_means(slots)
            for slot in block:
                slot.show_mean() if keep else slot.drop_draw()

    def _average_statistics(self, draw: Draw, slots: list[Slot], statistics: list[Tensor]) -> list[Tensor]:
        """Averages over the processes whose gradients are averaged already."""
        there = [i for i, slot in enumerate(slots) if self._has_statistic(slot.parameter)]
        own = [statistics[i] for i in there]
        if own and draw.local is not None:
            own = self._wrappers.average([slots[i] for i in there], own)
        elif own and draw.captured is not None and self._over_processes("shared_noise"):  # each process's own examples
            own = averaged(own, self._wrappers.group_of(self.moving()))
        found = dict(zip(there, own, strict=True))
        return [found.get(i, statistic) for i, statistic in enumerate(statistics)]

    def _round_means(self, block: list[Slot]) -> None:
        """Write the exact means of narrower weights into them."""
        for slot in block:
            if is_narrow(slot.weights):
                slot.mean.copy_(self._exact_mean(slot))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _collect(self) -> None:
        draw, watch = self._draw, self._watch
        captured = None if draw is None else draw.captured
        if draw is None or captured is None or watch is None or not watch.has_uncollected:
            return
        watch.collected = True
        samples = draw.samples()
        try:
            trace = watch.checked_trace()
            if not trace.num_examples:
                raise ValueError("the minibatch has none. Leave it out.")
            weights = {p: samples.get(p, p.data) for p in trace.tracked}
            with torch.autocast(next(iter(samples)).device.type, enabled=False):
                wanted = {p for p in draw.parameters if self._gradient_of(draw, p) is not None}
                sums = self._sums_over_examples(watch, wanted, weights)
            check_separate(trace, weights)
            captured.add(sums, trace.num_examples)
        except (RuntimeError, ValueError) as error:  # for step() to raise: the training pass itself can go on
            captured.problem = error

    def _forget_zeroed_passes(self) -> None:
        """A backward pass begins: where gradients have been zeroed, the passes that they came from do not count."""
        captured = None if self._draw is None else self._draw.captured
        if captured is not None and all(p.grad is None or not bool(p.grad.any()) for p in self._draw.parameters):  # pyright: ignore
            captured.clear()

    # -- the posterior and what is read from it ------------------------------------------------------------

    def posterior(self) -> Posterior:
        """The posterior as a view of the optimizer's state: no copy, stale after the next step."""
        raise NotImplementedError

    def _staleness(self) -> Callable[[], None]:
        """A check for views of the state: raises once the state has moved on."""
        updates = self._updates

        def check() -> None:
            if self._updates != updates:
                raise RuntimeError(
                    "this posterior is stale, the optimizer has stepped since: call optimizer.posterior() again, or "
                    "keep one with .clone()."
                )

        return check

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
            loss_reduction: how the loss that `backward()` starts from reduces the examples' own losses: "mean" (over
                the minibatch, or over the `num_items_in_batch` that Hugging Face's Trainer calls the model with),
                "sum", or a callable that gives the denominator (class weights, unignored targets).
            loss_scale: what that loss is multiplied with beyond this: `1 / k` when it is divided for accumulation,
                `scaler.get_scale`. A callable is read at backward.
            every: keep captures only on every so many steps.
        """
        wrapped = isinstance(model, nn.Module) and self._wrappers.add(model.modules(), self._every_parameter())
        if wrapped and any(group["sync"] for group in self.param_groups):
            raise ValueError(
                "sync=True, but DistributedDataParallel averages the gradients: drop sync=True, or the wrapper."
            )
        watch = Watch(model, loss_reduction, loss_scale, every)
        self.unwatch()
        self._unwatch_rivals(model)
        self._watch = watch.bind(self._itself)

    def _unwatch_rivals(self, model: nn.Module) -> None:
        """Two optimizers that both draw the same parameters would draw on top of each other."""
        own = set(self._every_parameter())
        for other in watchers(model):
            if other is not self._itself and any(p in own for group in other.param_groups for p in group["params"]):
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

    def sensitivities(
        self, deviation: bool = False, output: Selector = None, examples: Tensor | Sequence[int] | slice | None = None
    ) -> Sensitivities:
        """Each example's sensitivity, from the training step's own forward and backward pass.

        Σ is the state at the call, the weights are the step's draw. Nothing is computed unless this is called.

        Args:
            deviation: also the change of the model's output if the example were removed, by one more
                forward pass.
            output: which of several outputs residual, prediction error and deviation speak of: a key, an index or
                a callable of the whole output. The self-influence is that of the whole loss.
            examples: which of the minibatch's examples, as numbers ``[K]``, a slice or a mask; default all. The cost
                falls with their number.
        Returns:
            One row per example of the last minibatch, or of those of it that were asked for, in their order.
        Raises:
            RuntimeError: if the model is not watched, no backward pass has come since its last training forward
                pass, or examples have no gradient of their own.
            ValueError: if `output` selects no tensor that the loss depends on, or is None and there are several; if
                `examples` are not different numbers of examples of the minibatch.
        """
        if self._watch is None:
            raise RuntimeError(
                f"sensitivities() needs a watched model: use {type(self).__name__}(model, ...) or "
                "optimizer.watch(model)."
            )
        return self._watch.sensitivities(deviation, output, examples)


def _average_loss(losses: list[Any]) -> Any:
    given = [loss for loss in losses if loss is not None]
    return (given[0] if len(given) == 1 else sum(given) / len(given)) if given else None
