"""A model that ends in log_softmax has the posterior, and the sensitivities, of its logits and cross-entropy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.oracles.per_example import relative_error
from vlearn.losses.log_probabilities import LogProbabilities
from vlearn.posterior.fit import STRUCTURES

N, D, C, T = 12, 4, 3, 5
EXACT: dict[str, Any] = {"curvature": "ggn-exact", "prior_precision": 1.0, "progress": False}
WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
IGNORED = torch.arange(N) % 4 == 0
LABELS = torch.arange(N) % C
SHARES = torch.rand(N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(1)
# name: (loss of log-probabilities, of logits, target)
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]] = {
    "labels": (F.nll_loss, F.cross_entropy, LABELS),
    "class weights": (partial(F.nll_loss, weight=WEIGHT), partial(F.cross_entropy, weight=WEIGHT), LABELS),
    "ignored labels": (F.nll_loss, F.cross_entropy, LABELS.masked_fill(IGNORED, -100)),
    "sums": (nn.NLLLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "soft labels": (nn.KLDivLoss(reduction="batchmean"), F.cross_entropy, SHARES),
}


def network(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C), *last).double()


def inputs() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def networks(loss: str = "labels") -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """(Network, loss) of the log-probabilities, and of the logits."""
    return list(zip((network(nn.LogSoftmax(1)), network()), LOSSES[loss][:2], strict=True))


def both(target: Tensor = LABELS, loss: str = "labels", **options: Any) -> list[tuple[Any, Any]]:
    """(Posterior, sweep) of the log-probabilities, and of the logits."""
    found = []
    for model, loss_fn in networks(loss):
        loader = [(inputs()[:7], target[:7]), (inputs()[7:], target[7:])]
        fit = vlearn.posterior.fit(model, loader, loss_fn, **{**EXACT, **options})
        found.append((fit, vlearn.sweep(model, fit, loader, loss_fn, "exact", refined=True, progress=False)))
    return found


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_has_the_curvature_of_the_logits(structure: str) -> None:
    (of_log_p, _), (of_logits, _) = both(structure=structure)
    for name, variance in of_logits.variance.items():
        assert relative_error(of_log_p.variance[name], variance) < 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_every_number_of_an_example_is_that_of_the_logits(loss: str) -> None:
    (_, of_log_p), (_, of_logits) = both(LOSSES[loss][2], loss, structure="full")
    for name in ("self_influence", "leverage", "used_first_order"):
        assert relative_error(getattr(of_log_p, name).double(), getattr(of_logits, name).double()) < 1e-9, name
    # A divergence is less than the cross-entropy by the entropy of the labels.
    assert relative_error(of_log_p.loo_loss - of_log_p.loss, of_logits.loo_loss - of_logits.loss) < 1e-9


def test_the_most_likely_prior_precision_and_removals_of_groups_are_those_of_the_logits() -> None:
    found = []
    for model, loss_fn in networks():
        loader = [(inputs(), LABELS)]
        fit = vlearn.posterior.fit(
            model, loader, loss_fn, "full", **{**EXACT, "prior_precision": "marginal-likelihood"}
        )
        left_out = vlearn.leave_group_out(model, fit, loader, {0: [0, 5]}, loss_fn, refine=30, progress=False)
        found.append((fit.prior_precision["0.weight"], left_out.left_out_loss))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert relative_error(found[0][1], found[1][1]) < 1e-6


class Tagger(nn.Module):
    """log p of every position ``[N, C, T]``, or logits; zeros where the input is padding."""

    def __init__(self, normalised: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.normalised = nn.Linear(D, C).double(), normalised

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x)
        scores = scores.log_softmax(-1) if self.normalised else scores
        return (scores * x.abs().sum(-1, keepdim=True).gt(0)).mT


TAGGERS = ((Tagger(True), F.nll_loss), (Tagger(False), F.cross_entropy))


def sequences() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(N * T).reshape(N, T) % C


def test_probes_of_sequences_are_those_of_the_logits() -> None:
    """The same signs times the same roots."""
    options = {"structure": "diagonal", "draws": 3, "progress": False}
    found = [
        vlearn.posterior.fit(model, [sequences()], loss_fn, generator=torch.Generator().manual_seed(0), **options)
        for model, loss_fn in TAGGERS
    ]
    assert relative_error(found[0].variance["layer.weight"], found[1].variance["layer.weight"]) < 1e-9


def test_padding_between_log_probabilities_keeps_its_own_values() -> None:
    x, y = sequences()
    x[0, 1:], y[0, 1:] = 0, -100
    batches, found = [(x[:3], y[:3]), (x[3:], y[3:])], []
    for model, loss_fn in TAGGERS:
        fit = vlearn.posterior.fit(model, batches, loss_fn, "full", **EXACT)
        found.append(vlearn.sweep(model, fit, batches, loss_fn, "exact", progress=False))
    for name in ("loss", "leverage", "loo_loss", "prediction_error"):
        assert relative_error(getattr(found[0], name), getattr(found[1], name)) < 1e-9, name


def test_a_loss_that_curves_in_the_log_probabilities_keeps_its_own_curvature() -> None:
    x, y = inputs(), SHARES.log()
    model = network(nn.LogSoftmax(1))
    fit = vlearn.posterior.fit(model, [(x, y)], F.mse_loss, "full", **EXACT)
    table = vlearn.sweep(model, fit, [(x, y)], F.mse_loss, "exact", progress=False)
    # Λ = 2/C I, so that Σ tr(ΛV) = P - δ tr Σ.
    count = sum(p.numel() for p in model.parameters())
    trace = sum(float(each.sum()) for each in fit.variance.values())
    assert float(table.leverage.sum()) == pytest.approx(count - trace, rel=1e-6)


def test_a_loss_that_curves_is_told_from_a_linear_one_in_bfloat16() -> None:
    """Of a focal loss the residual is -s at the label alone, whatever the dtype."""

    def focal(log_p: Tensor, labels: Tensor) -> Tensor:
        own = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
        return -(1 - own.exp()).square() * own

    found = []
    for dtype in (torch.float64, torch.bfloat16):
        model = network(nn.LogSoftmax(1)).to(dtype)
        posterior = vlearn.IVON(model, lr=0.1, ess=N).posterior()
        table = vlearn.sweep(model, posterior, [(inputs().to(dtype), LABELS)], focal, leverage=None, progress=False)
        found.append(table.prediction_error.double())
    assert relative_error(found[1], found[0]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_log_probabilities_of_many_classes_are_seen(dtype: torch.dtype) -> None:
    scores = 5 * torch.randn(8, 30_000, generator=torch.Generator().manual_seed(0))
    for output in (scores.log_softmax(1).to(dtype), scores.log_softmax(1).to(dtype).float()):
        found = LogProbabilities.of(output)
        assert found is not None and bool(found.there.all())
        torch.testing.assert_close(found.as_logits(output), output, rtol=1e-2, atol=1e-5)
    assert LogProbabilities.of(scores.to(dtype)) is None


def test_live_prediction_errors_are_those_of_the_logits() -> None:
    found = []
    for model, loss_fn in networks():
        optimizer = vlearn.IVON(model, lr=0.1, ess=N, generator=torch.Generator().manual_seed(0))
        loss_fn(model(inputs()), LABELS).backward()
        found.append([optimizer.sensitivities(examples=each) for each in (None, [2, 5])])
    for of_log_p, of_logits in zip(*found, strict=True):
        assert relative_error(of_log_p.prediction_error, of_logits.prediction_error) < 1e-10
        assert relative_error(of_log_p.self_influence, of_logits.self_influence) < 1e-10


@pytest.mark.parametrize("curvature", ["ggn", "ggn-exact"])
@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "full"])
def test_a_fit_of_a_loss_without_curvature_is_refused(structure: str, curvature: str) -> None:
    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.network(x), y, reduction="none")

    model, loader = Losses(), [({"x": inputs(), "y": LABELS}, LABELS)]
    fit = partial(vlearn.posterior.fit, model, loader, lambda losses, _: losses, structure, progress=False)
    with pytest.raises(ValueError, match="no curvature in the output"):
        fit(curvature=curvature)
    assert fit(curvature="empirical").mean
