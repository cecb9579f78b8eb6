"""What an optimizer with Kronecker factors has: its state, the draws from it, the posterior and its health.

A parameter starts with a diagonal Hessian; the first captured pass that shows factors for it makes it a layer, alone or
with its bias as the last column. Then the state of its weight is

    out_factor, in_factor   running means of B ``[O, O]`` and A ``[I, I]``, or ``[O]``, ``[I]`` where diagonal
    out_age, in_age         steps since the last value of each
    learned                 weight of the passes in those means that is not hess_init's, 1 - β₂ᵗ
    out_basis, in_basis     Q_B, Q_A, missing where the factor is diagonal
    hessian                 s ``[O, I]`` in that basis, per example, without the weight decay wd

and that of the bias says whose last column it is. The posterior precision is num_data·Q(s + wd)Qᵀ; draws have ess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlearn.capture.factors import Basis, Layer
from vlearn.optim.diagnostics import Diagnostics, diagnose
from vlearn.optim.diagonal import DiagonalState
from vlearn.optim.draw import Slot
from vlearn.optim.sampling import MeanView
from vlearn.posterior import Factors, Kronecker, Mixed
from vlearn.posterior.blocks import KroneckerBlock


class KroneckerState(DiagonalState):
    """Mixin beside VariationalOptimizer: layers with factors, and diagonal states of all other parameters."""

    decomposition_failures: int
    _found: dict[Tensor, Layer] | None = None  # by each of the layers' parameters; None: to be read from the state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._found = None
        super().__setstate__(state)

    def _layers(self) -> list[Layer]:
        """The layers, in the order of the parameters."""
        return list(dict.fromkeys(self._layer_of().values()))

    def _layer_of(self) -> dict[Tensor, Layer]:
        if self._found is None:
            every = self._every_parameter()
            biases = {every[int(self.state[p]["column_of"])]: p for p in every if "column_of" in self.state.get(p, {})}
            layers = [Layer(p, biases.get(p)) for p in every if "in_factor" in self.state.get(p, {})]
            self._found = {p: layer for layer in layers for p in layer.parameters}
        return self._found

    def _has_statistic(self, p: Tensor) -> bool:
        return p not in self._layer_of()

    def _make_layer(self, layer: Layer, out_factor: Tensor, in_factor: Tensor) -> None:
        """Replace the diagonal states of parameters that have not been updated yet."""
        every: list[Tensor] = self._every_parameter()
        weight: dict[str, Tensor] = self.state[layer.weight]
        hessian = weight["hessian"]
        columns = sum(p.numel() for p in layer.parameters) // len(hessian)
        weight["hessian"] = hessian.new_full((len(hessian), columns), float(self._group_of(layer)["hess_init"]))
        weight["out_factor"], weight["in_factor"] = (torch.zeros_like(f).to(hessian) for f in (out_factor, in_factor))
        weight |= {name: hessian.new_zeros(()) for name in ("learned", "out_age", "in_age")}
        if layer.bias is not None:
            del self.state[layer.bias]["hessian"]
            place = next(i for i, p in enumerate(every) if p is layer.weight)
            self.state[layer.bias]["column_of"] = torch.tensor(place, dtype=hessian.dtype, device=hessian.device)
        self._found = None

    def _group_of(self, layer: Layer) -> dict[str, Any]:
        """The parameter group that all of a layer's parameters are in."""
        return next(group for group in self.param_groups if any(p is layer.weight for p in group["params"]))

    def _basis(self, layer: Layer) -> Basis:
        state = self.state[layer.weight]
        return state.get("out_basis"), state.get("in_basis")

    def _block(self, layer: Layer, variances: Tensor) -> KroneckerBlock:
        """Coordinates of a layer in its eigenbasis."""
        return KroneckerBlock(*self._basis(layer), variances, [p.shape for p in layer.parameters])

    def _perturb_all(self, blocks: Iterator[tuple[dict[str, Any], list[Slot]]]) -> None:
        layer_of, slots_of = self._layer_of(), {}
        for group, block in blocks:
            for slot in block:
                if slot.parameter in layer_of:
                    slots_of.setdefault(slot.parameter, []).append(slot)
            alone = [slot for slot in block if slot.parameter not in layer_of]
            if alone:
                self._perturb(group, alone)
        for layer in self._layers():
            if any(p in slots_of for p in layer.parameters):
                self._perturb_layer(layer, slots_of)

    def _perturb_layer(self, layer: Layer, slots_of: dict[Tensor, list[Slot]]) -> None:
        """M + Q_B(E ∘ 1/√(ess·(s + wd)))Q_Aᵀ; a frozen part of it stays at the mean."""
        ess, weight_decay = self._scales(self._group_of(layer))
        hessian = self.state[layer.weight]["hessian"]
        block = self._block(layer, hessian.add(weight_decay).mul_(ess).reciprocal_())
        with torch.autocast(hessian.device.type, enabled=False):
            moves = block.draw(self._noise.on(hessian.device))
        for p, move in zip(layer.parameters, moves, strict=True):
            for slot in slots_of.get(p, ()):
                slot.weights.copy_(self._exact_mean(slot) + slot.of(move))

    def posterior(self) -> Mixed:
        """The posterior as a view of the state: no copy, stale after the next step.

        A `Kronecker` of the layers and a `Diagonal` of all other parameters.
        """
        self._prepare_states()
        names, layer_of = self._names(), self._layer_of()
        parts: list[Any] = [
            self._diagonal_posterior({name: p for p, name in names.items() if p in self.state and p not in layer_of})
        ]
        if layer_of:
            layers = {layer: self._group_of(layer) for layer in self._layers()}
            scales = {names[p]: self._scales(group) for layer, group in layers.items() for p in layer.parameters}
            kronecker = Kronecker(
                MeanView(self, {names[p]: p for p in layer_of}),
                {
                    tuple(names[p] for p in layer.parameters): Factors(
                        *self._basis(layer), self.state[layer.weight]["hessian"]
                    )
                    for layer in layers
                },
                {name: weight_decay for name, (_, weight_decay) in scales.items()},
                {name: ess for name, (ess, _) in scales.items()},
                self.num_data,
                parameters={names[p]: p for p in layer_of},
                check=self._staleness(),
            )
            parts.insert(0, kronecker)
        return Mixed(parts, check=self._staleness(), at_mean=self.at_mean)

    def diagnostics(self) -> Diagnostics:
        """Whether the posterior learns, from the diagonal of its Hessian.

        Raises:
            ValueError: if no parameter requires grad.
        """
        means, names, layer_of = self.posterior().mean, self._names(), self._layer_of()
        diagonals: dict[Tensor, Tensor] = {}
        for layer in self._layers():
            entries = self._block(layer, self.state[layer.weight]["hessian"]).diagonal()
            diagonals.update(zip(layer.parameters, entries, strict=True))
        groups = []
        for group in self.param_groups:
            ess, weight_decay = self._scales(group)
            states = {
                p: {**self.state[p], "hessian": diagonals[p]} if p in layer_of else self.state[p]
                for p in group["params"]
                if p in self.state
            }
            settings = {**group, "ess": ess, "weight_decay": weight_decay}
            groups.append((settings, [(means[names[p]], state) for p, state in states.items()]))
        found = diagnose(groups, self.nonfinite_count)
        return replace(found, decomposition_failures=self.decomposition_failures)
