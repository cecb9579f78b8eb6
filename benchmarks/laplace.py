"""laplace-torch beside vlearn: its fits as posteriors that vlearn's equations read, and its own route to V e."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vlearn.posterior import Diagonal, Full


def fit(model: nn.Module, x: Tensor, y: Tensor, structure: str, prior_precision: float, batch: int = 250) -> Any:
    """A Laplace approximation of a classifier at its present weights.

    The back end is ASDL, the fastest of laplace-torch's three for either structure; BackPACK's diagonal and
    curvlinops' Kronecker factors are the same numbers.

    Args:
        model: left as it is; laplace-torch hooks a copy.
        structure: "diag" or "kron".
        prior_precision: δ on the scale of the loss summed over the data.
        batch: examples at a time.
    """
    from laplace import Laplace
    from laplace.curvature import AsdlGGN

    la = Laplace(
        copy.deepcopy(model).eval(),
        "classification",
        subset_of_weights="all",
        hessian_structure=structure,
        prior_precision=prior_precision,
        backend=AsdlGGN,
    )
    with _quiet():
        la.fit(DataLoader(TensorDataset(x, y), batch_size=batch))
    return la


def posterior(la: Any, model: nn.Module, num_data: int) -> Diagonal | Full:
    """The posterior of a fitted diagonal or Kronecker object, over a model's parameters.

    The Kronecker precision is written out densely: block by block (laplace-torch keeps a bias as a block of its
    own) Q(d_B d_Aᵀ + δ)Qᵀ, as laplace-torch adds the prior.
    """
    mean = {name: p.detach() for name, p in model.named_parameters()}
    precision = la.posterior_precision
    if not isinstance(precision, Tensor):
        return Full(mean, precision.to_matrix(), num_data)
    decay = float(la.prior_precision) / num_data
    parts = precision.split([p.numel() for p in mean.values()])
    hessian = {name: part.view_as(p) / num_data - decay for (name, p), part in zip(mean.items(), parts, strict=True)}
    return Diagonal(mean, hessian, dict.fromkeys(mean, decay), dict.fromkeys(mean, float(num_data)), num_data)


def deviation(la: Any, x: Tensor, y: Tensor, batch: int = 100) -> Tensor:
    """V e ``[N, C]`` by laplace-torch itself: Jacobians, then its functional variance V, then the residual."""
    rows = []
    for images, labels in zip(x.split(batch), y.split(batch), strict=True):
        with _quiet():
            jacobians, output = la.backend.jacobians(images)  # [n, C, P], [n, C]
        with torch.no_grad():
            residual = output.softmax(1) - F.one_hot(labels, output.shape[1])
            rows.append((la.functional_variance(jacobians) @ residual.unsqueeze(2)).squeeze(2))
    return torch.cat(rows)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning about the kind of hook that ASDL puts on a module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
        yield
