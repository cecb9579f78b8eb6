"""A Hessian that is diagonal in an eigenbasis for layers, and in the entries themselves elsewhere.

The state of a layer's weight has, beside the momentum, `hessian` ``[O, I]``, s in the basis Q_B ⊗ Q_A, per example and
without the weight decay wd, and `out_basis` Q_B, `in_basis` Q_A, missing where a side is not rotated. The posterior
precision is num_data·Q(s + wd)Qᵀ; draws use ess in the place of num_data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlearn.gaussians import Kronecker, KroneckerFactors, ProductPosterior
from vlearn.gaussians.covariance_blocks import KroneckerBlock
from vlearn.gaussians.gaussian import Gaussian
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.parameters.options import tempered_ess_and_decay
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.sampling.blocks import SliceBlock
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.sampling.protocols import PosteriorContext
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.optim.structures.prior import diagonal_prior, prior_means, rate_of, rate_of_layer
from vlearn.per_example.kronecker_factors import Basis, Layer
from vlearn.sharded.tensors import part_of, whole


class RotatedStructure:
    """What the structures with an eigenbasis for each layer share.

    Args:
        parameters: those of the optimizer, with their state.
        processes: those that train them; they average what all parameters of a layer learn from, or nothing.

    Attributes:
        diagonal: the structure of the parameters that are in no layer.
        decomposition_failures: eigendecompositions that failed, where the last good basis stayed.
    """

    def __init__(self, parameters: Parameters, processes: Processes):
        self.parameters, self.processes = parameters, processes
        self.decomposition_failures = 0
        self.diagonal = DiagonalStructure(parameters)
        self._layer_of: dict[Tensor, Layer] = {}  # as the state had them at `_read_at` loads
        self._read_at = -1

    def layers(self) -> list[Layer]:
        """The layers, in the order of the parameters."""
        return list(dict.fromkeys(self.layer_of().values()))

    def layer_of(self) -> dict[Tensor, Layer]:
        """The layer of each parameter that is in one."""
        if self._read_at != self.parameters.loads:
            self._layer_of = {p: layer for layer in self._layers_in_state() for p in layer.parameters}
            self._read_at = self.parameters.loads
        return self._layer_of

    def _layers_in_state(self) -> list[Layer]:
        """The layers that the state has, in the order of the parameters."""
        raise NotImplementedError

    def group_of(self, layer: Layer) -> Group:
        """The parameter group that all of a layer's parameters are in."""
        return self.parameters.group_of(layer.weight)

    def basis(self, layer: Layer) -> Basis:
        """(Q_B, Q_A) of a layer, None where its factor is diagonal; whole, for which all processes must ask."""
        rows, columns = self._own_basis(layer)
        return None if rows is None else whole(rows), None if columns is None else whole(columns)

    def _own_basis(self, layer: Layer) -> Basis:
        state = self.parameters.state[layer.weight]
        return state.get("out_basis"), state.get("in_basis")

    def block(self, layer: Layer, variances: Tensor) -> KroneckerBlock:
        """Coordinates of a layer in its eigenbasis."""
        return KroneckerBlock(*self.basis(layer), variances, [p.shape for p in layer.parameters])

    def rate_of(self, layer: Layer) -> float | Tensor:
        """The weight decay of a layer; of priors in its place their diagonal ``[O, I]`` in the eigenbasis."""
        return rate_of_layer(self.parameters, self.group_of(layer), layer, self.basis(layer))

    def rates_of(self, layers: list[Layer]) -> float | list[Tensor]:
        """`rate_of` of layers of one group, all or none of which have a prior, for this process's part of each."""
        if any(self.parameters.has_prior(p) for p in layers[0].parameters):
            hessians = [self.parameters.state[layer.weight]["hessian"] for layer in layers]
            rates = [torch.as_tensor(self.rate_of(layer)) for layer in layers]
            return [part_of(hessian, rate) for hessian, rate in zip(hessians, rates, strict=True)]
        return float(tempered_ess_and_decay(self.group_of(layers[0]))[1])

    def num_updates(self, layer: Layer) -> int:
        """The number of updates of a layer so far."""
        return max(int(self.parameters.state[p]["step"]) for p in layer.parameters)

    def is_due(self, layer: Layer, step: int) -> bool:
        """Whether a layer's eigenbasis is made anew in a step, counted from 1."""
        return (step - 1) % self.group_of(layer)["update_every"] == 0

    def init_states(self) -> None:
        """See `Structure`; a parameter is in no layer unless a subclass makes it one."""
        self.diagonal.init_states()

    def take_prior(self, prior: Gaussian, named: dict[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """See `Structure`; the diagonal of its precision."""
        return diagonal_prior(prior, named)

    def is_whole(self, p: Tensor) -> bool:
        """See `Structure`."""
        return False

    def has_curvature(self, p: Tensor) -> bool:
        """See `Structure`."""
        return True

    def draw_block(self, block: SliceBlock, noise: Noise) -> None:
        """See `Structure`."""
        raise NotImplementedError

    def draw_jointly(self, blocks: list[SliceBlock], noise: Noise) -> None:
        """See `Structure`."""
        raise NotImplementedError

    def posterior(self, context: PosteriorContext) -> ProductPosterior:
        """The posterior as a view of the state: a `Kronecker` of the layers, a `Diagonal` of all other parameters."""
        names, layer_of, state = self.parameters.names(), self.layer_of(), self.parameters.state
        alone = {name: p for p, name in names.items() if self.parameters.has_state(p) and p not in layer_of}
        parts: list[Any] = [self.diagonal.posterior_of(alone, context)]
        if layer_of:
            groups = {p: self.group_of(layer) for p, layer in layer_of.items()}
            rates = {layer: self.rate_of(layer) for layer in self.layers()}
            named = {names[p]: p for p in layer_of}
            kronecker = Kronecker(
                context.mean_of(named),
                {
                    tuple(names[p] for p in layer.parameters): KroneckerFactors(
                        *self._own_basis(layer),
                        state[layer.weight]["hessian"],
                        rate if isinstance(rate, Tensor) else None,
                    )
                    for layer, rate in rates.items()
                },
                {name: rate_of(self.parameters, groups[p], p) for name, p in named.items()},
                {name: tempered_ess_and_decay(groups[p])[0] for name, p in named.items()},
                self.parameters.num_data,
                parameters=named,
                check=context.check,
            )
            kronecker.prior_mean = prior_means(self.parameters, named)
            parts.insert(0, kronecker)
        return ProductPosterior(parts, check=context.check, at_mean=context.at_mean)

    def diagonal_hessian(self) -> dict[Tensor, Tensor]:
        """See `Structure`."""
        diagonals = {p: h for p, h in self.diagonal.diagonal_hessian().items() if p not in self.layer_of()}
        for layer in self.layers():
            entries = self.block(layer, whole(self.parameters.state[layer.weight]["hessian"])).diagonal()
            diagonals.update(zip(layer.parameters, entries, strict=True))
        return diagonals
