"""What IVON's step costs in time and memory, beside ivon-opt and torch's AdamW.

    python -m benchmarks.step_cost [--device cuda] [--millions 8] [--smoke]

Time: sample + update on float32 parameters in tensors of a million each, on an accelerator also of 16 million, without
forward and backward pass; medians over interleaved rounds in one process. Every optimizer runs in the loop it is
fastest in (vlearn: train(), backward, step); "in a context" is vlearn in ivon-opt's loop, sampled_params(train=True),
which restores the mean before the step. Peak memory over the model and its gradients, in bytes per parameter, each
optimizer in a process of its own; on the CPU that counts what the compiler itself takes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vlearn
from benchmarks.cost.memory import in_fresh_process, peak, start_of_peak
from benchmarks.cost.timing import medians, synchronised
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table

PEER = "ivon-opt"
OPTIMIZERS = (
    PEER,
    "vlearn, in a context",
    "vlearn",
    "vlearn, compiled, in a context",
    "vlearn, compiled",
    "AdamW foreach",
    "AdamW fused",
)


def parameters(millions: int, device: str, each: int = 1) -> list[nn.Parameter]:
    """Tensors of `each` million entries that have gradients."""
    torch.manual_seed(0)
    shape = (1000 * each, 1000)
    weights = [nn.Parameter(torch.randn(shape, device=device) * 0.01) for _ in range(millions // each)]
    for p in weights:
        p.grad = torch.randn_like(p)
    return weights


def optimizer_step(name: str, weights: list[nn.Parameter]) -> Callable[[], None]:
    """One step of an optimizer on gradients that are there: sample and update."""
    gradients: list[Any] = [p.grad for p in weights]

    def give_gradients() -> None:
        for p, gradient in zip(weights, gradients, strict=True):
            p.grad = gradient.view_as(gradient)  # as fresh as after a backward pass

    if name.startswith("AdamW"):
        adam = torch.optim.AdamW(weights, lr=1e-3, fused="fused" in name, foreach="foreach" in name)

        def step() -> None:
            give_gradients()
            adam.step()

        return step
    if name == PEER:
        import ivon

        variational: Any = ivon.IVON(weights, lr=0.1, ess=50_000)
    else:
        variational = vlearn.IVON(weights, lr=0.1, ess=50_000, compiled="compiled" in name)

    def step_in_context() -> None:
        with variational.sampled_params(train=True):
            give_gradients()
        variational.step()

    def step_in_train_mode() -> None:
        variational.train()
        give_gradients()
        variational.step()

    return step_in_context if name == PEER or "context" in name else step_in_train_mode


def peak_memory(name: str, millions: int, device: str, each: int) -> float:
    """Peak bytes per parameter over the model and its gradients; it is to be called in a fresh process."""
    if "compiled" in name:  # what the compiler takes once is not the optimizer's
        optimizer_step(name, parameters(each, device, each))()
    weights = parameters(millions, device, each)
    before = start_of_peak(device)
    step = optimizer_step(name, weights)
    for _ in range(3):
        step()
    return (peak(device) - before) / (millions * 1e6)


def step_cost(millions: int, rounds: int, device: str, each: int = 1) -> dict[str, dict[str, float]]:
    """Milliseconds of sample + update, as multiples of others, and peak bytes per parameter over the model.

    Args:
        each: millions of entries of a tensor.
    """
    names = [name for name in OPTIMIZERS if name != PEER or importlib.util.find_spec("ivon")]
    seconds = medians(
        {name: synchronised(optimizer_step(name, parameters(millions, device, each)), device) for name in names}, rounds
    )
    return {
        name: {
            "step, ms": 1e3 * seconds[name],
            "of ivon-opt": seconds[name] / seconds.get(PEER, float("nan")),
            "of AdamW fused": seconds[name] / seconds["AdamW fused"],
            "peak, bytes per parameter": in_fresh_process(peak_memory, name, millions, device, each),
        }
        for name in names
    }


def draw(steps: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Bars of the milliseconds of a step and of the bytes per parameter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(steps) + 1, figsize=(4 * len(steps) + 4, 3.4), sharey=True, layout="constrained")
    label, last = next(reversed(steps.items()))
    panels = [(name.replace(", ", ",\n"), rows, "step, ms", "ms") for name, rows in steps.items()]
    panels.append(
        (
            "peak memory over the model,\n" + label.replace(", ", ",\n"),
            last,
            "peak, bytes per parameter",
            "bytes per parameter",
        )
    )
    for panel, (title, rows, quantity, unit) in zip(axes, panels, strict=True):
        names = list(rows)[::-1]
        colors = ["#0072B2" if "vlearn" in name else "#56B4E9" if name == PEER else "0.7" for name in names]
        bars = panel.barh(names, [rows[name][quantity] for name in names], color=colors)
        panel.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(unit)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--millions", type=int, help="of parameters; 8 on the CPU, 96 on an accelerator")
    parser.add_argument("--smoke", action="store_true", help="a few rounds on a million; nothing is written")
    arguments = parser.parse_args(argv)
    on_cpu = arguments.device == "cpu"
    millions = 1 if arguments.smoke else arguments.millions or (8 if on_cpu else 96)
    steps: dict[str, dict[str, dict[str, float]]] = {}
    for threads, each in ((1, 1), (2, 1)) if on_cpu else ((torch.get_num_threads(), each) for each in (1, 16)):
        if arguments.smoke and steps:
            break
        torch.set_num_threads(threads)
        where = f"threads={threads}" if on_cpu else f"in tensors of {each} million, {torch.cuda.get_device_name()}"
        label = f"{millions} million parameters, {where}"
        print(f"{label} ...", file=sys.stderr)
        steps[label] = step_cost(millions, 2 if arguments.smoke else 21, arguments.device, each)
    for label, rows in steps.items():
        quantities = list(next(iter(rows.values())))
        cells = [[name, *(f"{row[quantity]:.2f}" for quantity in quantities)] for name, row in rows.items()]
        print_table(f"Sample + update, {label}", ["", *quantities], cells)
    if not arguments.smoke:
        stem = "step_cost" if on_cpu else f"step_cost_{arguments.device}"
        command = f"python -m benchmarks.step_cost --device {arguments.device} --millions {millions}"
        write_json(RESULTS / f"{stem}.json", {**provenance(command, 0), "steps": steps})
        draw(steps, RESULTS / f"{stem}.png")


if __name__ == "__main__":
    main()
