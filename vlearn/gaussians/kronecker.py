"""Gaussian posteriors whose precision is a Kronecker product for each layer, damped exactly in its eigenbasis.

With the covariances A = Q_A d_A Q_Aᵀ of a layer's inputs and B = Q_B d_B Q_Bᵀ of its output gradients, the Hessian
of the mean loss is B ⊗ A for the weight flattened row by row, and

    Σ = Q diag(1/(N(s + wd))) Qᵀ,  Q = Q_B ⊗ Q_A,  s = d_B d_Aᵀ  [O, I]

(K-FAC: Martens & Grosse, 2015, arXiv:1503.05671). EK-FAC (George et al., 2018, arXiv:1806.03884) keeps the basis
and takes for s the mean square of the per-example gradients in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlearn.gaussians.covariance_blocks import KroneckerBlock
from vlearn.gaussians.eigenbasis import eigen, product
from vlearn.gaussians.gaussian import Gaussian, unchanging
from vlearn.gaussians.stopped_training import common_time, stopped
from vlearn.sharded.tensors import whole

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class KroneckerFactors:
    """Hessian of one layer, diagonal in a rotated basis; for a weight with its bias, the bias is the last column.

    Attributes:
        out_basis: Q_B ``[O, O]``; None is the identity.
        in_basis: Q_A ``[I, I]``; None is the identity.
        hessian: s ``[O, I]``, per example, without the weight decay.
        prior: ``[O, I]`` in the place of wd in that basis, per example, where the entries have priors of their own.
    """

    out_basis: Tensor | None
    in_basis: Tensor | None
    hessian: Tensor
    prior: Tensor | None = None

    def whole(self) -> KroneckerFactors:
        """The same with all entries of what is sharded over processes, all of which must ask for it."""
        rows, columns, prior = (
            None if tensor is None else whole(tensor) for tensor in (self.out_basis, self.in_basis, self.prior)
        )
        return KroneckerFactors(rows, columns, whole(self.hessian), prior)

    @classmethod
    def from_covariances(cls, inputs: Tensor, gradients: Tensor) -> KroneckerFactors:
        """K-FAC's, from A ``[I, I]`` and B ``[O, O]``; eigenvalues below zero are rounding, and set to it.

        Raises:
            ValueError: if one is not finite.
        """
        rows, columns = eigen(gradients, None), eigen(inputs, None)
        if rows is None or columns is None:
            raise ValueError("A or B has no eigendecomposition: give covariances that are finite.")
        return cls(rows[1], columns[1], product(rows[0], columns[0]))


class Kronecker(Gaussian):
    """q = N(m, Σ), Σ⁻¹ = num_data·Q(s + wd)Qᵀ for each layer; draws use ess·Q(s + wd)Qᵀ.

    Args:
        mean: posterior mean of each parameter by name.
        factors: of each layer, by the names of its parameters, whose columns one after another are those of s:
            ``("0.weight", "0.bias")`` together, or ``("0.weight",)`` and ``("0.bias",)`` each for itself.
        weight_decay: wd by name, per example, the same for all names of a layer; of each entry where the layer's
            factors have a `prior`, which stands for it in their basis.
        ess: effective sample size of the draws by name, the same for all names of a layer.
        num_data: number of training examples N.
        parameters: the model's parameters by name, where the posterior belongs to a model.
        check: called before anything is read; raises if the state has moved on.
        at_mean: gives a context in which the model's weights are the mean.

    Raises:
        ValueError: if the shapes of factors and means do not fit, or the weight decay or ess of a layer is not one.
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        factors: Mapping[tuple[str, ...], KroneckerFactors],
        weight_decay: Mapping[str, float | Tensor],
        ess: Mapping[str, float],
        num_data: float,
        *,
        parameters: Mapping[str, Tensor] | None = None,
        check: Callable[[], None] = unchanging,
        at_mean: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        super().__init__(
            mean,
            list(factors),
            num_data,
            ess=ess,
            prior_precision={name: num_data * decay for name, decay in weight_decay.items()},
            parameters=parameters,
            check=check,
            at_mean=at_mean,
        )
        self._factors = dict(factors)
        self._weight_decay = {
            layer: weight_decay[layer[0]] if each.prior is None else each.prior for layer, each in factors.items()
        }
        self._shapes = {layer: [mean[name].shape for name in layer] for layer in factors}
        for layer, shapes in self._shapes.items():
            _check_shapes(layer, shapes, factors[layer])
            for what, by_name in (("weight_decay", weight_decay), ("ess", ess)):
                by_entry = what == "weight_decay" and factors[layer].prior is not None
                if not by_entry and len({float(by_name[name]) for name in layer}) > 1:
                    raise ValueError(
                        f"{what} differs between {' and '.join(layer)}, but a layer has one: give both the same, or "
                        "each its own factors."
                    )

    def block(self, group: tuple[str, ...]) -> KroneckerBlock:
        """See `Gaussian`."""
        factors = self._factors[group].whole()
        variances = factors.hessian.add(self._weight_decay[group]).mul_(self.num_data).reciprocal_()
        return KroneckerBlock(factors.out_basis, factors.in_basis, variances, self._shapes[group])

    def block_state(self) -> dict[str, Any]:
        """See `Gaussian`."""
        factors = [
            {"names": list(layer), **{field.name: getattr(f.whole(), field.name) for field in fields(f)}}
            for layer, f in self._factors.items()
        ]
        return {"factors": factors}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """See `Gaussian`."""
        factors = {
            tuple(each["names"]): KroneckerFactors(**{name: t for name, t in each.items() if name != "names"})
            for each in state["factors"]
        }
        decay = {name: prior / state["num_data"] for name, prior in state["prior_precision"].items()}
        return cls(state["mean"], factors, decay, state["ess"], state["num_data"])

    def stop_blocks(self, times: Mapping[str, float]) -> None:
        """See `Gaussian`."""
        for layer, factors in self._factors.items():
            decay = self._weight_decay[layer]
            time = common_time([times[name] for name in layer], [shape.numel() for shape in self._shapes[layer]])
            hessian = stopped(factors.hessian + decay, time) - decay
            self._factors[layer] = replace(factors, hessian=hessian)

    def damp_blocks(self, relative: float) -> None:
        """See `Gaussian`."""
        means = {layer: float(factors.hessian.mean()) for layer, factors in self._factors.items()}
        self._replace_prior({name: mean for layer, mean in means.items() for name in layer}, relative)
        self._weight_decay = {layer: relative * mean for layer, mean in means.items()}
        self._factors = {layer: replace(factors, prior=None) for layer, factors in self._factors.items()}

    def copy_blocks(self) -> None:
        """See `Gaussian`."""
        self._factors = {
            layer: replace(
                factors,
                out_basis=None if factors.out_basis is None else factors.out_basis.clone(),
                in_basis=None if factors.in_basis is None else factors.in_basis.clone(),
                hessian=factors.hessian.clone(),
            )
            for layer, factors in ((layer, factors.whole()) for layer, factors in self._factors.items())
        }


def _check_shapes(layer: tuple[str, ...], shapes: list[torch.Size], factors: KroneckerFactors) -> None:
    rows = shapes[0][0]
    if any(shape[0] != rows for shape in shapes):
        raise ValueError(
            f"{' and '.join(layer)} have {', '.join(str(s[0]) for s in shapes)} rows, so no layer has both."
        )
    columns = sum(shape.numel() for shape in shapes) // rows
    for name, tensor, expected in (
        ("hessian", factors.hessian, (rows, columns)),
        ("out_basis", factors.out_basis, (rows, rows)),
        ("in_basis", factors.in_basis, (columns, columns)),
        ("prior", factors.prior, (rows, columns)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"{name} of {' and '.join(layer)} has shape {tuple(tensor.shape)}, but it must be {expected}."
            )
