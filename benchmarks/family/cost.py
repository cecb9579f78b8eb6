"""What a step of each optimizer costs: seconds as multiples of SGD's, and peak memory.

Time: forward and backward pass and step of LeNet-5 on a batch of 256, medians over interleaved rounds in one process. A
round is ten steps, so that what KFACVON, EVON and SOAP do every tenth step is in each. Memory: each optimizer in a
process of its own, the peak of its steps over what is there before the first, the model and the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cost.memory import MIB, in_fresh_process, peak, start_of_peak
from benchmarks.cost.timing import medians, synchronised
from benchmarks.family.methods import FORGETFUL, METHODS, Method, Problem, soap
from benchmarks.problems.networks import lenet5
from benchmarks.report.provenance import provenance
from benchmarks.report.records import write_json
from benchmarks.report.terminal import print_table
from benchmarks.training.loop import training_step

BATCH, STEPS = 256, 10
# Whose steps are not those of another; and EVON's peer.
COMPARED = {name: method for name, method in METHODS.items() if name != FORGETFUL}
COMPARED["SOAP"] = Method(3e-3, lambda model, lr, problem: soap(model, lr), is_posterior=False)
NAMES = list(COMPARED)
# Multiples of SGD's step that each optimizer is to stay below.
GOALS = {"IVON": 1.6, "EVON": 1.5, "VON": 2.0, "VOGN": 2.0, "KFACVON": 2.2}
PROBLEM = Problem(num_data=60_000, prior_precision=60.0, seed=0, hess_init=0.1, beta2=0.9995)


def subject(name: str, device: str, batch: int = BATCH) -> tuple[nn.Module, Callable[[], torch.Tensor], Any]:
    """The model, its loss and what makes its optimizer; KFACVON and EVON have their default update_every, 10."""
    torch.manual_seed(0)
    model = lenet5().to(device)
    x, y = torch.randn(batch, 1, 28, 28, device=device), torch.randint(10, (batch,), device=device)
    return model, lambda: F.cross_entropy(model(x), y), lambda: COMPARED[name].make(model, 1e-4, PROBLEM)


def steps_of(name: str, device: str, batch: int = BATCH) -> Callable[[], None]:
    """A call that takes ten training steps."""
    _, loss, make = subject(name, device, batch)
    optimizer = make()

    def call() -> None:
        for _ in range(STEPS):
            training_step(optimizer, loss)

    return synchronised(call, device)


def peak_memory(name: str, device: str) -> float:
    """MiB of peak memory of the optimizer's steps, in a fresh process."""
    return in_fresh_process(peak_of_steps, name, device)


def peak_of_steps(name: str, device: str) -> float:
    """MiB over what is there before the first step; it is to be called in a fresh process."""
    model, loss, make = subject(name, device)
    loss().backward()
    model.zero_grad()
    before = start_of_peak(device)
    optimizer = make()
    for _ in range(STEPS + 1):
        training_step(optimizer, loss)
    return (peak(device) - before) / MIB


def step_cost(device: str, rounds: int, batch: int = BATCH) -> dict[str, dict[str, float]]:
    """Milliseconds of a step and multiples of SGD's, by method."""
    seconds = medians({name: steps_of(name, device, batch) for name in NAMES}, rounds)
    return {name: {"step, ms": 1e3 * each / STEPS, "of SGD": each / seconds["SGD"]} for name, each in seconds.items()}


def bounds(name: str, device: str, count: int = 6) -> dict[str, float]:
    """Milliseconds of a step that the costliest operators take more than in SGD's step: what bounds an optimizer."""
    spent = {}
    for each in ("SGD", name):
        call = steps_of(each, device)
        call()
        with torch.profiler.profile() as profile:
            call()
        spent[each] = {
            e.key: (e.self_cpu_time_total + e.self_device_time_total) / 1e3 / STEPS for e in profile.key_averages()
        }
    more = {operator: value - spent["SGD"].get(operator, 0.0) for operator, value in spent[name].items()}
    return dict(sorted(more.items(), key=lambda pair: -pair[1])[:count])


def run(out: Path, device: str, smoke: bool) -> None:
    """Measure, print and write cost.json; where an optimizer misses its goal, it tells what the time goes to."""
    before = torch.get_num_threads()
    numbers: dict[str, Any] = {"steps": {}, "bounds": {}}
    try:
        for threads in (1,) if smoke else (1, 2) if device == "cpu" else (before,):
            torch.set_num_threads(threads)
            label = f"threads={threads}" if device == "cpu" else torch.cuda.get_device_name()
            print(f"LeNet-5, batch {BATCH}, {label} ...", file=sys.stderr)
            numbers["steps"][label] = step_cost(device, *((2, 16) if smoke else (15,)))
    finally:
        torch.set_num_threads(before)
    memory = {name: peak_memory(name, device) for name in (NAMES[:1] if smoke else NAMES)}
    rows = []
    for name in NAMES:
        cells = []
        for by_name in numbers["steps"].values():
            cells += [f"{by_name[name]['step, ms']:.1f}", f"{by_name[name]['of SGD']:.2f}"]
        rows.append(
            [name, *cells, f"<= {GOALS[name]}" if name in GOALS else "", f"{memory.get(name, float('nan')):.1f}"]
        )
        over = [each for each in numbers["steps"].values() if each[name]["of SGD"] > GOALS.get(name, float("inf"))]
        if over and not smoke:
            numbers["bounds"][name] = bounds(name, device)
    header = [""]
    for label in numbers["steps"]:
        header += [f"ms a step\n{label}", "of SGD"]
    notes = [
        f"{name} misses its goal; ms a step more than SGD in "
        + ", ".join(f"{operator} {value:.1f}" for operator, value in operators.items())
        for name, operators in numbers["bounds"].items()
    ]
    title = f"A training step of LeNet-5, batch {BATCH}"
    print_table(title, [*header, "goal", "peak memory\nMiB"], rows, notes)
    command = f"python -m benchmarks.family --cost --device {device}"
    content = {**provenance(command, 0), **numbers, "goals": GOALS, "peak_mib": memory}
    write_json(out / ("cost.json" if device == "cpu" else f"cost_{device}.json"), content)
