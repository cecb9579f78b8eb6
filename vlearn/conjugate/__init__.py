"""Sensitivity from conjugate models, exactly: the Bayesian learning rule where it is Bayes' rule.

The likelihood of every example has the form of the prior, log p(y_j | θ) = ⟨φ_j, T(θ)⟩ + const, so its natural
gradient does not depend on the posterior q = exp(⟨λ, T(θ)⟩ - A(λ)), and a step is an addition:

    g̃_j = ∇_μ E_q[-log p(y_j | θ)] = -φ_j,  g̃_0 = -λ_0 for the prior
    λ_t = (1 - ρ)λ_{t-1} - ρ Σ_{j=0}^N g̃_j            the Bayesian learning rule; with ρ = 1 Bayes from any start
    λ̂^{\\M} = λ_t + ρ Σ_{j∈M} g̃_j                      the memory-perturbation equation: the posterior without M

| data | posterior | T(θ) | λ | φ_j |
|---|---|---|---|---|
| `Bernoulli` | `Beta` | log θ, log(1 - θ) | α - 1, β - 1 | y, 1 - y |
| `Poisson` | `Gamma` | log θ, θ | shape - 1, -rate | y, -1 |
| `Categorical` | `Dirichlet` | log θ | concentration - 1 | y as one-hot |
| `GaussianMean` | `Gaussian` | θ, θ² | Sm, -S/2 | y/σ², -1/(2σ²) |
| `LinearRegression` | `Gaussian` | θ, θθᵀ | Sm, -S/2 | xy/σ², -xxᵀ/(2σ²) |

Khan and Rue, 2023, arXiv:2107.04562; Nickl et al., 2023, arXiv:2310.19273, Eqs. 5 to 7, Theorems 1 and 2.
All in float64.

Examples:
    >>> import torch
    >>> from vlearn import conjugate
    >>> prior = conjugate.Beta.from_standard(alpha=2, beta=2)
    >>> data = conjugate.Bernoulli(torch.tensor([1, 0, 1, 1]))
    >>> posterior = conjugate.blr_step(prior, prior, data)
    >>> float(posterior.alpha), float(posterior.beta)
    (5.0, 3.0)
    >>> conjugate.natural_gradient(data, [1])  # what removing the one tail adds to λ
    tensor([[-0., -1.]], dtype=torch.float64)
    >>> conjugate.remove(posterior, data, [1]).beta
    tensor(2., dtype=torch.float64)
"""

from vlearn.conjugate.data import Bernoulli, Categorical, Data, GaussianMean, LinearRegression, Poisson
from vlearn.conjugate.families import Beta, Dirichlet, Family, Gamma, Gaussian
from vlearn.conjugate.rule import add, blr_step, leave_one_out, natural_gradient, predictive_loss, remove

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "Data",
    "Dirichlet",
    "Family",
    "Gamma",
    "Gaussian",
    "GaussianMean",
    "LinearRegression",
    "Poisson",
    "add",
    "blr_step",
    "leave_one_out",
    "natural_gradient",
    "predictive_loss",
    "remove",
]
