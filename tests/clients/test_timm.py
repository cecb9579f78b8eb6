"""timm's factory makes the optimizer from a registered class, with groups with and without weight decay."""

from __future__ import annotations

from typing import Any

import pytest

import vlearn
from tests.clients.problem import LINES, SeenWeights, X, Y, every_line, of_classification
from tests.optim.table import network, plain
from tests.oracles.per_example import relative_error

try:
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry
except (ImportError, RuntimeError) as error:  # what a torchvision of another build raises
    pytest.skip(f"timm needs a torchvision of the same build as torch ({error})", allow_module_level=True)


@every_line
def test_the_factory_makes_an_optimizer_that_finds_its_model(kind: Any) -> None:
    name = f"vlearn{kind.__name__}".lower()
    default_registry.register(OptimInfo(name=name, opt_class=kind, has_eps=False, has_betas=True))
    model = network()
    seen = SeenWeights(model)
    optimizer = create_optimizer_v2(model, opt=name, weight_decay=1e-3, **LINES[kind])
    assert isinstance(optimizer, kind)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-3]
    for _ in range(40):
        for x, y in zip(X.split(16), Y.split(16), strict=True):
            plain(optimizer, model, x, y)
    if kind is not vlearn.EVON:  # whose Σ is not diagonal
        truth = of_classification(model, seen.by_name, optimizer.posterior().variance, x, y)
        assert relative_error(optimizer.sensitivities().self_influence, truth) < 1e-10
    assert float((model(X).argmax(1) == Y).double().mean()) > 0.9
