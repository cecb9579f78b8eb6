"""Rows of several sources in the order of their examples' numbers, each example once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

AGREE = 1e-3  # relative difference of two losses of one example, computed in batches of other examples


def example_order(
    index: np.ndarray, loss: np.ndarray, source: np.ndarray, names: Sequence[str], position: np.ndarray | None = None
) -> np.ndarray:
    """The places of rows in the order of their examples' numbers; of rows that come again only the first is there.

    Args:
        index: ``[N]`` example numbers.
        loss: ``[N]`` the examples' losses, by which two rows of one number are seen to be of one example.
        source: ``[N]`` which source each row comes from.
        names: of the sources, for messages.
        position: ``[N]`` position in its sequence of each row, where tokens are the examples.

    Returns:
        ``[M]`` places, M <= N.

    Raises:
        ValueError: if two rows of one number have different losses.
    """
    second = np.zeros_like(index) if position is None else position
    order = np.lexsort((source, second, index))
    index, second, source = index[order], second[order], source[order]
    loss = np.asarray(loss, np.float64)[order]
    again = np.zeros(len(order), bool)
    again[1:] = (index[1:] == index[:-1]) & (second[1:] == second[:-1])
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    size = np.abs(loss[np.isfinite(loss)]).mean() if np.isfinite(loss).any() else 0.0
    differs = ~np.isclose(loss, loss[first], rtol=AGREE, atol=AGREE * size, equal_nan=True)
    if differs.any():
        k = int(differs.argmax())
        places = int(source[first[k]]), int(source[k])
        raise ValueError(
            f"example {index[k]} has the loss {loss[first[k]]:.6g} in {names[places[0]]} and {loss[k]:.6g} in "
            f"{names[places[1]]}, so its number is that of two examples, or its inputs vary: number the examples of "
            "the whole data set, as vlearn.IndexedDataset does and a DataLoader with a sampler "
            "(vlearn.UnrepeatedDistributedSampler), and turn random augmentation off."
        )
    return order[~again]
