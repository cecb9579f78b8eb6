"""What sensitivities and IVON's step cost, against the training step itself and against ivon-opt.

    python -m benchmarks.cost [--smoke]

Sensitivities: medians over interleaved rounds in one process, for one and two threads, as multiples of one plain
forward and backward pass of the same unwatched model (batch 256). "live" rows include the training step's own
forward and backward pass; "sweep" is the whole pass over a batch at the mean.

Optimizer: time of sample + update on 8 million float32 parameters, medians in one process; peak memory over
the model, each optimizer in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from benchmarks.report import print_table, provenance, write_json

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


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turn so that drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


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


def parameters(millions: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(1000, 1000) * 0.01) for _ in range(millions)]


def optimizer_step(name: str, weights: list[nn.Parameter]) -> Callable[[], None]:
    """One step of an optimizer on gradients that are there: sample and update, no forward or backward pass."""
    gradients = [torch.randn_like(p) for p in weights]
    for p, gradient in zip(weights, gradients, strict=True):
        p.grad = gradient
    if name.startswith("AdamW"):
        adam = torch.optim.AdamW(weights, lr=1e-3, fused="fused" in name, foreach="foreach" in name)
        return lambda: adam.step() and None
    if name == "ivon-opt":
        import ivon

        variational: Any = ivon.IVON(weights, lr=0.1, ess=50_000)
    else:
        variational = vlearn.IVON(weights, lr=0.1, ess=50_000)

    def step() -> None:
        with variational.sampled_params(train=True):
            for p, gradient in zip(weights, gradients, strict=True):
                p.grad = gradient.view_as(gradient)  # as fresh as after a backward pass
        variational.step()

    return step


def peak_memory(name: str, millions: int) -> float:
    """Bytes per parameter of peak resident memory over the model and its gradients, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cost", "--peak", name, "--millions", str(millions)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(printed.strip().splitlines()[-1])


def print_peak(name: str, millions: int) -> None:
    weights = parameters(millions)
    for p in weights:
        p.grad = torch.zeros_like(p).normal_()
    before = high_water_mark()
    if name != "none":
        step = optimizer_step(name, weights)
        for _ in range(3):
            step()
    print((high_water_mark() - before) / (millions * 1e6))


def high_water_mark() -> float:
    """Peak resident bytes of this process. Not getrusage: on Linux that keeps the peak of the parent process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * float(line.split()[1])


def optimizer_cost(millions: int, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of sample + update, and peak bytes per parameter over the model."""
    torch.set_num_threads(threads)
    names = ["ivon-opt", "vlearn", "AdamW foreach", "AdamW fused"]
    seconds = medians({name: optimizer_step(name, parameters(millions)) for name in names}, rounds)
    empty = peak_memory("none", millions)
    rows = {}
    for name in names:
        rows[name] = {
            "step, ms": 1e3 * seconds[name],
            "of ivon-opt": seconds[name] / seconds["ivon-opt"],
            "peak over the model, bytes per parameter": peak_memory(name, millions) - empty,
        }
    return rows


def draw(found: dict[str, Any], path: Path) -> None:
    """Bars: multiples of a plain training step, and of ivon-opt's step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(2.2, 1), layout="constrained")
    models = list(found["sensitivities"])
    asked = [name for name in found["sensitivities"][models[0]] if "ms" not in name]
    width = 0.8 / len(models)
    for k, model in enumerate(models):
        places = [i + (k - (len(models) - 1) / 2) * width for i in range(len(asked))]
        bars = left.bar(
            places, [found["sensitivities"][model][name] for name in asked], width, label=model, color=COLORS[k]
        )
        left.bar_label(bars, fmt="%.2f", fontsize=7)
    left.axhline(1, color="0.5", linewidth=0.8)
    left.set_xticks(range(len(asked)), [name.replace(" ", "\n", 1) for name in asked], fontsize=8)
    left.set_ylabel("multiples of a plain\nforward + backward pass")
    left.legend(frameon=False, fontsize=8)
    label, rows = next(iter(found["optimizers"].items()))
    bars = right.bar(list(rows), [row["step, ms"] for row in rows.values()], color=[COLORS[0], COLORS[1], "0.7", "0.7"])
    right.bar_label(bars, fmt="%.0f ms", fontsize=8)
    right.tick_params(axis="x", labelsize=8, rotation=20)
    right.set_title(f"sample + update, {label}", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few rounds on small sizes; nothing is written")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--millions", type=int, default=8, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak:
        print_peak(arguments.peak, arguments.millions)
        return
    rounds, millions = (2, 1) if arguments.smoke else (61, 8)
    found: dict[str, Any] = {"sensitivities": {}, "optimizers": {}}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, build in {"MLP 784-500-300-10": mlp, "LeNet-5": lenet5}.items():
            print(f"{name}, {threads} threads ...", file=sys.stderr)
            found["sensitivities"][f"{name}, threads={threads}"] = sensitivity_cost(build, rounds)
        print(f"optimizers, {threads} threads ...", file=sys.stderr)
        label = f"{millions} million parameters, threads={threads}"
        found["optimizers"][label] = optimizer_cost(millions, max(2, rounds // 3), threads)
    tables = {f"Multiples of one plain forward + backward pass, batch {BATCH}": found["sensitivities"]}
    tables |= {f"Sample + update, {label}": rows for label, rows in found["optimizers"].items()}
    for title, table in tables.items():
        quantities = next(iter(table.values()))
        rows = [[quantity, *(f"{column[quantity]:.2f}" for column in table.values())] for quantity in quantities]
        print_table(title, ["", *table], rows)
    if not arguments.smoke:
        write_json(RESULTS / "cost.json", {**provenance("python -m benchmarks.cost", 0), **found})
        draw(found, RESULTS / "cost.png")


if __name__ == "__main__":
    main()
