"""Loading a state dict so that the next step is that of the run which saved it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from vlearn.optim.kernels.entries import as_real
from vlearn.optim.kernels.nonfinite import is_low_precision

_REMEDY = "load the model's weights alone and start a new optimizer."


def kind_of(optimizer: Optimizer) -> str:
    """The name of an optimizer's class, or of that of ours which the user's own is made from."""
    return next(each.__name__ for each in type(optimizer).__mro__ if each.__module__.startswith("vlearn."))


@contextmanager
def loaded_as_saved(optimizer: Optimizer) -> Iterator[None]:
    """Inside, `load_state_dict` refuses another optimizer's state and keeps the dtypes that were saved."""
    loaded: dict[str, Any] = {}  # what the user's hooks, which come before ours, have made of it

    def check_own(_: Optimizer, state: dict[str, Any]) -> None:
        numbers = {number for group in state["param_groups"] for number in group["params"]}
        foreign = [key for key in state["state"] if key not in numbers]
        if foreign:
            raise ValueError(
                f"state_dict['state'] has {foreign[0]!r}, which is no parameter, so it is another optimizer's: "
                f"{_REMEDY}"
            )
        if any({"ess", "hess_init"}.isdisjoint(group) for group in state["param_groups"]):  # which each of ours has
            raise ValueError(f"state_dict['param_groups'] has no 'ess', so it is another optimizer's: {_REMEDY}")
        kind = state.get("optimizer", kind_of(optimizer))  # distributed checkpoints do not keep it
        if kind != kind_of(optimizer):
            raise ValueError(f"the state dict is of {kind}, and that of {kind_of(optimizer)} is another: {_REMEDY}")
        _check_shapes(optimizer, state)
        loaded.update(state)

    before = optimizer.register_load_state_dict_pre_hook(check_own)
    after = optimizer.register_load_state_dict_post_hook(lambda _: _take_as_saved(optimizer, loaded), prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _check_shapes(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raise ValueError if a state is that of a parameter of another shape; torch refuses groups of other sizes."""
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        for number, p in zip(saved["params"], own["params"], strict=False):
            momentum, shape = state["state"].get(number, {}).get("momentum"), as_real(p.detach()).shape
            if momentum is not None and momentum.shape != shape:
                raise ValueError(
                    f"state_dict['state'][{number!r}] is of a parameter of shape {tuple(momentum.shape)}, but the "
                    f"optimizer has one of {tuple(shape)} there: give it the parameters in the order in which they "
                    f"were saved, or, for another model, {_REMEDY}"
                )


def _take_as_saved(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Copies of the saved tensors: torch takes some themselves, and casts others to the parameter's low precision."""
    saved = [number for group in loaded["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(saved, parameters, strict=True):
        for key, value in loaded["state"].get(number, {}).items():
            own = optimizer.state[p][key]
            if own is value or (is_low_precision(p) and value.dtype != own.dtype):
                optimizer.state[p][key] = value.to(device=own.device, copy=True)
