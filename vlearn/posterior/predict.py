"""The posterior predictive by Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.per_example.replay import call_with, eval_mode
from vlearn.posterior.protocol import Posterior, match


def _softmax(output: Tensor) -> Tensor:
    return output.softmax(-1)


@torch.no_grad()
def predict(
    model: nn.Module,
    posterior: Posterior,
    x: Any,
    draws: int = 64,
    link: Callable[[Any], Tensor] = _softmax,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Average prediction over draws of the weights, p(y|x) ≈ mean_s link(f(x; θ_s)), θ_s ~ q.

    The model runs in eval mode and its weights are not touched; one draw is held at a time.

    Args:
        model: the network.
        posterior: a posterior over its parameters; draws are on its ess scale.
        x: one batch: a tensor, or a tuple (positional) or dict (keyword arguments) of them.
        draws: number of draws, > 0.
        link: model output -> what is averaged; default softmax over the last axis.
        generator: of the draws.
    Returns:
        ``[N, C]`` averaged class probabilities (with the default link).
    Raises:
        ValueError: if draws is not positive, or the posterior belongs to another model.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}, but it must be positive: use 64.")
    names = match(model, posterior)
    args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
    total: Tensor | None = None
    with eval_mode(model), posterior.at_mean():  # an active draw steps aside once, not in every pass
        for _ in range(draws):
            sample = posterior.sample(generator)
            weights: dict[Tensor, Tensor] = {p: sample[name].to(p.dtype) for name, p in names.items()}
            prediction = link(call_with(model, weights, args, kwargs))
            if not (prediction.is_floating_point() or prediction.is_complex()):
                prediction = prediction.to(torch.get_default_dtype())  # decisions: their average is a frequency
            total = prediction if total is None else total + prediction
    assert total is not None
    return total / draws
