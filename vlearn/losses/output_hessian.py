"""The Hessian Λ = ∂²ℓ/∂f² of each example in the output f of the model: its roots, and random vectors that hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vlearn._wide import widened

PIECE_ENTRIES = 2**20  # of an output that are worked on at once, where more would be held than the output itself


@torch.enable_grad()
def output_hessian(residual: Tensor, output: Tensor) -> Tensor:
    """Λ_n = ∂²ℓ_n/∂f_n² ``[N, C, C]``, C all output entries of an example.

    Args:
        residual: gradient of the summed losses with respect to `output`, made with create_graph=True.
        output: ``[N, ...]`` the leaf it was taken at.
    """
    flat = residual.reshape(residual.shape[0], -1)
    if not flat.requires_grad:  # a loss linear in the output
        return flat.new_zeros(flat.shape[0], flat.shape[1], flat.shape[1])
    rows = [
        torch.autograd.grad(flat[:, c].sum(), output, retain_graph=True)[0].reshape(flat.shape)
        for c in range(flat.shape[1])
    ]
    return torch.stack(rows, 1)


def signed_root(hessian: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """(R_n ``[N, C, C]``, d_n ``[N, C]`` of ±1) with R_n diag(d_n) R_nᵀ = Λ_n.

    For softmax cross-entropy, whatever its weights and targets, Λ = s·(diag p - p pᵀ) and R has a closed form, see
    `softmax_root`; that case is recognised by its value. Else R comes from the eigenvectors of Λ; d is -1 where the
    loss is not convex in the output.

    Args:
        hessian: Λ ``[N, C, C]``.
        output: ``[N, ...]`` model outputs.
    """
    p = output.detach().reshape(output.shape[0], -1).softmax(1)
    spread = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    trace = spread.diagonal(dim1=1, dim2=2).sum(1)
    scale = (hessian.diagonal(dim1=1, dim2=2).sum(1) / trace.clamp_min(torch.finfo(p.dtype).tiny)).clamp_min(0)
    tolerance = 100 * torch.finfo(p.dtype).eps * hessian.abs().amax(dim=(1, 2)).clamp_min(torch.finfo(p.dtype).tiny)
    error = (hessian - scale[:, None, None] * spread).abs().amax(dim=(1, 2))
    if bool((error <= tolerance).all()):
        columns = softmax_root(p.unsqueeze(2), torch.eye(p.shape[1], dtype=p.dtype, device=p.device), 1)
        return scale.sqrt()[:, None, None] * columns, torch.ones_like(p)
    values, vectors = torch.linalg.eigh(hessian)
    values = values.masked_fill((values < 0) & (values > -tolerance.unsqueeze(1)), 0)  # rounding of a convex loss
    return vectors * values.abs().sqrt().unsqueeze(1), torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def softmax_root(p: Tensor, z: Tensor, axis: int) -> Tensor:
    """R z along an axis, R the Cholesky factor of diag p - p pᵀ: R Rᵀ is the curvature of softmax cross-entropy.

    With q_k the sum of the entries of p after the k-th (Tanabe and Sagae, 1992, "An Exact Cholesky Decomposition and
    the Generalized Inverse of the Variance-Covariance Matrix of the Multinomial Distribution"),

        R_kk = √(p_k q_k/q_{k-1}),  R_ik = -p_i R_kk/q_k  for i > k

    Of an example between two classes R has one column, so that zᵀRᵀV R z is no estimate but tr(ΛV) itself for signs z;
    with the root diag √p - p √pᵀ it is twice that or nothing.

    Args:
        p: ``[..., C, ...]`` probabilities.
        z: what R is multiplied with: ``[..., C, ...]``, or broadcast with p in the other axes.
        axis: of the classes in both.
    """
    before = p.flip(axis).cumsum(axis).flip(axis)  # q_{k-1}; 1 - Σ would have no small values
    after = _shifted(before, axis, -1)
    diagonal = (p * (after / before.clamp_min(torch.finfo(p.dtype).tiny))).sqrt()
    moved = diagonal * z
    shares = torch.where(after > 0, moved / after, 0.0)
    # Not the sum with the own share less that: where q_k is tiny, its share hides the others.
    return moved - p * _shifted(shares.cumsum(axis), axis, 1)


def _shifted(x: Tensor, axis: int, steps: int) -> Tensor:
    """Entries moved along an axis by one place up or down, with a zero where none came from."""
    kept = x.narrow(axis, 0 if steps > 0 else 1, x.shape[axis] - 1)
    zero = torch.zeros_like(x.narrow(axis, 0, 1))
    return torch.cat([zero, kept] if steps > 0 else [kept, zero], axis)


def hessian_root(hessian: Tensor, output: Tensor) -> Tensor:
    """R_n ``[N, C, C]`` with R_n R_nᵀ = Λ_n, its negative eigenvalues dropped; see `signed_root`."""
    root, signs = signed_root(hessian, output)
    return root * signs.clamp_min(0).unsqueeze(1)


def hessian_probe(
    residual: Tensor,
    output: Tensor,
    at_zero: Callable[[], tuple[Tensor, Tensor]],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(A random u_n ``[N, ...]`` with E[u_n u_nᵀ] = Λ_n without its negative part, whether that is not zero ``[N]``).

    u_n = R_n z, z of independent signs. Where Λ is that of a softmax along one axis at each position, as in language
    models, or diagonal, as that of squared errors, only vectors are formed; else Λ itself is.

    Args:
        residual: gradient of the summed losses with respect to `output`, made with create_graph=True.
        output: ``[N, ...]`` the leaf it was taken at.
        at_zero: gives the same two for an output of zeros.
        generator: of the signs.
    """
    softmax = _softmax_hessian(residual, output, at_zero)
    if softmax is not None:
        u = _softmax_probe(output.detach(), *softmax, random_signs(output, generator))
        return u, torch.zeros(len(output), dtype=torch.bool, device=output.device)
    diagonal = _diagonal_hessian(residual, output)
    if diagonal is not None:
        flat = diagonal.reshape(len(output), -1)
        is_negative = flat < -100 * torch.finfo(flat.dtype).eps * flat.abs().amax(1, keepdim=True)
        return diagonal.clamp_min(0).sqrt() * random_signs(output, generator), is_negative.any(1)
    return root_probe(output_hessian(residual, output), output, generator)


def root_probe(hessian: Tensor, output: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """As `hessian_probe`, from Λ ``[N, C, C]``."""
    root, signs = signed_root(hessian, output)
    z = random_signs(output, generator).reshape(len(output), -1, 1)
    return (root @ (z * signs.clamp_min(0).unsqueeze(2))).reshape(output.shape), signs.lt(0).any(1)


def random_signs(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent ±1."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return bits.mul_(2).sub_(1)


def hessian_by_differences(residual: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """Λ ``[N, C, C]`` by central differences of the residuals, for losses that torch differentiates once.

    Args:
        residual: output -> gradient of the summed losses with respect to it.
        output: ``[N, ...]`` where.
    """
    columns = []
    for c in range(output[0].numel()):
        unit = torch.zeros_like(output[0]).reshape(-1)
        unit[c] = 1
        column = product_by_differences(residual, output, unit.reshape(output.shape[1:]).expand_as(output))
        columns.append(column.reshape(len(output), -1))
    hessian = torch.stack(columns, 2)
    return (hessian + hessian.mT) / 2


def product_by_differences(residual: Callable[[Tensor], Tensor], output: Tensor, direction: Tensor) -> Tensor:
    """Λ times a direction ``[N, ...]`` of about unit entries, likewise; in float64 where the loss takes it."""
    try:
        return _difference(residual, widened(output), direction).to(output.dtype)
    except (RuntimeError, TypeError):  # it has constants of the output's own type
        return _difference(residual, output, direction)


def _difference(residual: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor) -> Tensor:
    size = float(at.masked_fill(~at.isfinite(), 0).abs().amax())
    step = torch.finfo(at.dtype).eps ** (1 / 3) * (1 + size)
    return (residual(at + step * direction) - residual(at - step * direction)) / (2 * step)


@torch.enable_grad()
def _diagonal_hessian(residual: Tensor, output: Tensor) -> Tensor | None:
    """The diagonal of Λ ``[N, ...]`` if it has nothing else, as of a loss of each entry; None if it has.

    Recognised by a product with a vector in no special direction.
    """
    if not residual.requires_grad:  # a loss linear in the output
        return torch.zeros_like(output)
    w = no_special_direction(output)
    products = [torch.autograd.grad(residual, output, v, retain_graph=True)[0] for v in (torch.ones_like(output), w)]
    diagonal, product = (each.detach() for each in products)
    limit = 1000 * torch.finfo(output.dtype).eps * diagonal.abs().reshape(len(output), -1).amax(1)
    differs = (product - diagonal * w).abs().reshape(len(output), -1).amax(1) > limit
    return None if bool(differs.any()) else diagonal


def _softmax_hessian(
    residual: Tensor, output: Tensor, at_zero: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[int, Tensor] | None:
    """(axis, s) if Λ = s (diag p - p pᵀ) at each position, p the softmax along the axis; else None.

    Recognised by one product with a vector in no special direction; s, which does not depend on the output, by the
    same product at an output of zeros, where no p is near 0 or 1.
    """
    if not residual.requires_grad:
        return None
    w = no_special_direction(output)
    flat_product = _hessian_product(*at_zero(), w)
    product = None if flat_product is None else _hessian_product(residual, output, w, retain_graph=True)
    for axis in range(1, output.dim()):
        if output.shape[axis] > 1 and product is not None and flat_product is not None:
            scale = _softmax_scale(output.detach(), w, product, flat_product, axis)
            if scale is not None:
                return axis, scale
    return None


def _hessian_product(residual: Tensor, output: Tensor, w: Tensor, retain_graph: bool = False) -> Tensor | None:
    if not residual.requires_grad:
        return None
    return torch.autograd.grad(residual, output, w, retain_graph=retain_graph)[0].detach()


def no_special_direction(output: Tensor) -> Tensor:
    """A direction ``[N, ...]`` with entries in [-1, 1] that is no eigenvector of a usual Hessian."""
    w = torch.arange(1, output[0].numel() + 1, dtype=output.dtype, device=output.device).cos_()
    return w.reshape(output.shape[1:]).expand_as(output)


@torch.no_grad()
def _softmax_scale(output: Tensor, w: Tensor, product: Tensor, flat_product: Tensor, axis: int) -> Tensor | None:
    """s of `_softmax_hessian` for this axis, None if Λ is another; w, its product, and that at zeros."""
    limit = 1000 * torch.finfo(output.dtype).eps
    scales = []
    for f, w_, of_w, flat_of_w in _pieces([output, w, product, flat_product], axis):
        flat_image = (w_ - w_.mean(axis, keepdim=True)) / f.shape[axis]
        scale = (flat_of_w * flat_image).sum(axis, keepdim=True) / flat_image.square().sum(axis, keepdim=True)
        p = f.softmax(axis)
        image = p * (w_ - (p * w_).sum(axis, keepdim=True))
        # A loss that has a logarithm of the output has none at zeros: no comparison with NaN may hold.
        is_even = (flat_of_w - scale * flat_image).abs() <= limit * scale * flat_image.abs().amax(axis, keepdim=True)
        seen = p.clamp_min(torch.finfo(p.dtype).tiny / torch.finfo(p.dtype).eps)  # below, p itself is rounded
        is_image = (of_w - scale * image).abs() <= limit * scale * seen
        if not bool(is_even.all() & is_image.all() & (scale >= 0).all()):
            return None
        scales.append(scale)
    return torch.cat(scales, _cut_axis(output, axis))


@torch.no_grad()
def _softmax_probe(output: Tensor, axis: int, scale: Tensor, z: Tensor) -> Tensor:
    """√s R z along an axis; z is used up."""
    for f, s, z_ in _pieces([output, scale, z], axis):
        z_.copy_(s.sqrt() * softmax_root(f.softmax(axis), z_, axis))
    return z


def _pieces(tensors: list[Tensor], axis: int) -> Iterator[list[Tensor]]:
    """Views of tensors, alike but for an axis, a piece at a time that is cut across another axis."""
    cut = _cut_axis(tensors[0], axis)
    length = tensors[0].shape[cut]
    step = max(1, PIECE_ENTRIES * length // max(1, tensors[0].numel()))
    for start in range(0, length, step):
        yield [tensor.narrow(cut, start, min(step, length - start)) for tensor in tensors]


def _cut_axis(tensor: Tensor, axis: int) -> int:
    return max((other for other in range(tensor.dim()) if other != axis), key=lambda other: tensor.shape[other])
