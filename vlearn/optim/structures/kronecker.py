"""Kronecker factors for the layers and a diagonal elsewhere: the state, the draws from it, the posterior.

A parameter starts with a diagonal Hessian; the first recorded pass that shows factors for it makes it a layer, alone or
with its bias as the last column. Then the state of its weight is

    out_factor, in_factor   running means of B ``[O, O]`` and A ``[I, I]``, or ``[O]``, ``[I]`` where diagonal
    out_age, in_age         steps since the last value of each
    learned                 weight of the passes in those means that is not hess_init's, 1 - β₂ᵗ, with a warm-up of
                            β₂ 1 less the product of all
    out_basis, in_basis     Q_B, Q_A, missing where the factor is diagonal
    hessian                 s ``[O, I]`` in that basis, per example, without the weight decay wd

and that of its bias has `column_of`, the number of the weight whose last column it is. The posterior precision is
num_data·Q(s + wd)Qᵀ; draws use ess in the place of num_data.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from vlearn.optim.distributed.processes import Processes
from vlearn.optim.parameters.options import tempered_ess_and_decay
from vlearn.optim.parameters.parameters import Parameters
from vlearn.optim.sampling.blocks import ParameterSlice, SliceBlock
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.structures.rotated import RotatedStructure
from vlearn.per_example.gradients import sums_of_squares
from vlearn.per_example.kronecker_factors import Basis, Layer, factor_sums, layers_of
from vlearn.per_example.recorded_pass import RecordedPass


class KroneckerStructure(RotatedStructure):
    """A `Structure` with Kronecker factors for layers, and a diagonal Hessian of all other parameters.

    Args:
        parameters: those of the optimizer, with their state.
        processes: those that train them; they average the statistics of all parameters of a layer, or of none.
        convention: "expand" or "reduce", see `vlearn.per_example.kronecker_factors`.
        eigenvalue_correction: whether s is learned in the eigenbasis, as EK-FAC does.
    """

    def __init__(self, parameters: Parameters, processes: Processes, convention: str, eigenvalue_correction: bool):
        super().__init__(parameters, processes)
        self.convention, self.eigenvalue_correction = convention, eigenvalue_correction

    def _layers_in_state(self) -> list[Layer]:
        every, state = self.parameters.every(), self.parameters.state
        biases = {every[int(state[p]["column_of"])]: p for p in every if "column_of" in state.get(p, {})}
        return [Layer(p, biases.get(p)) for p in every if "in_factor" in state.get(p, {})]

    def add_layer(self, layer: Layer, out_factor: Tensor, in_factor: Tensor) -> None:
        """Replace the diagonal states of parameters that have not been updated yet by those of a layer."""
        every, states = self.parameters.every(), self.parameters.state
        weight: dict[str, Tensor] = states[layer.weight]
        hessian = weight["hessian"]
        columns = sum(p.numel() for p in layer.parameters) // len(hessian)
        weight["hessian"] = hessian.new_full((len(hessian), columns), float(self.group_of(layer)["hess_init"]))
        weight["out_factor"], weight["in_factor"] = (torch.zeros_like(f).to(hessian) for f in (out_factor, in_factor))
        weight |= {name: hessian.new_zeros(()) for name in ("learned", "out_age", "in_age")}
        if layer.bias is not None:
            del states[layer.bias]["hessian"]
            place = next(i for i, p in enumerate(every) if p is layer.weight)
            states[layer.bias]["column_of"] = torch.tensor(place, dtype=hessian.dtype, device=hessian.device)
        self._read_at = -1

    def draw_block(self, block: SliceBlock, noise: Noise) -> None:
        """Draw the parameters that are in no layer."""
        layer_of = self.layer_of()
        alone = [piece for piece in block.slices if piece.parameter not in layer_of]
        if alone:
            self.diagonal.draw_block(SliceBlock(block.group, alone), noise)

    def draw_jointly(self, blocks: list[SliceBlock], noise: Noise) -> None:
        """Draw the layers."""
        slices_of: dict[Tensor, list[ParameterSlice]] = {}
        for piece in (piece for block in blocks for piece in block.slices):
            slices_of.setdefault(piece.parameter, []).append(piece)
        for layer in self.layers():
            if any(p in slices_of for p in layer.parameters):
                self._draw_layer(layer, slices_of, noise)

    def _draw_layer(self, layer: Layer, slices_of: dict[Tensor, list[ParameterSlice]], noise: Noise) -> None:
        """M + Q_B(E ∘ 1/√(ess·(s + wd)))Q_Aᵀ; a frozen part of it stays at the mean."""
        ess, hessian = tempered_ess_and_decay(self.group_of(layer))[0], self.parameters.state[layer.weight]["hessian"]
        block = self.block(layer, hessian.add(self.rate_of(layer)).mul_(ess).reciprocal_())
        with torch.autocast(hessian.device.type, enabled=False):
            moves = block.draw(noise.on(hessian.device))
        for p, move in zip(layer.parameters, moves, strict=True):
            for piece in slices_of.get(p, ()):
                piece.weights.copy_(piece.exact_mean(self.parameters) + piece.of(move))

    def has_curvature(self, p: Tensor) -> bool:
        """See `Structure`; what layers learn from belongs to no parameter alone."""
        return p not in self.layer_of()

    def hessian_rows(self, piece: ParameterSlice) -> Tensor | None:
        """See `Structure`."""
        return self.diagonal.hessian_rows(piece) if self.has_curvature(piece.parameter) else None

    def pass_sums(self, recorded: RecordedPass, wanted: Container[Tensor]) -> dict[Any, Tensor]:
        """Sums for the factors of each layer by (layer, name), and Σ_n g_n² of each parameter that is in none."""
        known, states = self.layer_of(), self.parameters.state
        tracked = [p for p in recorded.trace.tracked if p in wanted]
        new = {p for p in tracked if p not in known and not bool(states[p]["step"])}
        layers = [layer for layer in self.layers() if any(p in wanted for p in layer.parameters)]
        layers += layers_of(recorded, new, self._may_join) if new else []
        due = {layer for layer in layers if self.is_due(layer, self.num_updates(layer) + 1)}
        bases: dict[Layer, Basis] = {}
        for layer in layers if self.eigenvalue_correction else ():
            if layer.weight in known and self.basis(layer) != (None, None):  # else its decomposition failed
                bases[layer] = self.basis(layer)
        sums: dict[Any, Tensor] = dict(factor_sums(recorded, layers, self.convention, bases, due))
        in_layers = {p for layer in layers for p in layer.parameters}
        alone = {p for p in tracked if p not in in_layers}
        return sums | sums_of_squares(recorded, alone) if alone else sums

    def _may_join(self, weight: Tensor, bias: Tensor) -> bool:
        """Whether a bias may be its weight's last column."""
        same = self.processes.group_over([weight]) is self.processes.group_over([bias])
        groups = [[any(p is q for q in group["params"]) for p in (weight, bias)] for group in self.parameters.groups]
        return same and [True, True] in groups
