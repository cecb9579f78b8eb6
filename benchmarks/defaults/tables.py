"""Tasks on tables of numbers: UCI regression, standardised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.defaults.task import Task, squared_error
from benchmarks.problems.networks import relu_mlp


def mlp(root: Path) -> Task:
    """Two hidden layers on the power plant's 9,568 rows."""
    return Task(lambda: relu_mlp(4, 64, 64, 1), *uci(root, "power-plant"), squared_error, 64, 30, classifies=False)


def ft_transformer(root: Path) -> Task:
    """FT-Transformer (Gorishniy et al., 2021) on kin8nm, the forward dynamics of a robot arm."""
    from rtdl_revisiting_models import FTTransformer

    class OfNumbers(nn.Module):
        """Without columns of categories."""

        def __init__(self):
            super().__init__()
            self.net = FTTransformer(
                n_cont_features=8,
                cat_cardinalities=[],
                d_out=1,
                n_blocks=2,
                d_block=32,
                attention_n_heads=4,
                attention_dropout=0.1,
                ffn_d_hidden_multiplier=2,
                ffn_dropout=0.1,
                residual_dropout=0.0,
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x, None)

    return Task(OfNumbers, *uci(root, "kin8nm"), squared_error, 64, 15, classifies=False)


def uci(root: Path, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and target of both halves of the first standard split, standardised by the first half's."""
    folder = root / "uci" / name / "data"
    data = torch.from_numpy(np.loadtxt(folder / "data.txt")).float()
    columns = torch.from_numpy(np.loadtxt(folder / "index_features.txt", dtype=int))
    target = int(np.loadtxt(folder / "index_target.txt"))
    rows = [torch.from_numpy(np.loadtxt(folder / f"index_{half}_0.txt", dtype=int)) for half in ("train", "test")]
    data = (data - data[rows[0]].mean(0)) / data[rows[0]].std(0)
    (x, y), (x_val, y_val) = ((data[half][:, columns], data[half][:, target]) for half in rows)
    return x, y, x_val, y_val
