"""How many labels are wrong, by counting (Northcutt et al., 2021, arXiv:1911.00068).

    t_j = mean of p_j over the examples labelled j                                   the confidence that is usual
    C_ij = number labelled i with j = argmax of p_l over the l with p_l ≥ t_l        the confident joint
    Q_ij = C_ij / Σ_j C_ij · (share labelled i)                                      of given and true label

with p the probabilities that a model gives an example which it was not trained on. The share of wrong labels is
1 - tr Q.
"""

from __future__ import annotations

import numpy as np


def confident_joint(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """C ``[C, C]``, counts of given label (rows) and the class that is likely the true one.

    Args:
        labels: ``[N]`` given labels.
        probabilities: ``[N, C]``.
    """
    classes = probabilities.shape[1]
    sizes = np.bincount(labels, minlength=classes)
    own = probabilities[np.arange(len(labels)), labels]
    totals = np.bincount(labels, own, minlength=classes)
    thresholds = np.divide(totals, sizes, out=np.full(classes, np.inf), where=sizes > 0)
    confident = probabilities >= thresholds
    likely = np.where(confident, probabilities, -1).argmax(1)
    counted = confident.any(1)
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels[counted], likely[counted]), 1)
    return counts


def noise_joint(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Q ``[C, C]``, shares of given label (rows) and true label, with sum 1.

    The labels of a class of which no example is counted are taken to be right.
    """
    counts = confident_joint(labels, probabilities).astype(np.float64)
    sizes = np.bincount(labels, minlength=len(counts))
    of_row = counts.sum(1)
    counts[of_row == 0, of_row == 0] = 1
    return counts / counts.sum(1, keepdims=True) * sizes[:, None] / len(labels)
