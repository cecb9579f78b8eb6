"""The Gauss-Newton matrix Σ_n J_nᵀΛ_nJ_n of a small classifier of linear layers, from what each layer contributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer of a classifier.

    Attributes:
        names: of its weight and its bias.
        a: ``[N, I]`` its inputs, with a 1 for the bias.
        b: ``[N, C, O]`` the gradients of its outputs along the C columns of Λ's root.
    """

    names: tuple[str, str]
    a: Tensor
    b: Tensor


def layers_of(model: nn.Module, x: Tensor) -> list[Layer]:
    """What each layer of a softmax classifier contributes to J_nᵀ R_n, R_n R_nᵀ = Λ_n."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}  # inputs and output by module

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: calls.update({name: (args[0].detach(), output)})

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    output = model(x)
    for handle in handles:
        handle.remove()
    p = output.detach().softmax(1)
    root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)  # Λ = diag p - p pᵀ = R Rᵀ
    outputs = [each for _, each in calls.values()]
    columns = [torch.autograd.grad(output, outputs, column, retain_graph=True) for column in root.unbind(2)]
    return [
        Layer(
            (f"{name}.weight", f"{name}.bias"),
            torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1),
            torch.stack([column[i] for column in columns], 1),
        )
        for i, (name, (inputs, _)) in enumerate(calls.items())
    ]


def gauss_newton(layers: list[Layer]) -> Tensor:
    """Σ_n J_nᵀΛ_nJ_n ``[P, P]`` in the order of the layers' names."""
    columns = []
    for layer in layers:
        matrix = layer.b.unsqueeze(3) * layer.a[:, None, None]  # [N, C, O, I]
        columns += [matrix[..., :-1].flatten(2), matrix[..., -1]]
    rows = torch.cat(columns, 2).flatten(0, 1)
    return rows.mT @ rows
