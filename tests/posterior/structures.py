"""Posteriors of random structure over a model's parameters, and their dense covariance."""

import torch

from tests.oracles.kronecker import assembled, block_precision, parameter_order, random_covariance
from vlearn.posterior import Diagonal, Full, Kronecker, KroneckerFactors, ProductPosterior

NUM_DATA, ESS = 40.0, 90.0
STRUCTURES = ("layers", "separate", "mixed", "correlated_eigenvalues")


def posterior_of(parameters, structure):
    """(posterior, dense Σ) over parameters by name.

    layers: weight and bias of a layer together; separate: each for itself; mixed: those, diagonal and dense ones by
    turns; correlated_eigenvalues: as layers, but s is no outer product, as EK-FAC has it.
    """
    generator = torch.Generator().manual_seed(1)
    mean = {name: p.detach().clone() for name, p in parameters.items()}
    parts, blocks = [], {}
    for turn, group in enumerate(groups_of(mean, structure)):
        kind = ("kronecker", "diagonal", "dense")[turn % 3] if structure == "mixed" else "kronecker"
        means = {name: mean[name] for name in group}
        size = sum(tensor.numel() for tensor in means.values())
        decay, ess = 0.1 + 0.05 * turn, dict.fromkeys(group, ESS)
        decays = dict.fromkeys(group, decay)
        if kind == "dense" and size:
            blocks[group] = NUM_DATA * (
                random_covariance(size, generator) + decay * torch.eye(size, dtype=torch.float64)
            )
            prior = dict.fromkeys(group, NUM_DATA * decay)
            parts.append(Full(means, blocks[group], NUM_DATA, ess=ESS, prior_precision=prior))
        elif kind == "diagonal" or not size or not means[group[0]].dim():
            hessian = {n: torch.rand(t.shape, dtype=torch.float64, generator=generator) for n, t in means.items()}
            parts.append(Diagonal(means, hessian, decays, ess, NUM_DATA))
            blocks[group] = torch.diag(NUM_DATA * (torch.cat([h.flatten() for h in hessian.values()]) + decay))
        else:
            factors, blocks[group] = kronecker(means, decay, generator, structure)
            parts.append(Kronecker(means, {group: factors}, decays, ess, NUM_DATA))
    covariances = {group: torch.linalg.inv(precision) for group, precision in blocks.items()}
    posterior = parts[0] if len(parts) == 1 else ProductPosterior(parts)
    return posterior, assembled(list(mean), {name: t.numel() for name, t in mean.items()}, covariances)


def kronecker(means, decay, generator, structure):
    shapes = [tensor.shape for tensor in means.values()]
    rows = shapes[0][0]
    columns = sum(shape.numel() for shape in shapes) // rows
    inputs, gradients = random_covariance(columns, generator), random_covariance(rows, generator)
    factors = KroneckerFactors.from_covariances(inputs, gradients)
    if structure != "correlated_eigenvalues":
        return factors, block_precision(inputs, gradients, shapes, NUM_DATA, decay)
    values = torch.rand(rows, columns, dtype=torch.float64, generator=generator)
    basis = torch.kron(factors.out_basis, factors.in_basis)
    order = parameter_order(shapes)
    precision = NUM_DATA * (basis @ torch.diag(values.flatten() + decay) @ basis.mT)[order][:, order]
    return KroneckerFactors(factors.out_basis, factors.in_basis, values), precision


def groups_of(mean, structure):
    """Names of each block; a weight and a bias of one module with as many rows go together."""
    if structure == "separate":
        return [(name,) for name in mean]
    found, taken = [], set()
    for name, tensor in mean.items():
        bias = name.removesuffix("weight") + "bias"
        if name in taken:
            continue
        together = name.endswith("weight") and bias in mean and mean[bias].shape[0] == tensor.shape[0]
        found.append((name, bias) if together else (name,))
        taken |= set(found[-1])
    return found
