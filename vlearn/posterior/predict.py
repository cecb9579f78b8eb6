"""The posterior predictive by Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlearn.capture.names import model_arguments
from vlearn.gaussians.protocol import Posterior, match
from vlearn.linearized.processes import whole_network
from vlearn.losses.class_scores import class_scores
from vlearn.per_example.replay import call_with, eval_mode, placed


def _softmax(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2 or not output.is_floating_point():
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise ValueError(
            f"the model's output has {given}, but without a link predict() averages the softmax of scores [N, C] of "
            "several classes: pass link=, for instance lambda f: f (regression), torch.sigmoid (one logit), "
            "lambda f: f.softmax(1) ([N, C, ...]), lambda f: f.softmax(-1) ([N, T, C]), lambda f: f.logits.softmax(-1)."
        )
    return class_scores(output).softmax(1)


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

    The model runs in eval mode and is afterwards as it was; one draw is held at a time.

    Args:
        model: the network.
        posterior: a posterior over its parameters; draws are on its ess scale.
        x: one batch: a tensor, or a tuple or list (positional) or dict (keyword arguments) of them, as in `sweep`.
        draws: number of draws, > 0.
        link: model output -> what is averaged; default the softmax of scores ``[N, C]``, or probabilities as they are.
        generator: of the draws; default torch's global one, which goes on: a training after it draws other numbers.
    Returns:
        ``[N, C]`` averaged class probabilities (with the default link).
    Raises:
        TypeError: if the posterior is none, as an optimizer itself, or x is a loader.
        ValueError: if draws is not positive, the posterior belongs to another model, or the output is not scores
            ``[N, C]`` and no link is given.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}, but it must be positive: use 64.")
    if isinstance(x, DataLoader):
        raise TypeError("x is a DataLoader, but predict takes one batch: call it for each batch's x.")
    model, posterior = whole_network(model, posterior)
    names = match(model, posterior)
    args, kwargs = model_arguments(model, x)
    total: Tensor | None = None
    with eval_mode(model), posterior.at_mean():  # an active draw steps aside once, not in every pass
        for _ in range(draws):
            sample = posterior.sample(generator)
            weights: dict[Tensor, Tensor] = {p: sample[name] for name, p in names.items()}
            with placed(weights):  # the parameters themselves: a model may have second references to them
                prediction = link(call_with(model, {}, args, kwargs))
            if not (prediction.is_floating_point() or prediction.is_complex()):
                prediction = prediction.to(torch.get_default_dtype())  # decisions: their average is a frequency
            total = prediction if total is None else total + prediction
    assert total is not None
    return total / draws
