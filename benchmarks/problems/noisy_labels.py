"""Labels that are wrong and known to be: drawn at random, or those that people gave to CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.problems.images import Images, default_root

# What is taken for what.
PAIRS = {
    "FashionMNIST": {0: 6, 6: 0, 2: 4, 4: 2, 7: 9, 9: 7, 5: 7, 1: 3, 3: 1},  # T-shirt and shirt, pullover and coat, ...
    "digits": {1: 7, 7: 1, 3: 8, 8: 3, 4: 9, 9: 4, 5: 6, 6: 5, 2: 7},
}
HUMAN = ("aggre_label", "random_label1", "random_label2", "random_label3", "worse_label")


def given_labels(data: Images, noise: str, share: float, seed: int, root: Path | None = None) -> Tensor:
    """Labels ``[N]`` of the training examples, some of them wrong.

    Args:
        noise: "symmetric", any other class; "pairs", one that the class is taken for; or one of CIFAR-10N's sets of
            human labels (Wei et al., 2022, arXiv:2110.12088).
        share: of the labels that are drawn anew, where they are drawn: of the classes that have a pair.
        seed: of the draw.

    Raises:
        FileNotFoundError: if the human labels are not there.
        ValueError: if there is no noise of this name.
    """
    generator = torch.Generator().manual_seed(seed)
    true = data.y.cpu()
    wrong = torch.rand(len(true), generator=generator) < share
    if noise == "symmetric":
        others = torch.randint(1, len(data.classes), true.shape, generator=generator)
        return torch.where(wrong, (true + others) % len(data.classes), true)
    if noise == "pairs":
        partner = torch.arange(len(data.classes))
        for label, other in PAIRS[data.name].items():
            partner[label] = other
        return torch.where(wrong, partner[true], true)
    if noise not in HUMAN:
        raise ValueError(f"noise {noise!r}, but there are 'symmetric', 'pairs' and {', '.join(map(repr, HUMAN))}.")
    file = (default_root() if root is None else root) / "cifar-10n" / "cifar10n_labels.npz"
    if not file.exists():
        raise FileNotFoundError(
            f"no {file}: save the arrays of CIFAR-10_human.pt of github.com/UCSC-REAL/cifar-10-100n there, by name."
        )
    with np.load(file) as sets:
        if not np.array_equal(sets["clean_label"][: len(true)], true.numpy()):
            raise ValueError(f"{file} is of images in another order than {data.name}: take the first of the original.")
        return torch.from_numpy(sets[noise][: len(true)].astype(np.int64))
