"""Layers that are called once for all examples, and what their output is added to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.networks.case import EXAMPLES, Case, Model, case, labels, rows


def _positions(forward: Callable[[Any, Tensor], Tensor], length: int = 6, **parts: nn.Module) -> Case:
    parts = {"norm": nn.LayerNorm(4), "out": nn.Linear(4, 3), **parts}
    model = Model(lambda m, x: m.out(forward(m, x).mean(1)), into=nn.Linear(5, 4), places=nn.Embedding(8, 4), **parts)
    return Case(model, rows(length, 5), labels())


@case
def positions_without_an_example_axis() -> Case:
    return _positions(lambda m, x: m.norm(m.into(x) + m.places(torch.arange(x.shape[1]))))


@case
def positions_of_one_example() -> Case:
    return _positions(lambda m, x: m.norm(m.into(x) + m.places(torch.arange(x.shape[1]).unsqueeze(0))))


@case
def positions_as_many_as_examples() -> Case:
    return _positions(lambda m, x: m.norm(m.into(x) + m.places(torch.arange(x.shape[1]))), length=EXAMPLES)


def _added_in_place(words: Callable[[Any, Tensor], Tensor]) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = words(m, x)
        h += m.places(torch.arange(x.shape[1]))
        return m.norm(h)

    return _positions(forward)


@case
def positions_added_in_place() -> Case:
    return _added_in_place(lambda m, x: m.into(x) + x[..., :4])


@case
def positions_added_in_place_to_a_view() -> Case:
    return _added_in_place(lambda m, x: m.into(x)[:])


@case
def positions_added_among_other_terms() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        left = m.places(torch.arange(x.shape[1])) + m.types(torch.zeros(1, x.shape[1], dtype=torch.long))
        return m.norm(left + (m.into(x) + x[..., :4]))

    return _positions(forward, types=nn.Embedding(2, 4))


@case
def positions_by_a_linear_layer() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        waves = torch.arange(x.shape[1]).unsqueeze(1) * x.new_tensor([1.0, 0.5, 0.1])
        return m.norm(m.into(x) + m.waves(waves.sin()))

    return _positions(forward, waves=nn.Linear(3, 4))


@case
def positions_used_a_second_time() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        places = m.places(torch.arange(x.shape[1]))
        return m.norm(m.into(x) + places) * places.sigmoid()

    return _positions(forward)


@case
def sum_with_positions_used_past_the_next_layer() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.into(x) + m.places(torch.arange(x.shape[1]))
        return h.tanh() + m.norm(h)

    return _positions(forward)


@case
def part_of_a_sum_with_positions_used_again() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.into(x) + m.places(torch.arange(x.shape[1]))
        return h.tanh() + m.norm(h + x[..., :4])

    return _positions(forward)


@case
def positions_added_twice() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        places = m.places(torch.arange(x.shape[1]))
        return m.norm(places + (m.into(x) + places))

    return _positions(forward)


@case
def positions_with_a_factor() -> Case:
    return _positions(
        lambda m, x: m.norm(torch.add(m.into(x), m.places(torch.arange(x.shape[1])), alpha=2)) * x.mean(2, keepdim=True)
    )


@case
def positions_that_multiply() -> Case:
    return _positions(lambda m, x: m.norm(m.into(x) * m.places(torch.arange(x.shape[1]))))


@case
def positions_tied_with_a_layer_of_the_examples() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.into(x) + m.places(torch.arange(x.shape[1])))
        return h + F.softmax(m.back(h), -1)[..., :4]

    built = _positions(forward, back=nn.Linear(4, 8, bias=False))
    built.model.back.weight = built.model.places.weight  # type: ignore
    return built


@case
def positions_at_two_calls() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.into(x) + m.places(torch.arange(x.shape[1])))
        return m.norm(h + m.places(torch.arange(1, x.shape[1] + 1)))

    return _positions(forward)
