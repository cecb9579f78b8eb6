"""Sums over the data that a structure of Σ is made of, and the curvature per example that they give.

Each is a mean over the examples of products of gradients, on the scale of one example's own loss and without the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vlearn._wide import wide_dtype, widened
from vlearn.collectives import compute_on_one_rank
from vlearn.gaussians.diagonal import Diagonal
from vlearn.gaussians.eigenbasis import eigen, product
from vlearn.gaussians.full import Full
from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.kronecker import Kronecker, KroneckerFactors
from vlearn.gaussians.product import ProductPosterior
from vlearn.per_example.gradients import sums_of_products, sums_of_squares
from vlearn.per_example.kronecker_factors import Basis, Layer, factor_sums, layers_of
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.posterior.processes import Key

_NOT_POSITIVE = (
    "the curvature of the data and the prior together are not positive definite, so that they are no precision: the "
    "loss is not at a minimum, or curves downwards in the output. Train on, give a larger prior_precision, or use "
    "curvature='ggn', which leaves out what curves downwards, or 'empirical'."
)
FACTORS = ("out_factor", "in_factor")  # of a layer, see `factor_sums`


@dataclass(frozen=True)
class Scale:
    """What turns curvature per example into a posterior.

    Attributes:
        names: of the parameters.
        mean: by name.
        num_data: number of training examples N.
        prior_precision: δ by name.
    """

    names: Mapping[Tensor, str]
    mean: Mapping[str, Tensor]
    num_data: float
    prior_precision: Mapping[str, float]


class Statistics(Protocol):
    """Sums over rounds through the data."""

    rounds: int

    def add(self, recorded: RecordedPass, weight: float) -> None:
        """Add a pass over some examples."""
        ...

    def sums(self) -> dict[Key, Tensor]:
        """What this round has summed up so far."""
        ...

    def end_round(self, sums: Mapping[Key, Tensor], count: int, group: Any) -> None:
        """All examples have been seen once more.

        Args:
            sums: those of all processes.
            count: the number of all their examples.
            group: the processes; None for this one alone.
        Raises:
            ValueError: if the processes have sums that do not go together.
        """
        ...

    def eigenvalues(self) -> Tensor:
        """Those of the curvature per example ``[P]``, in any order, float64."""
        ...

    def posterior(self, scale: Scale) -> Gaussian:
        """The posterior whose precision is num_data times the curvature, and the prior's."""
        ...


class DiagonalStatistics:
    """Squares of the gradients.

    Args:
        wanted: the parameters.
    """

    rounds = 1

    def __init__(self, wanted: list[Tensor]):
        self.hessian = {p: torch.zeros_like(p, dtype=_wide(p)) for p in wanted}

    def add(self, recorded: RecordedPass, weight: float) -> None:
        """See `Statistics`."""
        for p, squares in sums_of_squares(recorded, self.hessian).items():
            self.hessian[p].add_(squares, alpha=weight)

    def sums(self) -> dict[Key, Tensor]:
        """See `Statistics`."""
        return {Key("squares", (place,)): total for place, total in enumerate(self.hessian.values())}

    def end_round(self, sums: Mapping[Key, Tensor], count: int, group: Any) -> None:
        """See `Statistics`."""
        self.hessian = {p: sums[Key("squares", (place,))].div_(count) for place, p in enumerate(self.hessian)}

    def eigenvalues(self) -> Tensor:
        """See `Statistics`."""
        return torch.cat([widened(h).flatten() for h in self.hessian.values()])

    def posterior(self, scale: Scale) -> Diagonal:
        """See `Statistics`."""
        hessian = {scale.names[p]: h for p, h in self.hessian.items()}
        for name, h in hessian.items():
            if h.numel() and not float(h.min()) * scale.num_data + scale.prior_precision[name] > 0:
                raise ValueError(_NOT_POSITIVE)
        return Diagonal(
            {name: scale.mean[name] for name in hessian},
            hessian,
            {name: scale.prior_precision[name] / scale.num_data for name in hessian},
            dict.fromkeys(hessian, scale.num_data),
            scale.num_data,
        )


class KroneckerStatistics:
    """K-FAC's factors of every layer that has them, with EK-FAC's squares if wanted; squares of all other gradients.

    Args:
        wanted: the parameters.
        convention: "expand" or "reduce", see `vlearn.per_example.kronecker_factors`.
        eigenvalue_correction: go through the data a second time, for the curvature in the eigenbasis of the factors.
        may_join: (weight, bias) -> whether the bias may be the weight's last column.
    """

    def __init__(
        self,
        wanted: list[Tensor],
        convention: str,
        eigenvalue_correction: bool,
        may_join: Callable[[Tensor, Tensor], bool],
    ):
        self.rounds = 2 if eigenvalue_correction else 1
        self._wanted, self._convention, self._may_join = wanted, convention, may_join
        self._place = {p: place for place, p in enumerate(wanted)}
        self._looked_at: set[Tensor] = set()
        self._layers: dict[Layer, None] = {}
        self._rest = DiagonalStatistics([])
        self._sums: dict[tuple[Layer, str], Tensor] = {}
        self._passes = 0.0  # examples of the passes, by their weight
        self._bases: dict[Layer, Basis] = {}  # once the first round is over
        self._hessian: dict[Layer, Tensor] = {}

    def add(self, recorded: RecordedPass, weight: float) -> None:
        """See `Statistics`."""
        if self._bases:
            sums = factor_sums(recorded, self._layers, self._convention, self._bases, ())
            sums = {key: part for key, part in sums.items() if key[1] == "squares"}
        else:
            self._find_layers(recorded)
            sums = factor_sums(recorded, self._layers, self._convention, {}, self._layers)
            self._rest.add(recorded, weight)
            self._passes += weight * recorded.num_examples
        for key, part in sums.items():
            if key not in self._sums:
                self._sums[key] = torch.zeros_like(part)
            self._sums[key].add_(part, alpha=weight)

    def _find_layers(self, recorded: RecordedPass) -> None:
        new = [p for p in recorded.calls_of(self._place) if p not in self._looked_at]
        if new:
            self._looked_at.update(new)
            found = layers_of(recorded, set(new), self._may_join)
            self._layers |= dict.fromkeys(found)
            inside = {p for layer in found for p in layer.parameters}
            self._rest.hessian |= DiagonalStatistics([p for p in new if p not in inside]).hessian

    def sums(self) -> dict[Key, Tensor]:
        """See `Statistics`."""
        sums = {
            Key(name, tuple(self._place[p] for p in layer.parameters)): total
            for (layer, name), total in self._sums.items()
        }
        if not self._bases:
            sums |= {Key("diagonal", (self._place[p],)): total for p, total in self._rest.hessian.items()}
            device = self._wanted[0].device
            sums[Key("passes")] = torch.tensor(self._passes, dtype=wide_dtype(device), device=device)
        return sums

    def end_round(self, sums: Mapping[Key, Tensor], count: int, group: Any) -> None:
        """See `Statistics`."""
        self._sums = {
            (self._layer_at(*key.places), key.name): total
            for key, total in sums.items()
            if key.name in (*FACTORS, "squares")
        }
        if self._bases:
            for layer in self._layers:
                self._hessian[layer] = self._sums.pop((layer, "squares")).div_(count)
            return
        self._passes = float(sums[Key("passes")])
        self._layers = dict.fromkeys(layer for layer, _ in self._sums)
        rest = {self._wanted[key.places[0]]: total for key, total in sums.items() if key.name == "diagonal"}
        seen = set(rest)
        for p in (p for layer in self._layers for p in layer.parameters):
            if p in seen:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} acts in different ways in the processes: give all of them "
                    "batches that go through the same layers, or fit in one process."
                )
            seen.add(p)
        self._rest.hessian = rest | DiagonalStatistics([p for p in self._wanted if p not in seen]).hessian
        self._rest.end_round(self._rest.sums(), count, group)
        if not self._layers:
            self.rounds = 1
        self._decompose(count, group)

    def _layer_at(self, weight: int, bias: int | None = None) -> Layer:
        return Layer(self._wanted[weight], None if bias is None else self._wanted[bias])

    def _decompose(self, count: int, group: Any) -> None:
        """Turn the factors into eigenbases, which are those of one process in all: their own might differ."""
        kinds = {layer: [self._sums[layer, name].dim() for name in FACTORS] for layer in self._layers}
        likes = [] if group is None else [self._like_decomposed(layer) for layer in self._layers]
        tasks = [partial(self._decomposed, layer, count) for layer in self._layers]
        for (layer, axes), result in zip(kinds.items(), compute_on_one_rank(tasks, likes, group), strict=True):
            if result is None:
                raise RuntimeError(
                    "the factors of a layer have no eigendecomposition, since they are not finite: use a model whose "
                    "gradients are."
                )
            self._hessian[layer], *bases = result
            rows, columns = (None if n == 1 else bases.pop(0) for n in axes)
            self._bases[layer] = (rows, columns)
        self._sums = {}

    def _decomposed(self, layer: Layer, count: int) -> list[Tensor] | None:
        """The curvature of a layer in the eigenbasis of its factors, and the bases that are matrices."""
        # The inputs come in every pass over a batch, of which ggn-exact makes several.
        rows = eigen(self._sums.pop((layer, "out_factor")).div_(count), None)
        columns = eigen(self._sums.pop((layer, "in_factor")).div_(self._passes), None)
        if rows is None or columns is None:
            return None
        return [product(rows[0], columns[0]), *(basis for _, basis in (rows, columns) if basis is not None)]

    def _like_decomposed(self, layer: Layer) -> list[Tensor]:
        """Tensors of the shapes of what `_decomposed` gives."""
        factors = [self._sums[layer, name] for name in FACTORS]
        hessian = factors[0].new_empty([len(factor) for factor in factors])
        return [hessian, *(factor.new_empty(factor.shape) for factor in factors if factor.dim() == 2)]

    def eigenvalues(self) -> Tensor:
        """See `Statistics`."""
        every = [*self._rest.hessian.values(), *self._hessian.values()]
        return torch.cat([widened(hessian).flatten() for hessian in every])

    def posterior(self, scale: Scale) -> Gaussian:
        """See `Statistics`."""
        parts: list[Gaussian] = []
        if self._layers:
            names = {layer: tuple(scale.names[p] for p in layer.parameters) for layer in self._layers}
            decay = {name: scale.prior_precision[name] / scale.num_data for each in names.values() for name in each}
            parts.append(
                Kronecker(
                    {name: scale.mean[name] for name in decay},
                    {
                        names[layer]: KroneckerFactors(*self._bases[layer], self._hessian[layer])
                        for layer in self._layers
                    },
                    decay,
                    dict.fromkeys(decay, scale.num_data),
                    scale.num_data,
                )
            )
        if self._rest.hessian or not parts:
            parts.append(self._rest.posterior(scale))
        return parts[0] if len(parts) == 1 else ProductPosterior(parts)


class DenseStatistics:
    """Products of all gradients.

    Args:
        wanted: the parameters, in the order of the rows.
    """

    rounds = 1

    def __init__(self, wanted: list[Tensor]):
        self._wanted = wanted
        self._hessian: Tensor | None = None

    def add(self, recorded: RecordedPass, weight: float) -> None:
        """See `Statistics`."""
        products = widened(sums_of_products(recorded, self._wanted, set(self._wanted))) * weight
        self._hessian = products if self._hessian is None else self._hessian.add_(products)

    @property
    def hessian(self) -> Tensor:
        """``[P, P]`` in float64."""
        assert self._hessian is not None
        return self._hessian

    def sums(self) -> dict[Key, Tensor]:
        """See `Statistics`."""
        return {} if self._hessian is None else {Key("products"): self._hessian}

    def end_round(self, sums: Mapping[Key, Tensor], count: int, group: Any) -> None:
        """See `Statistics`."""
        self._hessian = sums[Key("products")].div_(count)

    def eigenvalues(self) -> Tensor:
        """See `Statistics`."""
        return torch.linalg.eigvalsh(self.hessian)

    def posterior(self, scale: Scale) -> Full:
        """See `Statistics`."""
        names = [scale.names[p] for p in self._wanted]
        prior = [self.hessian.new_full((p.numel(),), scale.prior_precision[scale.names[p]]) for p in self._wanted]
        precision = (self.hessian * scale.num_data).diagonal_scatter(
            scale.num_data * self.hessian.diagonal() + torch.cat(prior)
        )
        precision = precision.to(_wide(self._wanted[0]))
        if int(torch.linalg.cholesky_ex(precision).info) != 0:
            raise ValueError(_NOT_POSITIVE)
        return Full(
            {name: scale.mean[name] for name in names},
            precision,
            scale.num_data,
            prior_precision={name: scale.prior_precision[name] for name in names},
        )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
