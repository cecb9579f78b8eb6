"""A diagonal Hessian in the eigenbasis of each matrix's gradients: the state, and the draws from it.

A parameter ``[O, ...]`` is a matrix ``[O, I]`` of its rows. Its state is

    hessian                 h ``[O, I]`` in the basis, per example, without the weight decay wd
    momentum                of the gradient, in the parameter's own entries and shape
    out_factor, in_factor   running sums of GGᵀ ``[O, O]`` and GᵀG ``[I, I]``, up to a factor; missing of a side that is
                            not rotated
    out_basis, in_basis     Q_L, Q_R, at first the identity; missing likewise

Vectors, complex parameters and matrices with two sides that are not rotated are diagonal in their own entries. A side
is not rotated where it is longer than `max_dim`, or than 128 times the other: of a position embedding ``[1, T, E]`` the
basis of T·E columns would be as many times as large as the weight, and its change would take seconds.

Of a sharded parameter each process has its part of all that, of Hessian and momentum that of the weight, of factors and
bases some of the rows. What is done entry by entry it does for its own. What mixes entries, the change of basis and the
factors, every process does for the whole matrix, which is gathered for as long as that takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlearn.gaussians.covariance_blocks import KroneckerBlock
from vlearn.optim.kernels.entries import like, matrix_like, square_like
from vlearn.optim.kernels.nonfinite import is_low_precision
from vlearn.optim.parameters.options import tempered_ess_and_decay
from vlearn.optim.parameters.parameters import Group, state_dtype
from vlearn.optim.sampling.blocks import ParameterSlice, SliceBlock
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.structures.diagonal import use_foreach
from vlearn.optim.structures.rotated import RotatedStructure
from vlearn.per_example.kronecker_factors import Layer
from vlearn.sharded.tensors import part_of, shard, whole

LONGEST_SIDE = 128  # times the other, up to which a side has a basis, which is as many times as large as the matrix


class EigenbasisStructure(RotatedStructure):
    """A `Structure` in which every matrix has an eigenbasis, from the start and without recorded passes."""

    def _layers_in_state(self) -> list[Layer]:
        state = self.parameters.state
        return [
            Layer(p, None) for p in self.parameters.every() if {"out_factor", "in_factor"} & state.get(p, {}).keys()
        ]

    def init_states(self) -> None:
        """See `Structure`."""
        for group in self.parameters.groups:
            for p in group["params"]:
                if p.requires_grad and not self.parameters.has_state(p) and (sides := _rotated_sides(p, group)):
                    self.parameters.state[p].update(_initial_state(p, float(group["hess_init"]), sides))
                    self._read_at = -1
        super().init_states()

    def is_whole(self, p: Tensor) -> bool:
        """See `Structure`; a matrix is rotated as a whole."""
        return p in self.layer_of()

    def draw_block(self, block: SliceBlock, noise: Noise) -> None:
        """Write m + ε/√(ess·(h + wd)) into the weights, of matrices M + Q_L(E ∘ 1/√(ess·(h + wd)))Q_Rᵀ."""
        layer_of, state = self.layer_of(), self.parameters.state
        hessians = [piece.of(state[piece.parameter]["hessian"]) for piece in block.slices]
        normals = noise.normal(block.slices, hessians)
        alone = [i for i, piece in enumerate(block.slices) if piece.parameter not in layer_of]
        if alone:
            slices = [block.slices[i] for i in alone]
            self.diagonal.draw_slices(block.group, slices, noise, [normals[i] for i in alone])
        matrices = [i for i, piece in enumerate(block.slices) if piece.parameter in layer_of]
        together = use_foreach(block.group, block.slices)
        for chosen in [matrices] if together and matrices else [[i] for i in matrices]:
            slices = [block.slices[i] for i in chosen]
            layers = [layer_of[piece.parameter] for piece in slices]
            self._draw_matrices(
                block.group, slices, layers, [hessians[i] for i in chosen], [normals[i] for i in chosen]
            )

    def _draw_matrices(
        self,
        group: Group,
        slices: list[ParameterSlice],
        layers: list[Layer],
        hessians: list[Tensor],
        coordinates: list[Tensor],
    ) -> None:
        """As `draw_block` for matrices whose noise E has been drawn, which is scaled in place."""
        scales = torch._foreach_add(hessians, self.rates_of(layers))
        torch._foreach_mul_(scales, tempered_ess_and_decay(group)[0])
        torch._foreach_rsqrt_(scales)
        torch._foreach_mul_(coordinates, scales)
        moves = [self.rotation(layer).from_basis(each) for layer, each in zip(layers, coordinates, strict=True)]
        draws = torch._foreach_add([piece.exact_mean(self.parameters) for piece in slices], moves)
        torch._foreach_copy_([piece.weights for piece in slices], draws)
        for piece, each in zip(slices, coordinates, strict=True):
            if not is_low_precision(piece.weights):  # which the draw is rounded to
                piece.coordinates = each

    def draw_jointly(self, blocks: list[SliceBlock], noise: Noise) -> None:
        """See `Structure`; all matrices are independent."""

    def rotation(self, layer: Layer) -> Rotation:
        """Into the present basis of a layer, and back; all processes that have shards of it must ask for it."""
        hessian = self.parameters.state[layer.weight]["hessian"]
        return Rotation(layer.weight, hessian, self.block(layer, hessian))

    def whole_matrix(self, layer: Layer, tensor: Tensor) -> Tensor:
        """``[O, I]`` of what has a value for each entry that this process has of the weight."""
        return whole(like(layer.weight, tensor)).reshape(len(layer.weight), -1)


class Rotation:
    """The change between the entries of a matrix and its coordinates, of which a process has and gets its own part.

    Args:
        weight: the parameter.
        hessian: in its state.
        block: with its bases, whole.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, block: KroneckerBlock):
        self._weight, self._hessian, self._block = weight, hessian, block

    def into_basis(self, tensor: Tensor) -> Tensor:
        """Q_Lᵀ G Q_R ``[O, I]`` of a tensor in the parameter's shape."""
        with torch.autocast(tensor.device.type, enabled=False):
            entries = whole(like(self._weight, tensor))
            return part_of(self._hessian, self._block.into_basis([entries.unsqueeze(0)]).squeeze(0))

    def from_basis(self, coordinates: Tensor) -> Tensor:
        """Q_L Z Q_Rᵀ in the parameter's shape."""
        with torch.autocast(coordinates.device.type, enabled=False):
            entries = whole(like(self._hessian, coordinates))
            return part_of(self._weight, self._block.from_basis(entries.unsqueeze(0))[0].squeeze(0))


def _rotated_sides(p: Tensor, group: Group) -> dict[str, int]:
    """The sizes of a parameter's sides that have a basis, of the rows "out" and the columns "in"."""
    if p.dim() < 2 or p.is_complex() or not p.numel():
        return {}
    rows, columns = len(p), p.numel() // len(p)
    sizes = {"out": (rows, columns), "in": (columns, rows)}
    return {
        side: size
        for side, (size, other) in sizes.items()
        if 1 < size <= group["max_dim"] and size <= LONGEST_SIDE * other
    }


def _initial_state(p: Tensor, hess_init: float, sides: dict[str, int]) -> dict[str, Tensor]:
    dtype = state_dtype(p)
    bases = {f"{side}_basis": square_like(p, size, dtype) for side, size in sides.items()}
    for basis in bases.values():
        shard(basis).copy_(part_of(basis, torch.eye(len(basis), dtype=dtype, device=basis.device)))
    return {
        "step": torch.tensor(0.0, dtype=torch.float32, device="cpu"),
        "momentum": torch.zeros_like(p.detach(), dtype=dtype),
        "hessian": matrix_like(p, hess_init, dtype),
        **{f"{side}_factor": square_like(p, size, dtype) for side, size in sides.items()},
        **bases,
    }
