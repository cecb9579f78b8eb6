"""What sensitivities cost, as multiples of the training step that they come from.

    python -m benchmarks.sensitivity_cost [--smoke]

Medians over interleaved rounds in one process, for one and two threads; the unit is one plain forward and backward
pass of the same unwatched model (batch 256). "live" rows include the training step's own forward and backward pass;
"sweep" is the whole pass over a batch at the mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from benchmarks.report import medians, print_table, provenance, write_json

RESULTS = Path(__file__).parent / "results"
BATCH = 256
COLORS = ("#56B4E9", "#0072B2", "#F0C24B", "#D55E00")


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 500), nn.Tanh(), nn.Linear(500, 300), nn.Tanh(), nn.Linear(300, 10)
    )


def lenet5() -> nn.Sequential:
    """61,706 parameters, as in the memory-perturbation paper."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


def sensitivity_cost(build: Callable[[], nn.Sequential], rounds: int) -> dict[str, float]:
    """Milliseconds of a plain step, and multiples of it."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    plain, watched, swept = build(), build(), build()
    optimizer = vlearn.IVON(watched, lr=0.1, ess=60_000, hess_init=0.1)
    posterior = vlearn.IVON(swept.parameters(), lr=0.1, ess=60_000, hess_init=0.1).posterior()

    def training_step(model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def live(deviation: bool | None) -> Callable[[], None]:
        def call() -> None:
            training_step(watched)
            if deviation is not None:
                optimizer.sensitivities(deviation=deviation)

        return call

    def sweep(leverage: str | None) -> Callable[[], None]:
        return lambda: vlearn.sweep(swept, posterior, [(x, y)], F.cross_entropy, leverage=leverage) and None

    seconds = medians(
        {
            "plain": lambda: training_step(plain),
            "watched, nothing asked": live(None),
            "live self-influence": live(False),
            "live with deviation": live(True),
            "sweep with LOO": sweep(None),
            "sweep with LOO and leverage": sweep("probe"),
        },
        rounds,
    )
    base = seconds.pop("plain")
    return {"plain step, ms": 1e3 * base} | {name: value / base for name, value in seconds.items()}


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """Bars: multiples of a plain training step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    asked = [name for name in next(iter(found.values())) if "ms" not in name]
    width = 0.8 / len(found)
    for k, (model, values) in enumerate(found.items()):
        places = [i + (k - (len(found) - 1) / 2) * width for i in range(len(asked))]
        bars = axes.bar(places, [values[name] for name in asked], width, label=model, color=COLORS[k])
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="0.5", linewidth=0.8)
    axes.set_xticks(range(len(asked)), [name.replace(" ", "\n", 1) for name in asked], fontsize=8)
    axes.set_ylabel("multiples of a plain\nforward + backward pass")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few rounds; nothing is written")
    arguments = parser.parse_args(argv)
    found: dict[str, dict[str, float]] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, build in {"MLP 784-500-300-10": mlp, "LeNet-5": lenet5}.items():
            print(f"{name}, {threads} threads ...", file=sys.stderr)
            found[f"{name}, threads={threads}"] = sensitivity_cost(build, 2 if arguments.smoke else 61)
    rows = [
        [quantity, *(f"{column[quantity]:.2f}" for column in found.values())] for quantity in next(iter(found.values()))
    ]
    print_table(f"Multiples of one plain forward + backward pass, batch {BATCH}", ["", *found], rows)
    if not arguments.smoke:
        command = "python -m benchmarks.sensitivity_cost"
        write_json(RESULTS / "sensitivity_cost.json", {**provenance(command, 0), "multiples": found})
        draw(found, RESULTS / "sensitivity_cost.png")


if __name__ == "__main__":
    main()
