"""What each structure of Σ buys: predicted against retrained removals, at a minimum of a small network's loss.

    python -m benchmarks.fidelity [--seed 0] [--out FILE]

Digits, 1,000 training examples, MLP 64-16-10. IVON trains it; L-BFGS in float64 goes on to the minimum; there every Σ
is the inverse of a Gauss-Newton matrix of the same loss, whole or cut down to a structure, and predicts what removing
each example would do to its own loss. 80 examples are retrained without.

Rank correlations are no measure: they are above .97 for all of these. See the mean leave-one-out loss against the test
loss, Pearson's correlation with retraining and the slope of the truth over the prediction, which is 1 where the size
is right. The refined form needs the exact Σ: with any other it exaggerates.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks import laplace, report, tracking
from benchmarks.agreement import agreement
from benchmarks.digits import change, in_float64
from benchmarks.networks import mlp
from benchmarks.removals import Minimum, Retraining
from benchmarks.training import Digits, Settings, epochs
from vlearn.posterior import Diagonal, Factors, Full, Kronecker, Mixed, from_laplace
from vlearn.posterior.base import Posterior
from vlearn.sensitivity.sweep import SensitivityTable

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
SETTINGS = Settings(epochs=300, hess_init=0.1, beta2=0.9995, retrained=80)
PRIOR_PRECISIONS = (1.0, 5.0)
BY_LAPLACE = "K-FAC of laplace-torch"
STRUCTURES = ("full", "block-diagonal by layer", "EK-FAC", "K-FAC", BY_LAPLACE, "diagonal", "IVON's state")


def train(
    settings: Settings, data: Digits, each_epoch: Callable[[int, nn.Module], None] = lambda epoch, model: None
) -> tuple[nn.Module, Diagonal]:
    """A network of 1,210 parameters at IVON's mean, with its posterior."""
    torch.manual_seed(settings.seed)
    model = mlp(64, 16, 10)
    optimizer = vlearn.IVON(
        model,
        lr=settings.lr,
        ess=settings.num_data,
        hess_init=settings.hess_init,
        beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    for epoch in epochs(model, optimizer, settings, data):
        each_epoch(epoch, model)
    optimizer.unwatch()
    return model, optimizer.posterior().clone()


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer: a ``[N, I]`` its inputs with a 1 for the bias, b ``[N, C, O]`` gradients along Λ's root."""

    names: tuple[str, str]
    a: Tensor
    b: Tensor


def layers_of(model: nn.Module, x: Tensor) -> list[Layer]:
    """What each layer of a softmax classifier contributes to J_nᵀ R_n, R_n R_nᵀ = Λ_n."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: found.update({name: (args[0].detach(), output)})

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    output = model(x)
    for handle in handles:
        handle.remove()
    p = output.detach().softmax(1)
    root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)  # Λ = diag p - p pᵀ = R Rᵀ
    outputs = [each for _, each in found.values()]
    columns = [torch.autograd.grad(output, outputs, column, retain_graph=True) for column in root.unbind(2)]
    return [
        Layer(
            (f"{name}.weight", f"{name}.bias"),
            torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1),
            torch.stack([column[i] for column in columns], 1),
        )
        for i, (name, (inputs, _)) in enumerate(found.items())
    ]


def gauss_newton(layers: list[Layer]) -> Tensor:
    """Σ_n J_nᵀΛ_nJ_n ``[P, P]`` in the order of the layers' names."""
    parts = []
    for layer in layers:
        matrix = layer.b.unsqueeze(3) * layer.a[:, None, None]  # [N, C, O, I]
        parts += [matrix[..., :-1].flatten(2), matrix[..., -1]]
    rows = torch.cat(parts, 2).flatten(0, 1)
    return rows.mT @ rows


def posteriors(model: nn.Module, data: Digits, prior_precision: float, ivon: Diagonal) -> dict[str, Posterior]:
    """Every structure at the weights of a float64 model."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    num_data = len(data.y)
    layers = layers_of(model, data.x.double())
    whole = gauss_newton(layers) + prior_precision * torch.eye(sum(p.numel() for p in mean.values())).double()
    sizes = [sum(mean[name].numel() for name in layer.names) for layer in layers]
    decay, ess = dict.fromkeys(mean, prior_precision / num_data), dict.fromkeys(mean, float(num_data))
    by_layer, start = [], 0
    for layer, size in zip(layers, sizes, strict=True):
        block = slice(start, start + size)
        by_layer.append(Full({name: mean[name] for name in layer.names}, whole[block, block], num_data))
        start += size
    kfac = kfac_of(layers)
    ekfac = {layer.names: corrected(layer, kfac[layer.names]) for layer in layers}
    entries = whole.diagonal().split([p.numel() for p in mean.values()])
    diagonal = {name: part.reshape(p.shape) for (name, p), part in zip(mean.items(), entries, strict=True)}
    la = laplace.fit(model, data.x.double(), data.y, "kron", prior_precision)
    found = {
        "full": Full(mean, whole, num_data),
        "block-diagonal by layer": Mixed(by_layer),
        "EK-FAC": Kronecker(mean, ekfac, decay, ess, num_data),
        "K-FAC": Kronecker(mean, kfac, decay, ess, num_data),
        BY_LAPLACE: from_laplace(la),
        "diagonal": Diagonal.from_precision(mean, diagonal, num_data, prior_precision),
        "IVON's state": in_float64(ivon),
    }
    return {name: found[name] for name in STRUCTURES}


def kfac_of(layers: list[Layer]) -> dict[tuple[str, ...], Factors]:
    """K-FAC's factors of every layer."""
    return {layer.names: Factors.of(*covariances(layer)) for layer in layers}


def covariances(layer: Layer) -> tuple[Tensor, Tensor]:
    """K-FAC's A, of the inputs, and B, of the output gradients, both means over the examples."""
    b = layer.b.flatten(0, 1)
    return layer.a.mT @ layer.a / len(layer.a), b.mT @ b / len(layer.a)


def corrected(layer: Layer, factors: Factors) -> Factors:
    """EK-FAC: s = mean over the examples of (Q_Bᵀ G Q_A)², summed over the cotangents."""
    assert factors.in_basis is not None and factors.out_basis is not None
    a, b = layer.a @ factors.in_basis, layer.b @ factors.out_basis
    return dataclasses.replace(factors, hessian=b.square().sum(1).mT @ a.square() / len(a))


def sweep(model: nn.Module, posterior: Posterior, data: Digits, refined: bool = False) -> SensitivityTable:
    batches = list(zip(data.x.double().split(250), data.y.split(250), strict=True))
    return vlearn.sweep(model, posterior, batches, F.cross_entropy, None, progress=False, refined=refined)


def minimum_of(
    settings: Settings, data: Digits, each_epoch: Callable[[int, nn.Module], None] = lambda epoch, model: None
) -> tuple[Retraining, Minimum, nn.Module, Diagonal]:
    """The retraining problem, its minimum near IVON's mean, the float64 model there, and IVON's posterior."""
    model, ivon = train(settings, data, each_epoch)
    problem = Retraining(model, data.x, data.y, settings.prior_precision)
    minimum = problem.from_weights_of(model)
    return problem, minimum, problem.model_at(minimum), ivon


def compare(settings: Settings, data: Digits, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Train, go to the minimum, predict with every structure, retrain."""
    problem, minimum, model, ivon = minimum_of(settings, data)
    say(f"δ = {settings.prior_precision:g}: trained")
    with torch.no_grad():
        train_loss = F.cross_entropy(model(data.x.double()), data.y).item()
        test_loss = F.cross_entropy(model(data.x_test.double()), data.y_test).item()
    found = posteriors(model, data, settings.prior_precision, ivon)
    tables = {name: sweep(model, posterior, data) for name, posterior in found.items()}
    refined = {name: sweep(model, posterior, data, refined=True) for name, posterior in found.items()}
    ranks = np.argsort(tables["full"].self_influence.numpy(), kind="stable")
    examples = ranks[np.linspace(0, settings.num_data - 1, settings.retrained).round().astype(int)]
    truth, unconverged = [], int(not minimum.converged)
    for example, refit in zip(examples, problem.without(examples.tolist(), minimum, report.cores()), strict=True):
        truth.append(problem.loss(refit, example) - problem.loss(minimum, example))
        unconverged += not refit.converged
        say(f"δ = {settings.prior_precision:g}: {len(truth)} of {len(examples)} retrained")
    rows = {}
    for name in STRUCTURES:
        pearson, slope = agreement(change(tables[name])[examples], np.array(truth))
        refined_pearson, refined_slope = agreement(change(refined[name])[examples], np.array(truth))
        rows[name] = {
            "loo_loss": tables[name].loo_loss.mean().item(),
            "pearson": pearson,
            "slope": slope,
            "refined_loo_loss": refined[name].loo_loss.mean().item(),
            "refined_pearson": refined_pearson,
            "refined_slope": refined_slope,
            "refined_fallbacks": refined[name].refined_fallbacks,
        }
    return {
        "prior_precision": settings.prior_precision,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "unconverged": unconverged,
        "structures": rows,
        "examples": examples,
        "retrained_change": truth,
        "predicted_change": {name: change(table)[examples] for name, table in tables.items()},
    }


def print_results(results: list[dict[str, Any]]) -> None:
    for result in results:
        rows = [
            (
                name,
                f"{row['loo_loss']:.3f}",
                f"{row['pearson']:.3f}",
                f"{row['slope']:.2f}",
                f"{row['refined_loo_loss']:.3f}",
                f"{row['refined_pearson']:.3f}",
                f"{row['refined_slope']:.2f}",
                str(row["refined_fallbacks"]),
            )
            for name, row in result["structures"].items()
        ]
        title = (
            f"δ = {result['prior_precision']:g}: train {result['train_loss']:.3f}, test {result['test_loss']:.3f}; "
            "mean leave-one-out loss, and agreement with retraining"
        )
        header = ("Σ", "LOO", "Pearson", "slope", "refined: LOO", "Pearson", "slope", "fell back")
        report.print_table(title, header, rows)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="numbers; default benchmarks/results/fidelity.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are small; retraining runs one network to a core
    settings = dataclasses.replace(SETTINGS, seed=arguments.seed)
    data = Digits.load(settings, standardised=False)
    try:
        with report.progress() as say:
            results = [
                compare(dataclasses.replace(settings, prior_precision=delta), data, say) for delta in PRIOR_PRECISIONS
            ]
    except KeyboardInterrupt:
        return 130
    command = f"python -m benchmarks.fidelity --seed {arguments.seed}"
    report.write_json(arguments.out, {**report.provenance(command, arguments.seed), "results": results})
    print_results(results)
    table = {f"δ = {each['prior_precision']:g}": each["structures"] for each in results}
    print(tracking.log_results("fidelity", dataclasses.asdict(settings), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
