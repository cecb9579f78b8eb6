"""What training costs on an accelerator: the step beside AdamW's and ivon-opt's, sensitivities, sweeps, K-FAC.

    python -m benchmarks.accelerator [--device cuda] [--quick] [--out FILE]

Meant for nine minutes on one GPU, of which a billion parameters take 60 GB. What does not fit into its memory, or would
begin after eight minutes, is left out:

    steps           draw and update without forward and backward pass, of 8 million, 100 million and a billion float32
                    parameters in tensors of four million, and of the 161 tensors of a ResNet-50, where a GPU waits for
                    the host: milliseconds, and peak bytes per parameter over the model and its gradients
    training steps  forward, backward and step of ResNet-50 with group norm and of a GPT-2 small, with AdamW, with IVON,
                    and with IVON and the live self-influence, or V e too, of every example
    sweeps          examples per second at the mean, with leave-one-out losses
    KFACVON         milliseconds of a training step, and of one that makes all eigenbases anew

Medians over rounds; calls of one network take turns. After every part the file is written, so that what has been
measured is there if a later part fails. `--quick` runs all in miniature, to see that it works: its times say nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.cost.memory import peak, start_of_peak
from benchmarks.cost.passes import next_token
from benchmarks.cost.timing import medians, synchronised
from benchmarks.problems.networks import LanguageModel, resnet50_group_norm
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table

FUSED = "AdamW fused"
EACH = 2**22  # entries of a tensor
NUM_DATA = 50_000
LAST_BEGIN = 8 * 60.0  # seconds

Numbers = dict[str, float | None]  # None: it did not fit into memory


@dataclass(frozen=True)
class Subject:
    """A network and its batch on a device."""

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[..., Tensor]

    def on(self, device: str) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        model, (x, y) = self.build(), self.data()
        return model.to(device), x.to(device), y.to(device)


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        parameters: of the steps, by name: the shapes of their tensors.
        subjects: the networks, by name.
        swept: batches of a sweep.
        rounds: of the steps and of the training steps.
    """

    parameters: dict[str, list[torch.Size]]
    subjects: dict[str, Subject]
    swept: int
    rounds: tuple[int, int]


def images(count: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    """Noise ``[N, 3, size, size]`` and labels."""
    return torch.randn(count, 3, size, size), torch.randint(classes, (count,))


def tokens(count: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[N, length]`` and those that come next."""
    x = torch.randint(vocabulary, (count, length + 1))
    return x[:, :-1], x[:, 1:]


def shapes_of(model: nn.Module) -> list[torch.Size]:
    return [p.shape for p in model.parameters()]


def sizes(quick: bool) -> Size:
    if quick:
        subjects = {
            "ResNet-50, in miniature": Subject(
                lambda: resnet50_group_norm(width=4, classes=10), lambda: images(4, 64, 10), F.cross_entropy
            ),
            "GPT-2, in miniature": Subject(
                lambda: LanguageModel(64, 16, 16, 2, 2), lambda: tokens(3, 16, 64), next_token
            ),
        }
        small = {"20 thousand parameters": [torch.Size((100, 100))] * 2}
        small["tensors of a ResNet-50, in miniature"] = shapes_of(resnet50_group_norm(4, 10))
        return Size(small, subjects, swept=2, rounds=(2, 1))
    subjects = {
        "ResNet-50 with GroupNorm": Subject(resnet50_group_norm, lambda: images(32, 224, 1000), F.cross_entropy),
        "GPT-2 small": Subject(
            lambda: LanguageModel(50257, 1024, 768, 12, 12), lambda: tokens(4, 1024, 50257), next_token
        ),
    }
    with torch.device("meta"):
        resnet = shapes_of(resnet50_group_norm())
    parameters = {"tensors of a ResNet-50": resnet}
    for name, count in (("8 million", 2), ("100 million", 24), ("a billion", 239)):
        parameters[f"{name} parameters"] = [torch.Size((2048, EACH // 2048))] * count
    return Size(parameters, subjects, swept=2, rounds=(21, 11))


# -- steps -----------------------------------------------------------------------------------------------------------


def optimizers(compiled: bool = True) -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    """What makes each optimizer that is compared, of parameters; a compilation takes a minute."""
    made: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        FUSED: lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        "IVON": lambda p: vlearn.IVON(p, lr=0.1, ess=NUM_DATA),
        "IVON, unchecked": lambda p: vlearn.IVON(p, lr=0.1, ess=NUM_DATA, nonfinite="ignore"),
        "VAdamW": lambda p: vlearn.VAdamW(p, num_data=NUM_DATA),
    }
    if compiled:
        made["IVON, compiled"] = lambda p: vlearn.IVON(p, lr=0.1, ess=NUM_DATA, compiled=True)
    if importlib.util.find_spec("ivon"):
        import ivon

        peer: Any = ivon
        made["ivon-opt"] = lambda p: peer.IVON(p, lr=0.1, ess=NUM_DATA)
    return made


def step_of(optimizer: Any, parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Draw and update, on gradients that are there."""
    gradients = [p.grad for p in parameters]

    def give_gradients() -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = None if gradient is None else gradient.view_as(gradient)  # as fresh as after a backward pass

    def step() -> None:
        if isinstance(optimizer, torch.optim.AdamW):
            give_gradients()
        elif hasattr(optimizer, "train"):
            optimizer.train()
            give_gradients()
        else:
            with optimizer.sampled_params(train=True):
                give_gradients()
        optimizer.step()

    return step


def steps(shapes: list[torch.Size], rounds: int, device: str, compiled: bool = True) -> dict[str, Numbers]:
    """Milliseconds and peak bytes of a step of each optimizer; one optimizer after another, for its memory."""
    found: dict[str, Numbers] = {}
    count = sum(map(torch.Size.numel, shapes))
    for name, make in optimizers(compiled).items():
        row: Numbers = {"step, ms": None, "of AdamW fused": None, "peak, bytes per parameter": None}
        found[name] = row
        with what_fits(device):
            seconds, taken = time_and_peak(make, shapes, rounds, device)
            row["step, ms"], row["peak, bytes per parameter"] = 1e3 * seconds, taken / count
            fused = found[FUSED]["step, ms"]
            row["of AdamW fused"] = None if fused is None else 1e3 * seconds / fused
    return found


def time_and_peak(
    make: Callable[[list[nn.Parameter]], Any], shapes: list[torch.Size], rounds: int, device: str
) -> tuple[float, float]:
    """Median seconds of a step, and its peak bytes over the model and its gradients; nothing of it stays."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, device=device) * 0.01) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    before = start_of_peak(device)
    step = synchronised(step_of(make(parameters), parameters), device)
    return medians({"": step}, rounds)[""], peak(device) - before


@contextmanager
def what_fits(device: str) -> Iterator[None]:
    """Leave what is inside unfinished where memory does not hold it; and nothing of it in memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        print(f"left out: {str(error).splitlines()[0]}", file=sys.stderr)
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


# -- training steps --------------------------------------------------------------------------------------------------


def training_steps(subject: Subject, rounds: int, device: str) -> Numbers:
    """Milliseconds of forward, backward and step with AdamW and with IVON, and multiples of the latter."""
    calls = {
        "AdamW": training_step(subject, device, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)),
        "IVON": training_step(subject, device, ivon),
        "IVON, self-influence": training_step(subject, device, ivon, deviation=False),
        "IVON, self-influence and V e": training_step(subject, device, ivon, deviation=True),
    }
    seconds = medians({name: synchronised(call, device) for name, call in calls.items()}, rounds)
    found: Numbers = {f"{name}, ms": 1e3 * value for name, value in seconds.items()}
    for name in list(calls)[2:]:
        found[f"{name}, of IVON's step"] = seconds[name] / seconds["IVON"]
    found["IVON, of AdamW's step"] = seconds["IVON"] / seconds["AdamW"]
    return found


def ivon(model: nn.Module) -> vlearn.IVON:
    return vlearn.IVON(model, lr=0.1, ess=NUM_DATA, hess_init=0.1)


def training_step(
    subject: Subject, device: str, make: Callable[[nn.Module], Any], deviation: bool | None = None
) -> Callable[[], None]:
    """A training step; sensitivities are asked for unless `deviation` is None."""
    model, x, y = subject.on(device)
    optimizer = make(model)

    def call() -> None:
        optimizer.zero_grad()
        subject.loss(model(x), y).backward()
        optimizer.step()
        if deviation is not None:
            optimizer.sensitivities(deviation=deviation)

    return call


def sweeps(subject: Subject, count: int, rounds: int, device: str) -> Numbers:
    """Examples per second of a sweep over some batches, and of plain passes forward and back."""
    model, x, y = subject.on(device)
    posterior = vlearn.IVON(model.named_parameters(), lr=0.1, ess=NUM_DATA, num_data=NUM_DATA).posterior()
    batches = [(x, y)] * count

    def plain() -> None:
        for inputs, targets in batches:
            model.zero_grad()
            subject.loss(model(inputs), targets).backward()

    def sweep() -> None:
        vlearn.sweep(model, posterior, batches, subject.loss, leverage=None, progress=False)

    calls = {"plain": synchronised(plain, device), "sweep": synchronised(sweep, device)}
    seconds = medians(calls, max(1, rounds // 3))
    examples = count * len(x)
    return {
        "plain passes, examples per second": examples / seconds["plain"],
        "sweep, examples per second": examples / seconds["sweep"],
        "sweep, of plain passes": seconds["sweep"] / seconds["plain"],
    }


def kfac(subject: Subject, device: str) -> Numbers:
    """Milliseconds of KFACVON's training steps: the first, later ones, and one that makes the eigenbases anew."""
    every = 5

    def make(model: nn.Module) -> vlearn.KFACVON:
        return vlearn.KFACVON(model, lr=0.01, ess=NUM_DATA, update_every=every, kfac_approx="reduce")

    call = synchronised(training_step(subject, device, make), device)
    took = []
    for _ in range(every + 1):
        start = time.perf_counter()
        call()
        took.append(1e3 * (time.perf_counter() - start))
    return {
        "KFACVON, first step, ms": took[0],
        "KFACVON, ms": statistics.median(took[2:-1]),  # the first two passes of a kind are checked
        "KFACVON, with new eigenbases, ms": took[-1],
    }


# -- all of it -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="in miniature; written only where --out says")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/accelerator.json")
    arguments = parser.parse_args(argv)
    device, quick = arguments.device, arguments.quick
    size, out = sizes(quick), arguments.out or (None if quick else RESULTS / "accelerator.json")
    command = f"python -m benchmarks.accelerator --device {device}" + (" --quick" if quick else "")
    found: dict[str, Any] = {**provenance(command, 0), "steps": {}, "networks": {}, "left out": []}
    start = time.perf_counter()

    def measure(label: str, part: Callable[[], None]) -> None:
        if time.perf_counter() - start > LAST_BEGIN:
            found["left out"].append(label)
        else:
            with what_fits(device):
                part()
        found["seconds"] = time.perf_counter() - start
        print(f"{found['seconds']:6.0f} s  {label}", file=sys.stderr)
        if out is not None:
            write_json(out, found)

    def put_steps(name: str, shapes: list[torch.Size]) -> None:
        found["steps"][name] = steps(shapes, size.rounds[0], device, compiled=not quick)

    def put(name: str, measured: Callable[[], Numbers]) -> None:
        found["networks"].setdefault(name, {}).update(measured())

    for name, shapes in size.parameters.items():
        measure(name, partial(put_steps, name, shapes))
    for name, subject in size.subjects.items():
        rounds = size.rounds[1]
        measure(f"{name}: training steps", partial(put, name, partial(training_steps, subject, rounds, device)))
        measure(f"{name}: sweeps", partial(put, name, partial(sweeps, subject, size.swept, rounds, device)))
        measure(f"{name}: KFACVON", partial(put, name, partial(kfac, subject, device)))
    report(found)


def report(found: dict[str, Any]) -> None:
    for name, rows in found["steps"].items():
        quantities = list(next(iter(rows.values())))
        cells = [[optimizer, *(_cell(row[quantity]) for quantity in quantities)] for optimizer, row in rows.items()]
        print_table(f"Draw and update, {name}", ["", *quantities], cells)
    if found["left out"]:
        print("left out for want of time:", ", ".join(found["left out"]))
    for name, row in found["networks"].items():
        print_table(name, ["", ""], [[quantity, _cell(value)] for quantity, value in row.items()])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    main()
