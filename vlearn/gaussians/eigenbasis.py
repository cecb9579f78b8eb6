"""The eigenbasis of a layer's factors, in which its Hessian is kept as a matrix s [O, I] of the weight's shape.

With B = Q_B d_B Q_Bᵀ over the rows of the weight and A = Q_A d_A Q_Aᵀ over its columns, B ⊗ A is diagonal in the basis
Q_B ⊗ Q_A, where its entries are s = d_B d_Aᵀ; adding wd·I, also exact there, adds wd to each. A factor that is a vector
is diagonal already.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Eigen = tuple[Tensor, Tensor | None]  # values, basis; None is the identity


def eigen(factor: Tensor, before: Tensor | None) -> Eigen | None:
    """Eigenvalues, none below zero, and eigenvectors; None if they cannot be computed.

    Args:
        before: the basis so far. Signs of eigenvectors are arbitrary, so rounding would decide how noise in the basis
            acts: they are chosen as they were.
    """
    if factor.dim() == 1:
        return factor.clamp_min(0), None
    found = _eigh(factor)
    if found is None:
        return None
    values, basis = found
    overlaps = basis.diagonal() if before is None else (basis * before).sum(0)
    basis.mul_(torch.where(overlaps < 0, -1.0, 1.0).to(basis.dtype))
    return values.clamp_min_(0), basis.contiguous()  # as another process gets it: by columns, products round otherwise


def power_iteration(factor: Tensor, basis: Tensor) -> Tensor | None:
    """An orthonormal basis nearer the eigenvectors, by one step of orthogonal iteration; None if it has none.

    Columns come with falling Rayleigh quotients, so that those of large eigenvalues are not mixed with others.

    Args:
        basis: an orthonormal one that is near already.
    """
    image = factor @ basis
    order = (basis * image).sum(0).argsort(descending=True, stable=True)
    found, upper = torch.linalg.qr(image[:, order])
    if not bool(found.isfinite().all()):
        return None
    return found.mul_(torch.where(upper.diagonal() < 0, -1.0, 1.0).to(found)).contiguous()


def without_ties(factor: Tensor, share: float) -> Tensor | None:
    """A factor over its mean eigenvalue, with a diagonal of different small entries added; None if it is not finite.

    Rounding alone chooses the eigenvectors of equal eigenvalues, as are those of a factor of few examples. So they are
    chosen near the entries' own axes.

    Args:
        share: of the mean eigenvalue, the least added entry; the largest is twice that.
    """
    scale = factor.diagonal().mean()
    if not bool(scale.isfinite()):
        return None
    scaled = factor / torch.where(scale > 0, scale, 1)  # one that is zero says nothing
    scaled.diagonal().add_(torch.linspace(2, 1, len(factor), dtype=factor.dtype, device=factor.device), alpha=share)
    return scaled


def _eigh(factor: Tensor) -> tuple[Tensor, Tensor] | None:
    if not bool(factor.isfinite().all()):
        return None
    # LAPACK may not converge where most rows are zero, as of a 3x3 convolution that sees one pixel between zeros. A
    # shift by a rounding of the largest entry, which changes no more than rounding does, lets it.
    shift = torch.finfo(factor.dtype).eps * factor.diagonal().max()
    for shifted in (False, True):
        try:
            values, basis = torch.linalg.eigh(factor + shift.expand(len(factor)).diag() if shifted else factor)
        except torch.linalg.LinAlgError:
            continue
        if bool(values.isfinite().all()):
            return (values - shift if shifted else values), basis
    return None


def product(rows: Tensor, columns: Tensor) -> Tensor:
    """s of K-FAC from the eigenvalues d_B of the rows' factor and d_A of the columns'."""
    return torch.outer(rows, columns)


def with_factored_damping(rows: Tensor, columns: Tensor, weight_decay: float) -> Tensor:
    """s with which s + wd is the product of two damped factors, (d_B + √wd/π)(d_A + π√wd).

    π² = (tr A / dim A)/(tr B / dim B) (Martens and Grosse, 2015, arXiv:1503.05671, section 6.3), 1 where either is 0.
    """
    ratio = columns.mean() / rows.mean()
    pi = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()
    root = math.sqrt(weight_decay)
    return torch.outer(rows + root / pi, columns + root * pi) - weight_decay


def rotate_diagonal(
    hessian: Tensor, before: tuple[Tensor | None, Tensor | None], after: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """The diagonal of Q s Qᵀ in another basis, carried over: (R_B∘R_B) s (R_A∘R_A)ᵀ, R = Q_newᵀ Q_old."""
    rows, columns = (_squared_overlap(new, old) for new, old in zip(after, before, strict=True))
    hessian = hessian if rows is None else rows @ hessian
    return hessian if columns is None else hessian @ columns.mT


def _squared_overlap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None:
        return None
    return (new.mT if old is None else new.mT @ old).square()
