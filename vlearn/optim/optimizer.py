"""The base class of the variational optimizers: what they show to torch and to the user.

A draw θ ~ q is put into the weights, a backward pass leaves the gradient at θ in `p.grad`, and `step()`
turns gradient and noise into an update of the posterior. Four loops do this:

    (a) plain      a training forward of a watched model draws
    (b) context    `with optimizer.sampled_params(train=True): ...`
    (c) closure    `optimizer.step(closure)`
    (d) modes      `optimizer.train()` ... `optimizer.eval()`

The weights are the posterior mean whenever no draw is active. An optimizer is a structure (how the precision is kept),
a curvature (where it is learned from) and an update (how both move the mean); it owns a sampler, which makes the draws,
and a watch, if a model is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from vlearn._torch_internals import is_flattened
from vlearn._warnings import warn_user
from vlearn.capture.names import named_parameters
from vlearn.capture.pytrees import Selector
from vlearn.collectives import averaged
from vlearn.gaussians.gaussian import Gaussian
from vlearn.losses.example_loss import LossFunction
from vlearn.optim.diagnostics.diagnostics import Diagnostics, diagnose
from vlearn.optim.diagnostics.measurements import measure
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.kernels.nonfinite import first_nonfinite, is_low_precision
from vlearn.optim.parameters.options import follow_betas, with_betas
from vlearn.optim.parameters.parameters import Parameters, state_dtype
from vlearn.optim.parameters.state_dict import kind_of, loaded_as_saved
from vlearn.optim.sampling.blocks import ParameterSlice, SliceBlock, discard_draws, swap_in_means
from vlearn.optim.sampling.draw import Draw, Origin
from vlearn.optim.sampling.protocols import Curvature, PosteriorContext, Structure
from vlearn.optim.sampling.sampler import Context, Sampler
from vlearn.optim.step_checks import check_capture, check_first_gradients, check_passes, is_primed, waiting_draw
from vlearn.optim.structures.prior import parameters_of_prior
from vlearn.optim.updates.block_update import BlockUpdate
from vlearn.optim.updates.curvature import PassCurvature
from vlearn.optim.updates.hessian_noise import LIMIT, NOISE, add_noise_of_shards, hessian_noise, start_noise
from vlearn.optim.watch.loss_scale import WatchOptions, check_batch_norm
from vlearn.optim.watch.model_search import ModelSearch
from vlearn.optim.watch.watch import Watch, watches
from vlearn.per_example.measured_rows import ExampleIndex
from vlearn.sensitivity.live import Sensitivities, live_sensitivities
from vlearn.sharded.tensors import is_dtensor

# Outcomes of the checks before a step in rising severity; "fail" means that this process cannot step.
_RULES = ("ignore", "skip", "raise", "fail")

S = TypeVar("S", bound=Structure)
P = TypeVar("P", bound=Gaussian)  # the posterior that S gives


@dataclass
class _Runtime(Generic[S]):
    """What an optimizer owns beside groups and state, and does not save.

    One object: wrappers that copy an optimizer's attributes, as Lightning's does, share it.

    Attributes:
        search: for the model of an optimizer that was made from parameters.
        found_watch: whether the watch is of a model that the search has found.
        betas: those that each parameter group had after the last step, by its number.
    """

    parameters: Parameters
    structure: S
    curvature: Curvature
    sampler: Sampler
    search: ModelSearch
    watch: Watch | None = None
    found_watch: bool = False
    betas: dict[int, Any] = field(default_factory=dict)


class VariationalOptimizer(Optimizer, Generic[S, P]):
    """Base class of the family: the four loops, groups and state, watching, and what is read from the posterior.

    A subclass names its structure and curvature, and updates the state of a block of parameters from averages over the
    step's draws (`_update_block`), or of all of them together (`_update_jointly`).
    """

    _copied: tuple[str, ...] = ()  # attributes of a subclass that copies have too
    _takes_complex = False  # parameters, as pairs of reals
    _takes_prior = False  # its update has `Decay` in the place of weight_decay
    _takes_shards = False  # parameters of which each process has a part

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        generator: torch.Generator | None,
        batch_norm: str = "refuse",
    ):
        prior = defaults.pop("prior", None)
        self._check_group(defaults)
        check_batch_norm(batch_norm)
        self._batch_norm = batch_norm
        self._runtime = self._new_runtime(generator)
        model = params if isinstance(params, nn.Module) else None
        super().__init__(named_parameters(model) if model is not None else params, defaults)  # pyright: ignore
        if prior is not None:
            try:
                self._take_prior(prior, self._parameters.every(), whole=True)
            except Exception:
                self._runtime.search.stop()
                raise
        if model is not None:
            self.watch(model)

    # -- what a subclass adds ----------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if a parameter group's settings break a rule."""
        raise NotImplementedError

    def _new_structure(self, parameters: Parameters, processes: Processes) -> S:
        """How the posterior precision is kept."""
        raise NotImplementedError

    def _new_curvature(self, structure: S) -> Curvature:
        """What is averaged over draws beside the gradient."""
        raise NotImplementedError

    def _update_block(self, update: BlockUpdate) -> BlockUpdate | None:
        """Update the state and the exact means of parameters that are independent of other blocks; return the rest."""
        raise NotImplementedError

    def _prepare_update(self, draw: Draw, layer_statistics: dict[Any, list[Tensor]]) -> Any:
        """Do what must come before the first block is updated; the result is for `_update_jointly`.

        Args:
            layer_statistics: what the recorded passes gave that belongs to no parameter alone, by key: one for each of
                this process's draws that has it.
        """

    def _update_jointly(self, updates: list[BlockUpdate], prepared: Any) -> None:
        """Update what `_update_block` has left over; the weights are the mean by now."""

    def _update_compiled(self, draw: Draw, block: SliceBlock, keep: bool) -> bool:
        """As `_update_block` for a block of one slice and the step's only draw, in one kernel that also shows the mean.

        Args:
            keep: the draw is wanted afterwards, in the buffer.
        Returns:
            False if nothing was done because the block does not fit.
        """
        return False

    # -- what it owns ------------------------------------------------------------------------------------

    def _new_runtime(self, generator: torch.Generator | None) -> _Runtime[S]:
        parameters = Parameters(type(self).__name__)
        processes = Processes(parameters)
        structure = self._new_structure(parameters, processes)
        curvature = self._new_curvature(structure)
        processes.average_passes = curvature.needs_pass
        sampler = Sampler(parameters, processes, structure, curvature, generator)
        own = ref(self)

        def is_open() -> bool:
            waits = sampler.draw is not None and not sampler.draw.is_automatic
            return sampler.context is Context.NONE and not waits

        def found(module: nn.Module, args: Any, kwargs: Any) -> None:
            optimizer = own()
            if optimizer is not None:
                optimizer._watch_found(module, args, kwargs)

        return _Runtime(parameters, structure, curvature, sampler, ModelSearch(is_open, parameters.every, found))

    @property
    def _parameters(self) -> Parameters:
        return self._runtime.parameters

    @property
    def _structure(self) -> S:
        return self._runtime.structure

    @property
    def _sampler(self) -> Sampler:
        return self._runtime.sampler

    @property
    def _watch(self) -> Watch | None:
        watch = self._runtime.watch
        return None if watch is None or watch.removed else watch

    @property
    def generator(self) -> torch.Generator | None:
        """The generator of the noise; None for torch's global ones."""
        return self._sampler.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self._sampler.generator = generator

    @property
    def nonfinite_count(self) -> int:
        """The number of steps that were skipped for a gradient that was not finite."""
        return self._sampler.num_skipped

    # -- groups and state --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch: settings that are missing are the optimizer's defaults. A draw that waits is dropped.

        Parameters without names have those of the watched model, where the others have names too. A `prior` in the
        group is that of its own parameters; the optimizer's `prior=` is not one of the defaults.

        Raises:
            ValueError, TypeError: if a setting breaks its rule, or a parameter is complex, sharded or has no shape yet.
        """
        prior = None
        if isinstance(param_group, dict):
            param_group = with_betas(param_group, self.defaults)
            prior = param_group.pop("prior", None)
            self._check_group({**self.defaults, **param_group})
            param_group["params"] = self._named_as_in_model(param_group["params"])
        self._parameters.attach(self.param_groups, self.state)
        self._sampler.discard()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for p in group["params"]:
                self._check_parameter(p)
            self._parameters.num_data  # noqa: B018  differing ess without num_data
            if prior is not None:
                self._take_prior(prior, group["params"], whole=False)
        except Exception:
            self.param_groups.pop()
            raise
        self._runtime.betas[len(self.param_groups) - 1] = group["betas"]
        self._sampler.follow_gradients(group["params"])
        self._runtime.search.start(group["params"])

    def _named_as_in_model(self, params: Any) -> Any:
        """Parameters of a new group with their names in the watched model, if the first group has names."""
        if self._watch is None or "param_names" not in self.param_groups[0] or isinstance(params, set):
            return params
        given = [params] if isinstance(params, Tensor) else list(params)
        if not all(isinstance(p, Tensor) for p in given):
            return given
        names, count = {p: name for name, p in named_parameters(self._watch.model)}, len(self._parameters.every())
        return [(names.get(p, f"param_{number}"), p) for number, p in enumerate(given, count)]

    def _take_prior(self, prior: Any, candidates: list[Tensor], whole: bool) -> None:
        """Put a prior into the state of parameters that have none yet.

        Args:
            candidates: the parameters that may be meant.
            whole: all that the prior knows must be among them.
        Raises:
            TypeError, ValueError, RuntimeError: if it cannot be used; nothing has changed then.
        """
        if not self._takes_prior:
            raise TypeError(f"{type(self).__name__} takes no prior but that of its weight_decay: use IVON or VON.")
        found = parameters_of_prior(self._parameters, prior, candidates, whole)
        named = {name: p for name, p in found.items() if not self._parameters.has_prior(p)}
        for p, state in self._structure.take_prior(prior, named).items():
            self.state[p].update(state)

    def _check_parameter(self, p: Tensor) -> None:
        if is_lazy(p):
            raise ValueError(
                "a parameter has no shape yet, as of nn.LazyLinear before its first forward pass, and no posterior "
                "either: run the model on one batch first, with torch.no_grad(): model(x), then make the optimizer."
            )
        if p.is_complex() and not self._takes_complex:
            raise TypeError(
                f"{type(self).__name__} learns from gradients of single examples, which complex parameters do not have "
                'here: use IVON or VON(curvature="price"), or hold them as pairs of reals (torch.view_as_real).'
            )
        if is_flattened(p):
            raise TypeError(
                "a parameter is part of what FullyShardedDataParallel has flattened, in which parameters cannot be "
                "told apart: use fully_shard (FSDP2)."
            )
        if is_dtensor(p):
            self._check_sharded(p)

    def _check_sharded(self, p: Tensor) -> None:
        name = type(self).__name__
        if not self._takes_shards:
            raise TypeError(
                f"{name} learns from whole gradients, or those of single examples, but a parameter of shape "
                f"{tuple(p.shape)} is sharded over processes (fully_shard, tensor parallelism): use IVON, EVON, VAdamW "
                'or VON(curvature="price"), or DistributedDataParallel.'
            )
        if p.is_complex():
            raise TypeError(f"{name} takes no complex parameter that is sharded: hold it as pairs of reals.")
        if any(placement.is_partial() for placement in p.placements):  # pyright: ignore
            raise TypeError(f"a parameter of shape {tuple(p.shape)} is the sum of Partial ones: redistribute it.")

    @property
    def num_data(self) -> float:
        """The number of training examples N, the scale of sensitivities.

        Raises:
            ValueError: if it was not given and the parameter groups differ in ess.
        """
        return self._parameters.num_data

    def __getstate__(self) -> dict[str, Any]:
        copied = {name: getattr(self, name) for name in self._copied}
        counters = {"generator": self.generator, "num_skipped": self.nonfinite_count, "_batch_norm": self._batch_norm}
        return {**super().__getstate__(), **copied, **counters, "watch": self._watch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        whole = "generator" in state  # load_state_dict passes state and param_groups alone
        generator, skipped, watch = (state.pop(name, None) for name in ("generator", "num_skipped", "watch"))
        # What is loaded may have been saved before a setting existed.
        for own, loaded in zip(getattr(self, "param_groups", ()), state["param_groups"], strict=False):
            loaded.update({**own, **with_betas(loaded, own)})
        super().__setstate__(state)
        if whole:
            self._runtime = self._new_runtime(generator)
            self._sampler.num_skipped = skipped
        self._parameters.attach(self.param_groups, self.state)
        groups = enumerate(self.param_groups)
        self._runtime.betas = {n: g["betas"] for n, g in groups if (g["beta1"], g["beta2"]) == g["betas"]}
        if whole:
            self._sampler.follow_gradients(self._parameters.every())
            self._bind(watch)
            if watch is None:
                self._runtime.search.start(self._parameters.every())

    def state_dict(self) -> dict[str, Any]:
        """As in torch, beside which "optimizer" is the name of the class, by which `load_state_dict` knows its own."""
        return {**super().state_dict(), "optimizer": kind_of(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. A draw that waits is dropped; float32 state of narrower parameters stays float32.

        Raises:
            ValueError: if it is another optimizer's, or of parameters of other shapes.
        """
        self._sampler.discard()
        self._parameters.count_load()
        with loaded_as_saved(self):
            super().load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; gradients of finished draws of this step stay counted."""
        self._sampler.zero_grad()
        super().zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler reads before it unscales and steps: we leave the unscaling to it, if it can."""
        count = self._sampler.average.count
        if count:
            raise RuntimeError(
                f"a gradient scaler unscales the last of {count + 1} draws alone: with it, enter "
                "sampled_params(train=True) once per step, or use loop (a) or (d)."
            )
        return False

    # -- the loops ---------------------------------------------------------------------------------------

    def sampled_params(self, train: bool = False) -> AbstractContextManager[None]:
        """A context in which the weights are a draw from the posterior; they are the mean after any exit.

        Args:
            train: the draw and the gradients computed inside belong to the next `step()`. Entered k times before
                it, k draws are averaged (do not divide their losses by k); clip gradients inside each, and use no
                gradient scaler with k > 1. False: a draw for predicting; nothing is recorded, a draw that waits
                for `step()` is put back as it was.

        Raises:
            RuntimeError: if entered inside another sampled_params, or (train=True) while a draw made in another
                way has gradients and waits for step().
        """
        if train:
            self._leave_loop_to_user()
        return self._sampler.sampled(train)

    def train(self) -> None:
        """Put a draw into the weights, or the one that waits for `step()` again: micro-batches share it.

        Raises:
            RuntimeError: inside sampled_params, or while a draw made there waits for step().
        """
        self._leave_loop_to_user()
        self._sampler.train()

    def eval(self) -> None:
        """Put the mean into the weights; a draw made by `train()` or automatically waits for `step()`.

        Raises:
            RuntimeError: inside sampled_params.
        """
        self._sampler.eval()

    def at_mean(self) -> AbstractContextManager[None]:
        """A context in which the weights are the mean whatever draw is active; it is put back afterwards."""
        return self._sampler.at_mean()

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
        sampler = self._sampler
        if sampler.context is not Context.NONE:
            raise RuntimeError("step() inside sampled_params: leave the context first.")
        check_capture(self.param_groups)
        sampler.recover()
        if closure is not None and self._watch is None:
            self._runtime.search.stop()
        if closure is None and is_primed(sampler):
            sampler.init_states()
            for group in self.param_groups:
                if group.get("curvature", getattr(self, "curvature", None)) == "price":
                    start_noise(self._parameters, group)
            return None
        try:
            loss, finite = self._run_closure(closure) if closure is not None else (None, True)
            draw = self._checked_draw(closure is not None) if finite else None
            if draw is not None:
                self._apply(draw)
        except BaseException:
            sampler.discard()
            raise
        return loss

    def _run_closure(self, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """(average loss, False if the step is to be skipped for a gradient that is not finite)."""
        sampler = self._sampler
        if sampler.draw is not None and sampler.draw.origin is Origin.CONTEXT:
            return self._run_after_contexts(closure), True
        check_first_gradients(sampler)
        losses: list[Any] = []
        sampler.in_closure = True
        try:
            for call in range(self._parameters.mc_samples):
                if call > 0:
                    draw = self._checked_draw(True)
                    if draw is None:
                        return _average_loss(losses), False
                    draw.keep_gradients()
                sampler.begin_closure(first=call == 0)
                with torch.enable_grad():
                    losses.append(closure())
        finally:
            sampler.in_closure = False
        return _average_loss(losses), True

    def _run_after_contexts(self, closure: Callable[[], Any]) -> Any:
        """The draws are made; Lightning still passes a closure, one that does nothing, where users call step()."""
        with torch.enable_grad():
            loss = closure()
        if self._sampler.gradient_outside_draw is not None:
            raise RuntimeError(
                "step(closure) while a draw of sampled_params(train=True) waits: call step() without it."
            )
        return loss

    def _checked_draw(self, has_closure: bool) -> Draw | None:
        """The draw to update from; None if the `nonfinite` rule of the groups is to skip the step.

        Raises:
            RuntimeError, FloatingPointError: where this process has no step, or another whose step is the same.
        """
        sampler = self._sampler
        draw, nonfinite, rule, problem = None, None, "ignore", None
        try:
            draw = waiting_draw(sampler, self._watch, has_closure)
            draw.place_gradients()
            sampler.check_local_gradients(draw)
            if self._watch is not None:
                self._watch.collect()
            check_passes(draw, self._parameters, self._watch)
            nonfinite, rule = self._first_nonfinite(draw)
        except Exception as error:
            if sampler.draw is None:
                raise  # the others may not be at step()
            rule, problem = "fail", error
        rule = _RULES[sampler.processes.agree_on(_RULES.index(rule), at_step=True)]
        if problem is not None:
            raise problem
        if rule == "fail":
            raise RuntimeError("step() failed on another rank (see its traceback); no rank was updated.")
        if rule == "raise":
            name = (
                repr(self._parameters.names()[nonfinite]) if nonfinite is not None else "a parameter in another process"
            )
            raise FloatingPointError(
                f"the gradient of {name} is not finite; the step was not taken and state and "
                'weights are as before: lower lr, clip gradients, or pass nonfinite="skip".'
            )
        if rule == "skip":
            sampler.num_skipped += 1
            sampler.discard()
            return None
        return draw

    def _first_nonfinite(self, draw: Draw) -> tuple[Tensor | None, str]:
        """A parameter whose gradient is not finite, and the gravest of the rules for those; None and "ignore"."""
        checked = {p: g["nonfinite"] for g in self.param_groups if g["nonfinite"] != "ignore" for p in g["params"]}
        gradients = {p: draw.gradient_of(p) for p in checked}
        found = first_nonfinite(gradients.items())
        if found is None:
            return None, "ignore"
        grave = first_nonfinite((p, gradient) for p, gradient in gradients.items() if checked[p] == "raise")
        return (found, "skip") if grave is None else (grave, "raise")

    def _apply(self, draw: Draw) -> None:
        """Update state and means from the draw that waits and the averages of the earlier ones."""
        sampler, structure = self._sampler, self._structure
        follow_betas(self.param_groups, self._runtime.betas)
        self._parameters.noise_of_shards.clear()  # of a step that failed
        keep = self._watch is not None and self._watch.needs_draw
        synchronised = sampler.processes.several_with("sync")
        if synchronised:
            sampler.sum_up(draw)
            every = self._parameters.every()
            sampler.average.average_over_processes(every, state_dtype, self._parameters.names, structure.has_curvature)
        elif draw.pass_sums is not None and draw.pass_sums.count:
            sampler.average.add_layer_statistics(draw.pass_sums.layer_statistics())
        try:
            prepared = self._prepare_update(draw, sampler.average.layer_statistics)
            joint: list[BlockUpdate] = []
            for block in draw.blocks:
                rest = self._apply_to_block(draw, block, keep, synchronised)
                if rest is not None:
                    joint.append(rest)
            self._update_jointly(joint, prepared)
            for update in joint:
                self._write_means(update.slices)
            if self._parameters.noise_of_shards:
                add_noise_of_shards(self._parameters, sampler.processes.mesh)
        finally:
            sampler.consume(draw, keep)
            self._parameters.count_step()

    def _apply_to_block(self, draw: Draw, block: SliceBlock, keep: bool, synchronised: bool) -> BlockUpdate | None:
        """Update one block as far as it is independent of the others, put its mean into the weights; return the rest.

        Args:
            keep: the draw is wanted afterwards, in the buffers.
            synchronised: the averages hold every draw, of all processes.
        """
        average, local = self._sampler.average, draw.local_gradients
        # Under DistributedDataParallel p.grad is not the draw's own.
        reduced = local is not None and local.reduced(block.slices[0].parameter)
        only_draw = not (synchronised or reduced or average.count)
        if only_draw and block.group.get("compiled", False) and self._update_compiled(draw, block, keep):
            return None
        last = None if synchronised else self._sampler.contributions(draw, block)
        slices, gradients, curvatures = average.of(block.slices, last)
        rest = None
        if slices:
            present = [c for c in curvatures if c is not None] if _learns(draw) else []
            if present and not synchronised:
                present = self._over_processes(draw, slices, present)
            rest = self._update_block(BlockUpdate(block.group, slices, gradients, present or None))
            self._write_means(slices)
        (swap_in_means if keep else discard_draws)(block.slices)
        return rest

    def _over_processes(self, draw: Draw, slices: list[ParameterSlice], curvatures: list[Tensor]) -> list[Tensor]:
        """Averages of curvature estimates over the processes whose gradients are averaged already."""
        processes, has_curvature = self._sampler.processes, self._structure.has_curvature
        places = [i for i, piece in enumerate(slices) if has_curvature(piece.parameter)]
        own = [curvatures[i] for i in places]
        if own and draw.local_gradients is not None:
            own = processes.ddp.average([slices[i].parameter for i in places], own)
        elif own and draw.pass_sums is not None and processes.several_with("shared_noise"):  # each its own examples
            own = averaged(own, processes.ddp.group_of(self._parameters.trainable()))
        at_place = dict(zip(places, own, strict=True))
        return [at_place.get(i, curvature) for i, curvature in enumerate(curvatures)]

    def _write_means(self, slices: list[ParameterSlice]) -> None:
        """Write the exact means of weights of lower precision into them."""
        if slices and is_low_precision(slices[0].weights):
            torch._foreach_copy_(
                [piece.mean for piece in slices], [piece.exact_mean(self._parameters) for piece in slices]
            )

    # -- the posterior and what is read from it ------------------------------------------------------------

    def posterior(self) -> P:
        """The posterior as a view of the optimizer's state: no copy, stale after the next step.

        Where `diagnostics().hessian_noise` is above .5 its Σ has no size: it draws as the optimizer does, and refuses
        leave-one-out losses, entropy and KL divergence.

        Raises:
            ValueError: if num_data is unclear, see `num_data`.
        """
        sampler = self._sampler
        sampler.init_states()
        context = PosteriorContext(sampler.means, self._parameters.staleness(), sampler.at_mean)
        posterior: Any = self._structure.posterior(context)
        reason = self._uncalibrated_reason()
        if reason is not None:
            posterior.uncalibrated_reason, posterior.uncalibrated_draws = reason, False
        posterior.num_data_given = all(group["num_data"] is not None for group in self.param_groups)
        return posterior

    def _uncalibrated_reason(self) -> str | None:
        """Why the Hessian is not that of the loss, if that is known."""
        return None if hessian_noise(self._parameters) <= LIMIT else NOISE

    def diagnostics(
        self,
        loader: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        model: nn.Module | None = None,
    ) -> Diagnostics:
        """Whether the posterior learns, in numbers and by `advice()` in words.

        Without a loader it reads the state: the range of the Hessian, how much of it is still hess_init, signal to
        noise, how long the steps are. With one it also runs the model, in eval mode, on the first few hundred examples:
        once at the mean and under four draws, which leaves weights, modes and random numbers as they were. Several
        processes must all call it, and each measures its own examples.

        Args:
            loader: the training data, in batches as `vlearn.sweep` takes them, shuffled or not.
            loss_fn: the training loss, as for `vlearn.sweep`.
            model: the network; default the one that is watched.

        Raises:
            ValueError: if no parameter requires grad; if only one of loader and loss_fn is given, no model is watched
                and none given, or the loss has no value for each example.
        """
        found = self._read_diagnostics()
        if loader is None and loss_fn is None:
            return found
        if loader is None or loss_fn is None:
            raise ValueError("diagnostics() with a loader needs loss_fn too: give both, or neither.")
        if model is None:
            if self._watch is None:
                raise ValueError("diagnostics() with a loader needs the model, and none is watched: pass model=.")
            model = self._watch.model
        measured = measure(model, loader, loss_fn, self.at_mean, self.sampled_params, self.generator)
        return replace(found, **measured | ({} if found.batch is None else {"batch": found.batch}))

    def _read_diagnostics(self) -> Diagnostics:
        """What the state shows, and the last recorded pass."""
        self._sampler.init_states()
        means = self._sampler.means({name: p for p, name in self._parameters.names().items()})
        found = diagnose(self._parameters, means, self._structure.diagonal_hessian(), self.nonfinite_count)
        trace = None if self._watch is None else self._watch.trace
        batch = trace.num_examples if trace is not None and trace.num_examples else None
        return replace(found, hessian_noise=hessian_noise(self._parameters), batch=batch)

    def watch(
        self,
        model: nn.Module,
        loss_reduction: str | Callable[[], float] = "mean",
        loss_scale: float | Callable[[], float] | None = None,
        every: int = 1,
        batch_norm: str | None = None,
        example_index: ExampleIndex | None = None,
    ) -> None:
        """Draw in every training forward of the model, and keep what sensitivities need of it.

        Args:
            model: called in the training loop; every submodule gets hooks, so it may also be called in parts.
            loss_reduction: how the loss that `backward()` starts from reduces the examples' own losses: "mean" (over
                the minibatch, or over the `num_items_in_batch` that Hugging Face's Trainer calls the model with),
                "sum", or a callable that gives the denominator (class weights, unignored targets).
            loss_scale: what that loss is multiplied with beyond this: `1 / k` when it is divided for accumulation,
                `scaler.get_scale`. A callable is read at backward. Default 1, and a warning where the gradient of a
                softmax cross-entropy with hard or smoothed labels, or of an output that the loss is the mean of, shows
                another factor, or class weights; ignored targets are then seen and not counted.
            every: keep captures only on every so many steps.
            batch_norm: what to do where examples meet in a BatchNorm in train mode: "refuse" their rows, or take mean
                and variance of the batch as "constant", an approximation that leaves out how an example moves the
                others' outputs through them. Default what the optimizer was made with.
            example_index: for minibatches whose examples are concatenated, as graphs are by their nodes: which example,
                from 0, each row is of, ``[rows]`` whole numbers in any order (torch_geometric's `data.batch`). Either
                the name of the argument of the model's forward that has it, or a callable that gets the forward's
                arguments and returns it. Or it returns several, one for each number of rows that layers have:
                ``lambda x, edges, batch: (batch, batch[edges[0]])`` for layers on nodes and layers on edges. The
                model returns a row for each example. Modules on other rows are as exact, and slower.
        Raises:
            TypeError, ValueError: if an argument breaks its rule.
        """
        options = WatchOptions(loss_reduction, loss_scale, every, batch_norm or self._batch_norm, example_index)
        self._start_watch(model, options)
        self._runtime.search.stop()

    def _start_watch(self, model: nn.Module, options: WatchOptions) -> None:
        """Watch the model, and no other any more."""
        ddp = self._sampler.processes.ddp
        wrapped = isinstance(model, nn.Module) and ddp.add(model.modules(), self._parameters.every())
        if wrapped and self._parameters.any_group_has("sync"):
            raise ValueError(
                "sync=True, but DistributedDataParallel averages the gradients: drop sync=True, or the wrapper."
            )
        watch = Watch(model, options)
        self._end_watch()
        for rival in self._rivals(model):
            rival.sampler.discard()
            rival.remove()
            warn_user(
                f"these parameters were watched by another {rival.sampler.parameters.owner}, which is unwatched now."
            )
        self._bind(watch)

    def _watch_found(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Watch a module that is about to run, beside those that were found before."""
        if self._rivals(module):
            self._runtime.search.stop()
            return
        if self._watch is None:
            self._start_watch(module, WatchOptions(batch_norm=self._batch_norm))
            self._runtime.found_watch = True
        else:
            self._watch.add(module)
        assert self._watch is not None
        self._watch.before(module, args, kwargs)

    def _leave_loop_to_user(self) -> None:
        """The user draws: no model is searched for any more, nor watched if it was found so."""
        self._runtime.search.stop()
        if self._runtime.found_watch:
            self.unwatch()

    def _bind(self, watch: Watch | None) -> None:
        curvature = self._runtime.curvature
        consumer = curvature if isinstance(curvature, PassCurvature) else None
        self._runtime.watch = None if watch is None else watch.bind(self._sampler, consumer)

    def _rivals(self, model: nn.Module) -> list[Watch]:
        """Watches of other optimizers that draw the same parameters: each would draw on top of the other."""
        own = set(self._parameters.every())
        others = [watch for watch in watches(model) if watch.sampler is not self._sampler]
        return [watch for watch in others if not own.isdisjoint(watch.sampler.parameters.every())]

    def unwatch(self) -> None:
        """Remove every hook from the watched model; a draw that waits is dropped. None is searched for any more."""
        self._runtime.search.stop()
        self._end_watch()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._sampler.discard()
            self._watch.remove()
        self._runtime.watch, self._runtime.found_watch = None, False

    @torch.inference_mode(False)
    @torch.no_grad()
    def sensitivities(
        self, deviation: bool = False, output: Selector = None, examples: Tensor | Sequence[int] | slice | None = None
    ) -> Sensitivities:
        """Each example's sensitivity, from the training step's own forward and backward pass.

        Σ is the state at the call, the weights are the step's draw. Nothing is computed unless this is called. Where
        `diagnostics().hessian_noise` is above .5 the rows rank the examples, but have no size: a warning says so.

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
        watch = self._watch
        if watch is None:
            name = self._parameters.owner
            raise RuntimeError(
                f"sensitivities() needs a watched model: use {name}(model, ...) or optimizer.watch(model)."
            )
        recorded = watch.last_pass("sensitivities are not defined for this step: ")
        posterior = self.posterior()
        if posterior.uncalibrated_reason:
            warn_user(f"sensitivities() ranks the examples only: {posterior.uncalibrated_reason}")
        named = {name: recorded.stands_for.get(p, p) for p, name in self._parameters.names().items()}
        covariance = posterior.covariance(named)
        return live_sensitivities(recorded, covariance, watch.trace_step, deviation, output, examples)


def _learns(draw: Draw) -> bool:
    """Whether a step has a curvature estimate: from its draws, or from recorded passes if there are any."""
    return draw.pass_sums is None or draw.pass_sums.count > 0


def _average_loss(losses: list[Any]) -> Any:
    given = [loss for loss in losses if loss is not None]
    return (given[0] if len(given) == 1 else sum(given) / len(given)) if given else None
