"""laplace-torch beside vlearn: its fits, which vlearn's equations read, and its own route to V e."""

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

BACKENDS = ("AsdlGGN", "BackPackGGN", "CurvlinopsGGN")


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    structure: str,
    prior_precision: float,
    batch: int = 250,
    backend: str = "AsdlGGN",
) -> Any:
    """A Laplace approximation of a classifier at its present weights.

    Args:
        model: left as it is; laplace-torch hooks a copy.
        structure: "diag" or "kron".
        prior_precision: δ on the scale of the loss summed over the data.
        batch: examples at a time.
        backend: ASDL's is the fastest fit of the three for either structure; BackPACK's diagonal and curvlinops'
            Kronecker factors are the same numbers. For Jacobians it depends on network and batch: curvlinops leaves
            them to torch.func, whose cost per example grows with the batch.
    """
    import laplace.curvature
    from laplace import Laplace

    la = Laplace(
        copy.deepcopy(model).eval(),
        "classification",
        subset_of_weights="all",
        hessian_structure=structure,
        prior_precision=prior_precision,
        backend=getattr(laplace.curvature, backend),
    )
    with _quiet():
        la.fit(DataLoader(TensorDataset(x, y), batch_size=batch))
    return la


def deviation(la: Any, x: Tensor, y: Tensor, batch: int = 100, diagonal: bool = False) -> Tensor:
    """V e ``[N, C]`` by laplace-torch itself: Jacobians, then its functional variance V, then the residual.

    Args:
        diagonal: keep only the diagonal of V over the classes, as the Memory-Perturbation paper's code does.
    """
    rows = []
    for images, labels in zip(x.split(batch), y.split(batch), strict=True):
        with _quiet():
            jacobians, output = la.backend.jacobians(images)  # [n, C, P], [n, C]
        with torch.no_grad():
            residual = output.softmax(1) - F.one_hot(labels, output.shape[1])
            variance = la.functional_variance(jacobians)
            if diagonal:
                rows.append(variance.diagonal(dim1=1, dim2=2) * residual)
            else:
                rows.append((variance @ residual.unsqueeze(2)).squeeze(2))
    return torch.cat(rows)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about the hooks that ASDL and BackPACK put on modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield
