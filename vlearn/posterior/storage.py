"""Posteriors on disk, as tensors and numbers that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.protocol import match


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Gaussian:
    """Read a posterior that `posterior.save(path)` wrote.

    Args:
        path: of the file.
        model: the network that it is of, whose parameters it then belongs to. By default `sweep` and `predict` match
            them by name: `predict` draws around the posterior's mean, `sweep` takes the model at its own weights, and
            warns where they are others.
    Returns:
        A posterior of the same kind, on the model's device or the CPU.
    Raises:
        ValueError: if the file holds no posterior, or the model has other parameters or other weights.
    """
    try:
        state = torch.load(Path(path), weights_only=True, map_location="cpu")
    except (UnpicklingError, EOFError, KeyError) as error:  # what torch raises of other files
        raise ValueError(f"{os.fspath(path)} holds no posterior: {error}") from error
    if not isinstance(state, dict) or "kind" not in state:
        raise ValueError(f"{os.fspath(path)} holds no posterior: write it by posterior.save(path).")
    if model is None:
        return Gaussian.from_state(state)
    parameters = _matched(model, state["mean"])
    device = next(iter(parameters.values())).device
    posterior = Gaussian.from_state(tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, state))
    posterior.belong_to(parameters)
    return posterior


def _matched(model: nn.Module, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters by the posterior's names, which have its means for their values."""
    saved = Gaussian(mean, [(name,) for name in mean], 1.0)
    parameters: dict[str, Tensor] = dict(match(model, saved))
    missing = [name for name in mean if name not in parameters]
    if missing:
        raise ValueError(
            f"the posterior has {missing[0]!r}, which this {type(model).__name__} has not: pass the model that it was "
            "saved with."
        )
    for name, p in parameters.items():
        if not torch.equal(p.detach().cpu(), mean[name].to(p.dtype)):
            raise ValueError(
                f"the weights {name!r} of this {type(model).__name__} are not those that the posterior is about: load "
                "the checkpoint that it was saved with, or leave model= out where these weights are to stay."
            )
    return parameters
