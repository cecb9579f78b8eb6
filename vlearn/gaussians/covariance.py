"""Σ of a Gaussian posterior as sensitivities use it: keyed by the model's parameters, summed over num_data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from vlearn.gaussians.covariance_blocks import Block


class Covariance:
    """Posterior covariance of the parameters that move; blocks are independent of one another.

    Args:
        blocks: the parameters of each block, in the block's order, with the block.
    """

    def __init__(self, blocks: Iterable[tuple[Sequence[Tensor], Block]]):
        self.blocks = [(tuple(parameters), block) for parameters, block in blocks]
        self._found = {p: i for i, (parameters, _) in enumerate(self.blocks) for p in parameters}

    @classmethod
    def unknown(cls, parameters: Iterable[Tensor]) -> Covariance:
        """That of parameters that move before it has been found: nothing can be multiplied by it."""
        covariance = cls([])
        covariance._found = dict.fromkeys(parameters, -1)
        return covariance

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._found

    def block_of(self, parameter: Tensor) -> tuple[tuple[Tensor, ...], Block]:
        """The block that a parameter belongs to, with all of its parameters."""
        return self.blocks[self._found[parameter]]

    def zeros(self, count: int) -> Tensor:
        """``[count]`` zeros where the covariance lives and as wide as it is."""
        return self.blocks[0][1].variances.new_zeros(count)

    def multiply(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Σ g of each example.

        Args:
            gradients: by parameter ``[n, *shape]``; a parameter that is missing from a block counts as zero.
        Returns:
            By parameter ``[n, *shape]``, for all parameters of the blocks concerned.
        """
        moved: dict[Tensor, Tensor] = {}
        for parameters, block, tensors in self._by_block(gradients):
            moved.update(zip(parameters, block.multiply(tensors), strict=True))
        return moved

    def multiply_only(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """As `multiply`, by those parameters alone that are given: the others are frozen."""
        moved = self.multiply(gradients)
        return {p: moved[p] for p in gradients}

    def solve(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Σ⁻¹ g of each example, as `multiply`."""
        solved: dict[Tensor, Tensor] = {}
        for parameters, block, tensors in self._by_block(gradients):
            solved.update(zip(parameters, block.solve(tensors), strict=True))
        return solved

    def quadratic(self, gradients: Mapping[Tensor, Tensor]) -> Tensor:
        """gᵀΣg of each example ``[n]``; gradients as for `multiply`."""
        total = self.zeros(next(iter(gradients.values())).shape[0])
        for _, block, tensors in self._by_block(gradients):
            total = total + block.quadratic(tensors)
        return total

    def _by_block(self, gradients: Mapping[Tensor, Tensor]) -> list[tuple[tuple[Tensor, ...], Block, list[Tensor]]]:
        some = next(iter(gradients.values()))
        by_block = []
        for i in dict.fromkeys(self._found[p] for p in gradients if p in self._found):
            parameters, block = self.blocks[i]
            tensors = [gradients[p] if p in gradients else some.new_zeros(len(some), *p.shape) for p in parameters]
            by_block.append((parameters, block, tensors))
        return by_block
