"""The parameters of one optimizer with their groups, state and names, for everything that works below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from vlearn.capture.names import uncompiled_name
from vlearn.optim.kernels.entries import as_real
from vlearn.optim.kernels.multi_tensor import read
from vlearn.optim.kernels.nonfinite import is_low_precision

Group = dict[str, Any]  # a parameter group as torch has it: "params" and settings


class ByName(Mapping[str, Tensor]):
    """Tensors of parameters by name, each made when it is read.

    Args:
        named: the parameters.
        get: what is read of one.
    """

    def __init__(self, named: dict[str, Tensor], get: Callable[[Tensor], Tensor]):
        self._named, self._get = named, get

    def __getitem__(self, name: str) -> Tensor:
        return self._get(self._named[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)


class Parameters:
    """A view of an optimizer's parameter groups and state, which it hands down instead of itself.

    Args:
        owner: the name of the optimizer, for messages.

    Attributes:
        groups, state: those of the optimizer.
        names_in_model: the name of each parameter in the watched model, if there is one.
        noise_of_shards: this process's part of what a step adds to the `hessian_noise` of sharded parameters.
        updates: how often the state has changed, by steps and by loading: what a posterior view was read at.
        loads: how often it has been replaced as a whole.
    """

    def __init__(self, owner: str):
        self.owner = owner
        self.groups: list[Group] = []
        self.state: MutableMapping[Tensor, dict[str, Any]] = {}
        self.names_in_model: dict[Tensor, str] = {}
        self.noise_of_shards: dict[Tensor, Any] = {}
        self.updates = self.loads = 0
        self._steps: int | None = None  # taken so far; None: to be read from the state

    def attach(self, groups: list[Group], state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Look at these groups and this state from now on."""
        if groups is not self.groups or state is not self.state:
            self.groups, self.state = groups, state
            self.loads += 1
            self._steps = None

    def every(self) -> list[Tensor]:
        """Every parameter, in the order of the groups."""
        return [p for group in self.groups for p in group["params"]]

    def trainable(self) -> list[Tensor]:
        """The parameters that are drawn and updated: those that require grad."""
        return [p for p in self.every() if p.requires_grad]

    def has_state(self, p: Tensor) -> bool:
        """Whether a parameter has been drawn; a prior alone does not count."""
        return "step" in self.state.get(p, {})

    def has_prior(self, p: Tensor) -> bool:
        """Whether a parameter has a prior of its own in the place of weight decay."""
        return "prior_precision" in self.state.get(p, {})

    def mean_of(self, p: Tensor) -> Tensor:
        """The mean of a whole parameter in the precision of the state, while it is in the weights."""
        master = self.master_copy(p)
        return as_real(p.data) if master is None else master

    def group_of(self, p: Tensor) -> Group:
        """The group that a parameter is in."""
        return next(group for group in self.groups if any(p is q for q in group["params"]))

    def names(self) -> dict[Tensor, str]:
        """The name of every parameter: as given, else as in the watched model, else by position.

        Of several with one name, as where a head was replaced, the last has it and the others theirs by position.
        """
        names: dict[Tensor, str] = {}
        for group in self.groups:
            given = group.get("param_names")
            for i, p in enumerate(group["params"]):
                name = given[i] if given else self.names_in_model.get(p, f"param_{len(names)}")
                names[p] = uncompiled_name(name)
        last = {name: p for p, name in names.items()}
        return {p: name if last[name] is p else f"param_{i}" for i, (p, name) in enumerate(names.items())}

    def any_group_has(self, setting: str) -> bool:
        """Whether a setting is on in any group."""
        return any(group[setting] for group in self.groups)

    @property
    def num_data(self) -> float:
        """The number of training examples N, the scale of sensitivities.

        Raises:
            ValueError: if it was not given and the parameter groups differ in ess.
        """
        given = {group["num_data"] or group["ess"] for group in self.groups}
        if len(given) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(given))
            raise ValueError(
                f"ess={listed} differ between parameter groups, so the number of examples is unclear: pass num_data."
            )
        return given.pop()

    @property
    def mc_samples(self) -> int:
        """The number of draws per `step(closure)`."""
        return max(group["mc_samples"] for group in self.groups)

    def next_step(self) -> int:
        """The number of the update that the next gradients will make, from 1."""
        if self._steps is None:
            steps = [state["step"] for state in self.state.values() if "step" in state]
            self._steps = max(map(int, read(steps)), default=0)
        return self._steps + 1

    def count_step(self) -> None:
        """A step has changed the state."""
        self.updates += 1
        self._steps = None if self._steps is None else self._steps + 1

    def count_change(self) -> None:
        """The state has changed without a step."""
        self.updates += 1

    def count_load(self) -> None:
        """Another state is being loaded."""
        self.updates += 1
        self.loads += 1
        self._steps = None

    def staleness(self) -> Callable[[], None]:
        """A check for a view of the present state, which raises RuntimeError once the state has changed."""
        updates = self.updates

        def check() -> None:
            if self.updates != updates:
                raise RuntimeError(
                    "this posterior is stale, the optimizer has stepped since: call optimizer.posterior() again, or "
                    "keep one with .clone()."
                )

        return check

    def master_copy(self, p: Tensor) -> Tensor | None:
        """The float32 mean of a parameter of lower precision; None where the weights hold the mean exactly."""
        return self.state[p].get("mean")


def state_dtype(p: Tensor) -> torch.dtype:
    """The dtype of the state of a parameter: its own, of complex ones that of a part, but at least float32."""
    return torch.float32 if is_low_precision(p) else p.dtype.to_real()
