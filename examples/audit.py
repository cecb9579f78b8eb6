"""Which labels are wrong? A training run is watched, and a page shows what it says of its data.

    pip install "vlearn[report]" scikit-learn
    python examples/audit.py [--changed 0.1] [--epochs 20] [--out FOLDER]

A small network is trained on 1,500 of the digits that scikit-learn has, a tenth of whose labels were changed at random.
`vlearn.Recorder` watches the loop, which is otherwise the usual one, and sweeps the data after every fifth epoch, with
the loss of the other 297 digits beside it; `vlearn.label_issues` orders the labels, and `vlearn.report` writes the
page. `make audit` does this from a bare clone, in less than a minute once its environment is there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn

BATCH, RATE, TRAINED_ON = 50, 0.1, 1500


def digits(changed: float) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Images ``[N, 1, 8, 8]`` with labels of which a share was changed to any other: to train on, to test; true ones.

    The test data have wrong labels too, as held-out data of the same origin would.
    """
    found = load_digits()
    x, true = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target)
    draws = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(true), generator=draws) < changed
    others = (true + torch.randint(1, 10, true.shape, generator=draws)) % 10
    both = zip(*(each.tensor_split([TRAINED_ON]) for each in (x, torch.where(wrong, others, true))), strict=True)
    train, test = (TensorDataset(*half) for half in both)
    return train, test, true[:TRAINED_ON]


def network() -> nn.Module:
    """Two convolutions, 1,898 parameters."""
    convolutions = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 16, 3), nn.Tanh()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 10))


def main(argv: list[str] | None = None) -> None:
    """Train, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changed", type=float, default=0.1, help="share of the labels (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/audit"), help="default %(default)s")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)  # in a network as small as this, several wait for one another
    torch.manual_seed(0)
    data, test, true = digits(arguments.changed)
    labels = data.tensors[1]
    model, loader = network(), DataLoader(data, BATCH, shuffle=True)
    optimizer = vlearn.IVON(model, lr=RATE, ess=len(data), hess_init=0.1)
    sweeps = vlearn.audit.Sweeps(every=5, options={"leverage": "exact"}, test=DataLoader(test, 100))
    began = time.perf_counter()
    with vlearn.Recorder(arguments.out, model, optimizer, sweeps=sweeps, overwrite=True) as recorder:
        for epoch in range(arguments.epochs):
            for x, y in recorder.follow(loader):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch + 1} of {arguments.epochs}: loss {loss.item():.3f}", flush=True)

    issues = vlearn.label_issues(recorder.record)
    print(f"\nAfter {time.perf_counter() - began:.0f} s, about {issues.count} labels are expected to be wrong.")
    print("The first ten to look at:")
    wrong = labels != true
    for place in range(10):
        number = issues.numbers[place]
        found = f"given {issues.given[place]}, suggested {issues.suggested[place]}, score {issues.score[place]:.2f}"
        print(f"  digit {number:4d}: {found}  ({'changed' if wrong[number] else 'as published'})")
    share = wrong[torch.from_numpy(issues.numbers[: int(wrong.sum())])].float().mean()
    print(f"{wrong.sum()} labels were changed, and {share:.0%} of as many at the head of the list are such.")

    settings = {"network": "two convolutions", "optimizer": "IVON", "lr": RATE, "batch size": BATCH}
    path = vlearn.report(
        recorder.record,
        data,
        arguments.out / "report.html",
        title=f"Digits of which {arguments.changed:.0%} have a changed label",
        settings=settings | {"epochs": arguments.epochs, "labels changed": int(wrong.sum())},
    )
    print(f"\nOpen in a browser: {path.resolve().as_uri()}")


if __name__ == "__main__":
    main()
