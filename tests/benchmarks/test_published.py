"""The published estimates are what the paper's code computes: diagonals alone, and single removals averaged."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from benchmarks.reference.published import diagonal_sweep, leave_class_out
from tests.oracles.per_example import per_example, relative_error
from tests.oracles.refits import diagonal_over_classes
from tests.sensitivity.test_closed_form import at, logistic
from tests.sensitivity.test_leave_group_out import LABELS, arguments_of, inputs, three_classes


def swept(model, posterior, loader):
    return vlearn.sweep(model, posterior, loader, F.cross_entropy, None, progress=False)


def test_the_published_shortcut_keeps_diagonals_alone():
    oracle, model, posterior = logistic()
    truth = per_example(model, lambda m: m(oracle.x), lambda f: F.cross_entropy(f, oracle.y, reduction="none"))
    v = truth.output_covariance(torch.linalg.inv(oracle.hessian(model.weight.detach())))
    table = diagonal_sweep(model, posterior, [(oracle.x, oracle.y)], F.cross_entropy)
    shortcut = diagonal_over_classes(truth.residual, v)
    assert relative_error(table.deviation, shortcut) < 1e-8  # clamps
    rows = F.cross_entropy(truth.output + shortcut, oracle.y, reduction="none").clamp_max(10 * math.log(10))
    assert relative_error(table.loo_loss, rows) < 1e-8
    diagonals = truth.hessian.diagonal(dim1=1, dim2=2) * v.diagonal(dim1=1, dim2=2)
    assert relative_error(table.leverage, diagonals.sum(1)) < 1e-8


def test_the_published_shortcut_clamps_what_is_certain():
    model = at(nn.Linear(2, 2, bias=False).double(), torch.tensor([[60.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    x, y = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), torch.tensor([0, 0])
    posterior = vlearn.posterior.Full({"weight": model.weight.detach()}, torch.eye(4, dtype=torch.float64), 2)
    table = diagonal_sweep(model, posterior, [(x, y)], F.cross_entropy)
    assert torch.allclose(table.deviation[0], torch.tensor([1e-10, 1e-10], dtype=torch.float64), atol=0)
    assert torch.allclose(table.deviation[1].abs(), torch.tensor([1 - 1e-10] * 2, dtype=torch.float64), atol=0)
    assert float(table.loo_loss[1]) == pytest.approx(10 * math.log(10))


def test_batches_of_the_published_shortcut_are_put_together_in_loader_order():
    model, posterior, _ = arguments_of()
    x = inputs()
    whole = diagonal_sweep(model, posterior, [(x, LABELS)], F.cross_entropy)
    parts = diagonal_sweep(model, posterior, [(x[:5], LABELS[:5]), (x[5:], LABELS[5:])], F.cross_entropy)
    assert torch.equal(parts.index, torch.arange(12))
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(parts[1:], whole[1:], strict=True))


def test_the_published_shortcut_of_another_loss_is_refused():
    model, posterior, loader = arguments_of()
    with pytest.raises(ValueError, match="with another loss than softmax cross-entropy of class labels"):
        diagonal_sweep(model, posterior, loader, nn.CrossEntropyLoss(label_smoothing=0.1))


@pytest.mark.parametrize(("prior_precision", "published"), [(1.0, 0.379), (60.0, 0.559)])
def test_the_published_estimate_hardly_sees_that_a_class_is_gone(prior_precision, published):
    """Refits without the class lose 3.586 and 1.497 on it (tests/sensitivity/test_leave_group_out.py)."""
    oracle, model, posterior, loader = three_classes(prior_precision)
    found = leave_class_out(swept(model, posterior, loader), oracle.y)
    assert float(found[0]) == pytest.approx(published, abs=2e-3)


def test_the_published_estimate_averages_what_leaving_one_out_gives_in_any_order():
    model, posterior, loader = arguments_of()
    rows = swept(model, posterior, loader)
    dataset = vlearn.IndexedDataset(TensorDataset(inputs(), LABELS))
    shuffled = swept(model, posterior, DataLoader(dataset, batch_size=5, shuffle=True))
    for table in (rows, shuffled):
        found = leave_class_out(table, LABELS)
        for k in range(3):
            assert relative_error(found[k], rows.loo_loss[LABELS == k].mean()) < 1e-12
