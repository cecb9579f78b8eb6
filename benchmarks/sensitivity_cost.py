"""What sensitivities cost, as multiples of the training step that they come from.

    python -m benchmarks.sensitivity_cost [--smoke]

Medians over interleaved rounds in one process, for one and two threads; the unit is one plain forward and backward
pass of the same unwatched model on the same batch. "live" rows include the training step's own forward and backward
pass; "sweep" is the whole pass over a batch at the mean. The last rows are how the same is computed without vlearn, on
as few examples as finish soon, scaled to the batch:

    vmap(grad)      every example's gradient, then its product with the posterior variance: the self-influence
    vmap(jacrev)    every example's Jacobian, then diag(J Σ Jᵀ), the published code of the memory-perturbation paper
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlearn
from benchmarks.networks import LanguageModel, lenet5, mlp, resnet20_frn
from benchmarks.report import medians, print_table, provenance, write_json

RESULTS = Path(__file__).parent / "results"
COLORS = ("#56B4E9", "#0072B2", "#F0C24B", "#D55E00")
PEER_ROUNDS = 3


def next_token(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction=reduction)


@dataclass(frozen=True)
class Subject:
    """A network, its batch, and on how many of its examples the other methods are timed; None: too large for them."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    rounds: int
    with_gradients: int = 32
    with_jacobians: int | None = 4
    tokens: bool = False
    size: tuple[int, ...] = (1, 28, 28)

    @property
    def loss(self) -> Callable[..., Tensor]:
        return next_token if self.tokens else F.cross_entropy

    def data(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        if self.tokens:
            x = torch.randint(256, (self.batch, 65))
            return x[:, :-1], x[:, 1:]
        return torch.randn(self.batch, *self.size), torch.randint(10, (self.batch,))


SUBJECTS = (
    Subject("MLP 784-500-300-10", lambda: mlp(784, 500, 300, 10), batch=256, rounds=41),
    Subject("LeNet-5", lenet5, batch=256, rounds=41),
    Subject("ResNet-20-FRN", resnet20_frn, batch=32, rounds=11, with_gradients=8, size=(3, 32, 32)),
    # The Jacobian of one sequence has 64 x 256 rows of a million entries.
    Subject("GPT, 1M", LanguageModel, batch=16, rounds=15, with_gradients=8, with_jacobians=None, tokens=True),
)


def sensitivity_cost(subject: Subject) -> dict[str, float]:
    """Milliseconds of a plain step, and multiples of it."""
    x, y = subject.data()
    plain, watched, swept = subject.build(), subject.build(), subject.build()
    optimizer = vlearn.IVON(watched, lr=0.1, ess=60_000, hess_init=0.1)
    posterior = vlearn.IVON(swept.named_parameters(), lr=0.1, ess=60_000, hess_init=0.1).posterior()

    def training_step(model: nn.Module) -> None:
        model.zero_grad()
        subject.loss(model(x), y).backward()

    def live(deviation: bool | None) -> Callable[[], None]:
        def call() -> None:
            training_step(watched)
            if deviation is not None:
                optimizer.sensitivities(deviation=deviation)

        return call

    def sweep(leverage: str | None) -> Callable[[], None]:
        return lambda: vlearn.sweep(swept, posterior, [(x, y)], subject.loss, leverage=leverage) and None

    seconds = medians(
        {
            "plain": lambda: training_step(plain),
            "watched, nothing asked": live(None),
            "live self-influence": live(False),
            "live with deviation": live(True),
            "sweep with LOO": sweep(None),
            "sweep with LOO and leverage": sweep("probe"),
        },
        subject.rounds,
    )
    base = seconds.pop("plain")
    multiples = {name: value / base for name, value in seconds.items()}
    return {"plain step, ms": 1e3 * base} | multiples | without_vlearn(subject, plain, posterior.variance, base)


def without_vlearn(subject: Subject, model: nn.Module, variance: dict[str, Tensor], base: float) -> dict[str, float]:
    """Multiples of a plain step of the whole batch, scaled from a few examples."""
    x, y = subject.data()
    values = {name: p.detach() for name, p in model.named_parameters()}

    def output(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, values, (one.unsqueeze(0),))

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return subject.loss(output(values, one), label.unsqueeze(0))

    def by_gradients(n: int) -> None:
        gradients = vmap(grad(loss), (None, 0, 0))(values, x[:n], y[:n])
        sum(g.square().flatten(1) @ variance[name].flatten() for name, g in gradients.items())

    def by_jacobians(n: int) -> None:
        jacobians = vmap(jacrev(lambda values, one: output(values, one).squeeze(0)), (None, 0))(values, x[:n])
        sum(j.square().flatten(2) @ variance[name].flatten() for name, j in jacobians.items())

    found = {"vmap(grad), scaled": float("nan"), "vmap(jacrev), scaled": float("nan")}
    for name, call, n in zip(
        found, (by_gradients, by_jacobians), (subject.with_gradients, subject.with_jacobians), strict=True
    ):
        if n is not None:
            n = min(n, subject.batch)
            with sdpa_kernel(SDPBackend.MATH):  # vmap would go through the fused one example by example
                seconds = medians({name: lambda call=call, n=n: call(n)}, PEER_ROUNDS)[name]
            found[name] = seconds * subject.batch / n / base
    return found


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """Bars: multiples of a plain training step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    asked = [name for name in next(iter(found.values())) if "ms" not in name and "scaled" not in name]
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
    for threads in (1,) if arguments.smoke else (1, 2):
        torch.set_num_threads(threads)
        for subject in SUBJECTS:
            if arguments.smoke:
                subject = replace(subject, batch=max(2, subject.batch // 16), rounds=2, with_gradients=2)
            print(f"{subject.name}, {threads} threads ...", file=sys.stderr)
            found[f"{subject.name}, batch {subject.batch}, threads={threads}"] = sensitivity_cost(subject)
    rows = [
        [quantity, *(f"{column[quantity]:.2f}" for column in found.values())] for quantity in next(iter(found.values()))
    ]
    print_table(
        "Multiples of one plain forward + backward pass",
        ["", *found],
        rows,
        ["scaled: timed on a few examples, times batch / examples; nan: one example's Jacobian takes 66 GB"],
    )
    if not arguments.smoke:
        command = "python -m benchmarks.sensitivity_cost"
        write_json(RESULTS / "sensitivity_cost.json", {**provenance(command, 0), "multiples": found})
        draw(found, RESULTS / "sensitivity_cost.png")


if __name__ == "__main__":
    main()
