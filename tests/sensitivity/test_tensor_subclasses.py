"""Subclasses of tensors that override torch's functions, as MONAI's MetaTensor, count as the tensors that they are.

`Marked` carries a mark through every operation, and has its own way with what per-example algebra is made of.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.oracles.per_example import relative_error
from tests.sensitivity.small import (
    LABELS,
    C,
    D,
    N,
    PlainNorm,
    covariance_of,
    inputs,
    network,
    optimizer_of,
    truth_at,
    weights_of,
)


class Marked(Tensor):
    mark: str

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        marks = [getattr(each, "mark", "none") for each in args if isinstance(each, Marked)]
        if func is Tensor.__getitem__ and isinstance(args[1], slice):
            raise ValueError("a part of a batch has a mark of its own")
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Marked):
            result.mark = marks[0] if marks else "none"
        return result

    def new_empty(self, size: tuple[int, ...], **kwargs):
        if not isinstance(size, tuple):
            raise TypeError("size must be a tuple of ints")
        return super().new_empty(size, **kwargs)


def marked(tensor):
    result = tensor.as_subclass(Marked)
    result.mark = "seen"
    return result


class WithoutRule(nn.Module):
    """A part of the network that only the fallback serves, and one called once for all examples."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.places = nn.Embedding(1, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.scale * self.fc(x) + self.places(torch.zeros(1, dtype=torch.long))


MODELS = {
    "rules": network,
    "fallback": lambda: network(PlainNorm(8)),
    "whole": lambda: network(WithoutRule()).double(),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def test_the_class_is_there_and_stands_in_the_way():
    x = marked(inputs())
    assert (network()(x)).mark == "seen"
    with pytest.raises(TypeError):
        x.new_empty(1)
    with pytest.raises(ValueError):
        x[:2]


@each_model
@pytest.mark.parametrize("kind", ["IVON", "VON", "VOGN", "KFACVON", "FullVON"])
def test_a_step_and_its_rows_are_those_of_plain_tensors(build, kind):
    results = []
    for x, y in ((inputs(), LABELS), (marked(inputs()), marked(LABELS))):
        torch.manual_seed(3)
        model = build()
        optimizer = getattr(vlearn, kind)(model, lr=0.05, ess=100.0)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        s = optimizer.sensitivities(deviation=True)
        some = optimizer.sensitivities(deviation=True, examples=[4, 1])
        results.append((s.residual, s.self_influence, s.deviation, some.deviation, *weights_of(model).values()))
    for plain, of_marked in zip(*results, strict=True):
        assert type(of_marked) is Tensor and torch.equal(plain, of_marked)


@each_model
def test_live_rows_equal_the_oracle(build):
    model = build()
    optimizer = optimizer_of(model)
    F.cross_entropy(model(marked(inputs())), marked(LABELS)).backward()
    s, weights = optimizer.sensitivities(deviation=True), weights_of(model)
    covariance = covariance_of(optimizer, model)
    truth = truth_at(weights, build(), inputs())
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


@each_model
def test_what_is_read_from_a_loader_is_that_of_plain_tensors(build):
    model = build()
    posterior = optimizer_of(model).posterior()
    plain, own = [(inputs(), LABELS)], [(marked(inputs()), marked(LABELS))]
    truth = truth_at(weights_of(model), build(), inputs())
    covariance = torch.diag(torch.cat([posterior.variance[name].flatten() for name in posterior.names]))
    for leverage in ("exact", "probe"):
        tables = [
            vlearn.sweep(
                model,
                posterior,
                loader,
                F.cross_entropy,
                leverage,
                refined=leverage == "exact",
                generator=torch.Generator().manual_seed(1),
                progress=False,
            )
            for loader in (plain, own)
        ]
        for name in ("loss", "loo_loss", "deviation", "self_influence", "leverage"):
            left, right = (getattr(table, name) for table in tables)
            assert type(right) is Tensor and torch.equal(left, right)
    assert relative_error(tables[1].self_influence, truth.self_influence(covariance)) < 1e-10
    values = [vlearn.influence(model, posterior, each, each, F.cross_entropy).values for each in (plain, own)]
    assert type(values[1]) is Tensor and torch.equal(*values)
    gradients = truth.gradients @ covariance @ truth.gradients.T
    assert relative_error(values[1], gradients) < 1e-10
    groups = [vlearn.leave_group_out(model, posterior, each, LABELS, F.cross_entropy) for each in (plain, own)]
    for name in ("loss", "left_out_loss"):
        left, right = (getattr(table, name) for table in groups)
        assert type(right) is Tensor and torch.equal(left, right)
    probabilities = [
        vlearn.predict(model, posterior, x, draws=3, generator=torch.Generator().manual_seed(1))
        for x in (inputs(), marked(inputs()))
    ]
    assert probabilities[0].shape == (N, C) and torch.equal(*probabilities)


def test_a_class_that_holds_its_entries_otherwise_is_left_as_it_is():
    class Wrapped(Tensor):
        @staticmethod
        def __new__(cls, inner):
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            opened = [each.inner if isinstance(each, Wrapped) else each for each in args]
            return Wrapped(func(*opened, **(kwargs or {})))

    from vlearn.capture.pytrees import detached, plain

    x = Wrapped(torch.ones(2, D))
    assert plain(x) is x and isinstance(detached(x), Wrapped)
    assert type(plain(marked(inputs()))) is Tensor
    parameter = nn.Parameter(torch.ones(2))
    assert plain(parameter) is parameter
