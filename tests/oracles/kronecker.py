"""Dense covariances from Kronecker factors, by torch.kron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_covariance(size: int, generator: torch.Generator) -> Tensor:
    """Positive semidefinite ``[size, size]``, of rank size - 1 where size > 1, as factors of few examples are."""
    root = torch.randn(size, max(1, size - 1), dtype=torch.float64, generator=generator)
    return root @ root.mT / size


def block_precision(
    inputs: Tensor, gradients: Tensor, shapes: Sequence[torch.Size], num_data: float, weight_decay: float
) -> Tensor:
    """N(B ⊗ A + wd I) ``[P, P]`` in the order of the parameters, each flattened.

    Args:
        inputs: A ``[I, I]`` over the columns of the parameters, one after another.
        gradients: B ``[O, O]``.
        shapes: of the parameters, each ``[O, ...]``.
    """
    whole = num_data * (
        torch.kron(gradients, inputs) + weight_decay * torch.eye(len(gradients) * len(inputs), dtype=inputs.dtype)
    )
    order = parameter_order(shapes)
    return whole[order][:, order]


def parameter_order(shapes: Sequence[torch.Size]) -> Tensor:
    """Where each entry of the parameters stands in the flattened matrix ``[O, I]`` of their columns."""
    rows = shapes[0][0]
    widths = [shape.numel() // rows for shape in shapes]
    places = torch.arange(rows * sum(widths)).reshape(rows, -1)
    return torch.cat([part.flatten() for part in places.split(widths, 1)])


def assembled(names: Sequence[str], sizes: dict[str, int], blocks: dict[tuple[str, ...], Tensor]) -> Tensor:
    """The whole matrix in the order of names, zero between blocks."""
    spans = dict(zip(names, torch.arange(sum(sizes.values())).split([sizes[name] for name in names]), strict=True))
    whole = torch.zeros(sum(sizes.values()), sum(sizes.values()), dtype=torch.float64)
    for group, block in blocks.items():
        where = torch.cat([spans[name] for name in group])
        whole[where.unsqueeze(1), where] = block
    return whole
