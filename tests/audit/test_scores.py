"""Scores of labels against what is computed one example at a time."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlearn.audit.scores import output_scores

N, C, T, L = 6, 5, 4, 3
G = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.double)


def labels(*shape):
    return torch.randint(0, C, shape, generator=G)


def of_one(z, y):
    """The columns of logits [C] and one label, in plain words."""
    p, truth = z.softmax(0), F.one_hot(torch.tensor(y), len(z))
    others = [z[k].item() for k in range(len(z)) if k != y]
    return {
        "loss": -p[y].log().item(),
        "margin": z[y].item() - max(others),
        "probability": p[y].item(),
        "agreement": float(z.argmax() == y),
        "prediction_error": ((p - truth).norm() / 2**0.5).item(),
    }


def assert_columns(scores, rows):
    assert scores.columns.keys() == rows[0].keys()
    for name, values in scores.columns.items():
        expected = torch.tensor([row[name] for row in rows], dtype=torch.double)
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)


def mean_of(rows):
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def test_one_label(monkeypatch):
    z, y = 3 * normal(N, C), labels(N)
    for chunk in (2**24, 7):
        monkeypatch.setattr("vlearn.audit.scores.CHUNK", chunk)
        scores = output_scores(z, y)
        assert_columns(scores, [of_one(z[n], int(y[n])) for n in range(N)])
    torch.testing.assert_close(scores.probabilities, z.softmax(1))
    assert torch.equal(scores.predicted, z.argmax(1)) and torch.equal(scores.label, y)


@pytest.mark.parametrize("dtype", [torch.double, torch.float32, torch.bfloat16], ids=str)
def test_an_output_that_is_probabilities_is_taken_as_such(dtype):
    p = (3 * normal(N, C)).softmax(1).to(dtype)
    y = labels(N)
    y[1] = -100
    scores, of_logits = output_scores(p, y), output_scores(p.double().log(), y)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.double else {"rtol": 1e-5, "atol": 1e-6}
    for name, values in of_logits.columns.items():
        torch.testing.assert_close(scores.columns[name].double(), values, equal_nan=True, msg=name, **tolerance)
    torch.testing.assert_close(scores.probabilities.double(), p.double() / p.double().sum(1, True), **tolerance)
    own = output_scores(p, y, lambda p, y: F.nll_loss(p.clamp(min=1e-30).log(), y, reduction="none")).columns
    torch.testing.assert_close(own["probability"], scores.columns["probability"], equal_nan=True)
    positions = (3 * normal(N, C, T)).softmax(1)
    y = labels(N, T)
    of_logits = output_scores(positions.log(), y).columns
    for name, values in output_scores(positions.movedim(1, 2).to(dtype), y).columns.items():
        torch.testing.assert_close(values.double(), of_logits[name], rtol=0.1, atol=0.1, msg=name)


def test_a_class_of_no_probability_is_possible_and_other_outputs_are_scores():
    p, y = torch.eye(C).double(), torch.arange(C).roll(1)
    assert output_scores(p, y).columns["loss"].isfinite().all()
    scores = p.clone()
    scores[0, 0] = 1.01  # a row's sum is not one
    torch.testing.assert_close(output_scores(scores, y).columns["loss"], F.cross_entropy(scores, y, reduction="none"))


def test_an_ignored_label_has_no_row():
    z, y = normal(N, C), labels(N)
    y[2] = -100
    scores = output_scores(z, y, nn.CrossEntropyLoss())
    assert scores.columns["loss"].isnan().nonzero().tolist() == [[2]] and scores.label[2] == -1
    y[2] = 1
    scores = output_scores(z, y, nn.CrossEntropyLoss(ignore_index=1))
    assert torch.equal(scores.columns["margin"].isnan(), y == 1)


@pytest.mark.parametrize("shape", [(N,), (N, 4, T)], ids=str)
def test_ignored_labels_may_lie_beyond_the_classes(shape):
    z, y = normal(N, C, *shape[1:]), labels(*shape)
    y.view(N, -1)[:2, 0] = 255
    scores = output_scores(z, y, nn.CrossEntropyLoss(ignore_index=255))
    counted = (y != 255).view(N, -1)
    rows = F.cross_entropy(z, y, ignore_index=255, reduction="none").view(N, -1)
    torch.testing.assert_close(scores.columns["loss"], rows.sum(1) / counted.sum(1), equal_nan=True)
    assert torch.equal(scores.columns["margin"].isnan(), ~counted.any(1))
    with pytest.raises(ValueError, match=r"marks what is ignored, give loss_fn=nn.CrossEntropyLoss\(ignore_index=255"):
        output_scores(z, y)


@pytest.mark.parametrize("classes_last", [False, True])
@pytest.mark.parametrize("loss_fn", [None, F.cross_entropy], ids=["default", "named"])
def test_a_sequence_is_the_mean_over_the_tokens_that_count(classes_last, loss_fn):
    z, y = 3 * normal(N, T, C), labels(N, T)
    y[0, 2:], y[3, 0] = -100, -100
    y[5] = -100  # has none
    scores = output_scores(z if classes_last else z.movedim(2, 1), y, loss_fn)
    for n in range(N - 1):
        rows = [of_one(z[n, t], int(y[n, t])) for t in range(T) if y[n, t] != -100]
        for name, value in mean_of(rows).items():
            assert scores.columns[name][n].item() == pytest.approx(value, rel=1e-10)
    assert all(values[5].isnan() for values in scores.columns.values())
    assert scores.predicted is None and scores.probabilities is None


def test_classes_that_may_be_in_two_dimensions_are_refused():
    z, y = normal(N, C, C), labels(N, C)
    with pytest.raises(ValueError, match="in either of two dimensions: give classes_last=True"):
        output_scores(z, y)
    for classes_last in (False, True):
        expected = F.cross_entropy(z.movedim(2, 1) if classes_last else z, y, reduction="none").mean(1)
        scores = output_scores(z, y, classes_last=classes_last)
        torch.testing.assert_close(scores.columns["loss"], expected)
        assert scores.classes_last is classes_last


@pytest.mark.parametrize("dtype", [torch.double, torch.long], ids=str)
def test_several_labels_are_their_mean(dtype):
    z, y = 2 * normal(N, L), (normal(N, L) > 0).to(dtype)
    scores = output_scores(z, y, nn.BCEWithLogitsLoss())
    rows = [
        mean_of([of_one(torch.stack([-z[n, j] / 2, z[n, j] / 2]), int(y[n, j])) for j in range(L)]) for n in range(N)
    ]
    assert_columns(scores, rows)
    torch.testing.assert_close(scores.probabilities, z.sigmoid())
    assert scores.label is None


@pytest.mark.parametrize("shape", [(N,), (N, 1)], ids=str)
def test_a_binary_label_has_two_classes(shape):
    z = 2 * normal(*shape)
    y = (normal(*shape) > 0).double()
    scores = output_scores(z, y, F.binary_cross_entropy_with_logits)
    rows = [of_one(torch.tensor([0.0, z.reshape(-1)[n]]).double(), int(y.reshape(-1)[n])) for n in range(N)]
    assert_columns(scores, rows)
    assert torch.equal(scores.label, y.reshape(-1).long()) and scores.probabilities.shape == (N, 2)


def test_a_loss_of_its_own_takes_the_place_of_cross_entropy_alone():
    z, y, weight = normal(N, C), labels(N), normal(C).exp()
    scores = output_scores(z, y, nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1))
    expected = F.cross_entropy(z, y, weight, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(scores.columns["loss"], expected)
    torch.testing.assert_close(scores.columns["margin"], output_scores(z, y).columns["margin"])
    torch.testing.assert_close(output_scores(z.log_softmax(1), y, F.nll_loss).columns, output_scores(z, y).columns)


def test_soft_labels_count_as_their_largest():
    z, y = normal(N, C), normal(N, C).softmax(1)
    scores = output_scores(z, y, F.cross_entropy)
    torch.testing.assert_close(scores.columns["loss"], F.cross_entropy(z, y, reduction="none"))
    assert torch.equal(scores.label, y.argmax(1))


@pytest.mark.parametrize("loss_fn", [F.mse_loss, partial(F.huber_loss, delta=0.5)], ids=["mse", "huber"])
def test_a_regression_has_a_loss_alone(loss_fn):
    z, y = normal(N, 2), normal(N, 2)
    scores = output_scores(z, y, loss_fn)
    torch.testing.assert_close(scores.columns, {"loss": loss_fn(z, y, reduction="none").mean(1)})
    with pytest.raises(ValueError, match="is no label of an output .* give the training loss as loss_fn"):
        output_scores(z, y)


def test_labels_that_do_not_fit_the_output_are_refused():
    with pytest.raises(ValueError, match=r"the target holds class 7, but the output \(6, 5\) has 5 classes"):
        output_scores(normal(N, C), torch.full((N,), 7))
    with pytest.raises(ValueError, match="has no classes for targets"):
        output_scores(normal(N, C, 3), labels(N, 4))


@pytest.mark.parametrize("loss_fn", [None, F.binary_cross_entropy_with_logits], ids=["classes", "several labels"])
def test_an_output_that_is_nan_agrees_with_no_label(loss_fn):
    z = normal(N, C)
    z[2] = torch.nan
    y = torch.zeros(N, dtype=torch.long) if loss_fn is None else torch.zeros(N, C)
    scores = output_scores(z, y, loss_fn)
    for values in scores.columns.values():
        assert values.isnan().nonzero().tolist() == [[2]]
    one = output_scores(z if loss_fn is None else z[:, :1], y if loss_fn is None else y[:, :1], loss_fn)
    assert one.predicted is not None and one.predicted[2] == -1 and (one.predicted[3:] >= 0).all()


def test_half_precision_is_widened_and_no_gradient_is_kept():
    z = normal(N, C).half().requires_grad_()
    columns = output_scores(z, labels(N)).columns
    assert all(values.dtype == torch.float32 and not values.requires_grad for values in columns.values())
