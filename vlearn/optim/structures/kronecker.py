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

from vlearn.gaussians import Kronecker, KroneckerFactors, ProductPosterior
from vlearn.gaussians.covariance_blocks import KroneckerBlock
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.parameters.options import tempered_ess_and_decay
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.sampling.blocks import ParameterSlice, SliceBlock
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.sampling.protocols import PosteriorContext
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.per_example.gradients import sums_of_squares
from vlearn.per_example.kronecker_factors import Basis, Layer, factor_sums, layers_of
from vlearn.per_example.recorded_pass import RecordedPass


class KroneckerStructure:
    """A `Structure` with Kronecker factors for layers, and a diagonal Hessian of all other parameters.

    Args:
        parameters: those of the optimizer, with their state.
        processes: those that train them; they average the statistics of all parameters of a layer, or of none.
        convention: "expand" or "reduce", see `vlearn.per_example.kronecker_factors`.
        eigenvalue_correction: whether s is learned in the eigenbasis, as EK-FAC does.

    Attributes:
        diagonal: the structure of the parameters that are in no layer.
        decomposition_failures: eigendecompositions that failed, where the last good basis stayed.
    """

    def __init__(self, parameters: Parameters, processes: Processes, convention: str, eigenvalue_correction: bool):
        self.parameters, self.processes = parameters, processes
        self.decomposition_failures = 0
        self.convention, self.eigenvalue_correction = convention, eigenvalue_correction
        self.diagonal = DiagonalStructure(parameters)
        self._layer_of: dict[Tensor, Layer] = {}  # as the state had them at `_read_at` loads
        self._read_at = -1

    # -- layers ------------------------------------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """The layers, in the order of the parameters."""
        return list(dict.fromkeys(self.layer_of().values()))

    def layer_of(self) -> dict[Tensor, Layer]:
        """The layer of each parameter that is in one."""
        if self._read_at != self.parameters.loads:
            every, state = self.parameters.every(), self.parameters.state
            biases = {every[int(state[p]["column_of"])]: p for p in every if "column_of" in state.get(p, {})}
            layers = [Layer(p, biases.get(p)) for p in every if "in_factor" in state.get(p, {})]
            self._layer_of = {p: layer for layer in layers for p in layer.parameters}
            self._read_at = self.parameters.loads
        return self._layer_of

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

    def group_of(self, layer: Layer) -> Group:
        """The parameter group that all of a layer's parameters are in."""
        return self.parameters.group_of(layer.weight)

    def basis(self, layer: Layer) -> Basis:
        """(Q_B, Q_A) of a layer, None where its factor is diagonal."""
        state = self.parameters.state[layer.weight]
        return state.get("out_basis"), state.get("in_basis")

    def block(self, layer: Layer, variances: Tensor) -> KroneckerBlock:
        """Coordinates of a layer in its eigenbasis."""
        return KroneckerBlock(*self.basis(layer), variances, [p.shape for p in layer.parameters])

    def mean_of(self, p: Tensor) -> Tensor:
        """The mean of a whole parameter in the precision of the state, while it is in the weights."""
        master = self.parameters.master_copy(p)
        return p.data if master is None else master

    def num_updates(self, layer: Layer) -> int:
        """The number of updates of a layer so far."""
        return max(int(self.parameters.state[p]["step"]) for p in layer.parameters)

    def is_due(self, layer: Layer, step: int) -> bool:
        """Whether a layer's eigenbasis is made anew in a step, counted from 1."""
        return (step - 1) % self.group_of(layer)["update_every"] == 0

    # -- the structure -----------------------------------------------------------------------------------

    def init_states(self) -> None:
        """See `Structure`."""
        self.diagonal.init_states()

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
        ess, weight_decay = tempered_ess_and_decay(self.group_of(layer))
        hessian = self.parameters.state[layer.weight]["hessian"]
        block = self.block(layer, hessian.add(weight_decay).mul_(ess).reciprocal_())
        with torch.autocast(hessian.device.type, enabled=False):
            moves = block.draw(noise.on(hessian.device))
        for p, move in zip(layer.parameters, moves, strict=True):
            for piece in slices_of.get(p, ()):
                piece.weights.copy_(piece.exact_mean(self.parameters) + piece.of(move))

    def posterior(self, context: PosteriorContext) -> ProductPosterior:
        """The posterior as a view of the state: a `Kronecker` of the layers, a `Diagonal` of all other parameters."""
        names, layer_of, state = self.parameters.names(), self.layer_of(), self.parameters.state
        alone = {name: p for p, name in names.items() if p in state and p not in layer_of}
        parts: list[Any] = [self.diagonal.posterior_of(alone, context)]
        if layer_of:
            layers = {layer: tempered_ess_and_decay(self.group_of(layer)) for layer in self.layers()}
            scales = {names[p]: scale for layer, scale in layers.items() for p in layer.parameters}
            named = {names[p]: p for p in layer_of}
            kronecker = Kronecker(
                context.mean_of(named),
                {
                    tuple(names[p] for p in layer.parameters): KroneckerFactors(
                        *self.basis(layer), state[layer.weight]["hessian"]
                    )
                    for layer in layers
                },
                {name: weight_decay for name, (_, weight_decay) in scales.items()},
                {name: ess for name, (ess, _) in scales.items()},
                self.parameters.num_data,
                parameters=named,
                check=context.check,
            )
            parts.insert(0, kronecker)
        return ProductPosterior(parts, check=context.check, at_mean=context.at_mean)

    def diagonal_hessian(self) -> dict[Tensor, Tensor]:
        """See `Structure`."""
        diagonals = {p: h for p, h in self.diagonal.diagonal_hessian().items() if p not in self.layer_of()}
        for layer in self.layers():
            entries = self.block(layer, self.parameters.state[layer.weight]["hessian"]).diagonal()
            diagonals.update(zip(layer.parameters, entries, strict=True))
        return diagonals

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
