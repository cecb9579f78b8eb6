"""Fits against dense curvature by hand, curvlinops and laplace-torch."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.oracles.networks import CASES
from tests.oracles.per_example import flat, moving, per_example, relative_error
from vlearn.posterior import from_laplace
from vlearn.posterior.fit import STRUCTURES, fit

N, C, PRIOR = 24, 3, 2.0
EXACT: dict[str, Any] = {"curvature": "ggn-exact", "prior_precision": PRIOR, "progress": False}


def mlp(bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, C, bias=bias)).double()
    return model, torch.randn(N, 4).double()


def cnn(bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, stride=2, bias=bias), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=bias), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, C, bias=bias)).double()
    return model, torch.randn(N, 1, 6, 6).double()


networks = pytest.mark.parametrize("network", [mlp, cnn])
labels = torch.arange(N) % C


def in_batches(x: Tensor, y: Tensor = labels) -> list[tuple[Tensor, Tensor]]:
    return [(x[:10], y[:10]), (x[10:], y[10:])]


def rows_of_cross_entropy(y: Tensor) -> Any:
    return lambda f: F.cross_entropy(f, y, reduction="none")


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor, curvature: str) -> Tensor:
    """Σ_n J_nᵀΛ_nJ_n or Σ_n g_n g_nᵀ ``[P, P]``, in the order of the parameters."""
    truth = per_example(model.eval(), lambda m: m(x), rows_of_cross_entropy(y))
    return truth.ggn() if curvature.startswith("ggn") else truth.gradients.mT @ truth.gradients


def covariance(posterior: Any, model: nn.Module) -> Tensor:
    """Σ ``[P, P]`` by its products."""
    parameters = moving(model)
    sizes = [p.numel() for p in parameters.values()]
    rows = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, 1)
    given = {p: part.reshape(-1, *p.shape) for p, part in zip(parameters.values(), rows, strict=True)}
    moved = posterior.covariance(parameters).multiply(given)
    return torch.cat([moved[p].flatten(1) for p in parameters.values()], 1)


# -- equal to what they stand for ------------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("curvature", ["ggn-exact", "empirical"])
def test_the_dense_and_the_diagonal_one_are_by_hand(network: Any, curvature: str) -> None:
    model, x = network()
    precision = dense_hessian(model, x, labels, curvature) + PRIOR * torch.eye(
        sum(p.numel() for p in model.parameters()), dtype=torch.float64
    )
    full = fit(model, in_batches(x), F.cross_entropy, "full", **{**EXACT, "curvature": curvature})
    assert relative_error(covariance(full, model), torch.linalg.inv(precision)) < 1e-10
    diagonal = fit(model, in_batches(x), F.cross_entropy, "diagonal", **{**EXACT, "curvature": curvature})
    assert relative_error(flat(dict(diagonal.variance)), 1 / precision.diagonal()) < 1e-10
    assert diagonal.num_data == N and all(torch.equal(diagonal.mean[k], p) for k, p in model.named_parameters())


@networks
@pytest.mark.parametrize("convention", ["expand", "reduce"])
@pytest.mark.parametrize("curvature", ["ggn-exact", "empirical"])
@pytest.mark.parametrize("structure", ["kronecker", "eigenvalue-corrected"])
def test_the_kronecker_ones_are_those_of_curvlinops(
    network: Any, convention: str, curvature: str, structure: str
) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, x = network()
    posterior = fit(
        model, in_batches(x), F.cross_entropy, structure, convention=convention, **{**EXACT, "curvature": curvature}
    )
    kind = curvlinops.KFACLinearOperator if structure == "kronecker" else curvlinops.EKFACLinearOperator
    operator = kind(
        model.eval(),
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        in_batches(x),
        fisher_type="type-2" if curvature == "ggn-exact" else curvature,
        kfac_approx=convention,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    count = sum(p.numel() for p in model.parameters())
    precision = N * (operator @ torch.eye(count, dtype=torch.float64)) + PRIOR * torch.eye(count, dtype=torch.float64)
    assert relative_error(covariance(posterior, model), torch.linalg.inv(precision)) < 1e-8


@networks
@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "full"])
def test_they_are_those_of_laplace_torch(network: Any, structure: str) -> None:
    """Without biases, which laplace-torch keeps as blocks of their own."""
    pytest.importorskip("laplace")
    model, x = network(bias=structure != "kronecker")
    la = laplace_of(model, x, {"diagonal": "diag", "kronecker": "kron", "full": "full"}[structure])
    found = fit(model, in_batches(x), F.cross_entropy, structure, **EXACT)
    expected = from_laplace(la)
    assert relative_error(flat(dict(found.variance)), flat(dict(expected.variance))) < 1e-6


def laplace_of(model: nn.Module, x: Tensor, structure: str, **arguments: Any) -> Any:
    import laplace
    from laplace.curvature import CurvlinopsGGN

    la = laplace.Laplace(
        copy.deepcopy(model),
        "classification",
        "all",
        structure,
        backend=CurvlinopsGGN,
        **{"prior_precision": PRIOR, **arguments},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        la.fit(DataLoader(TensorDataset(x, labels), batch_size=N))
    return la


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "batch_norm_in_eval_mode",
        "group_norm",
        "layer_norm_on_sequences",
        "rms_norm_and_prelu",
        "instance_norm",
        "recurrence_with_positions_first",
    ],
)
def test_every_kind_of_layer_has_its_exact_diagonal(name: str) -> None:
    case = CASES[name]()
    truth = per_example(
        case.model.eval(),
        case.call,
        lambda output: case.loss(output, case.target, reduction="none").reshape(len(output), -1).mean(1),
    )
    loader = [(case.x, case.target)]
    found = fit(case.model, loader, case.loss, "diagonal", **EXACT)
    assert relative_error(flat(dict(found.variance)), 1 / (truth.ggn().diagonal() + PRIOR)) < 1e-8
    structured = fit(case.model, loader, case.loss, "kronecker", **EXACT)
    assert set(structured.names) == set(found.names)


def test_probes_and_sampled_labels_have_the_exact_one_as_their_mean() -> None:
    model, x = mlp()
    hessian = dense_hessian(model, x, labels, "ggn").diagonal()
    for curvature in ("ggn", "sampled"):
        found = fit(
            model,
            in_batches(x),
            F.cross_entropy,
            "diagonal",
            curvature=curvature,
            draws=400,
            generator=torch.Generator().manual_seed(0),
        )
        precision = 1 / flat(dict(found.variance)) - 1
        assert relative_error(precision, hessian) < 0.05


# -- which parameters, which prior -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_frozen_parameters_stay(structure: str) -> None:
    model, x = mlp()
    model[0].bias.requires_grad_(False)
    found = fit(model, in_batches(x), F.cross_entropy, structure, **EXACT)
    last = {"2.weight", "2.bias"}
    assert set(found.names) == (last if structure.startswith("last") else {"0.weight", *last})


@pytest.mark.parametrize("structure", ["last-layer", "last-layer-kronecker"])
def test_the_last_layer_is_that_of_a_model_of_it_alone(structure: str) -> None:
    model, x = cnn()
    found = fit(model, in_batches(x), F.cross_entropy, structure, **EXACT)
    features = model[:-1](x).detach()
    head = nn.Sequential(copy.deepcopy(model[-1]))
    whole = "full" if structure == "last-layer" else "kronecker"
    alone = fit(head, in_batches(features), F.cross_entropy, whole, **EXACT)
    for name in ("weight", "bias"):
        assert relative_error(found.variance[f"5.{name}"], alone.variance[f"0.{name}"]) < 1e-10


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "full"])
def test_what_the_loss_does_not_depend_on_has_its_prior(structure: str) -> None:
    model, x = mlp()
    model.register_parameter("unused", nn.Parameter(torch.ones(2).double()))
    found = fit(model, in_batches(x), F.cross_entropy, structure, **EXACT)
    assert relative_error(found.variance["unused"], torch.full((2,), 1 / PRIOR, dtype=torch.float64)) < 1e-12


def test_prior_precisions_of_the_last_layer_alone_are_enough() -> None:
    model, x = mlp()
    told: dict[str, Any] = {**EXACT, "prior_precision": {"2.weight": 3.0, "2.bias": 4.0}}
    assert fit(model, in_batches(x), F.cross_entropy, "last-layer", **told).prior_precision == told["prior_precision"]


def test_a_shared_weight_is_one_parameter() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.head = nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.inner(x).tanh()).tanh())

    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(N, 4).double()
    precision = dense_hessian(model, x, labels, "ggn").diagonal() + PRIOR
    found = fit(model, in_batches(x), F.cross_entropy, "diagonal", **EXACT)
    assert relative_error(flat(dict(found.variance)), 1 / precision) < 1e-10


def test_a_group_without_weight_decay_is_told_to_give_prior_precisions_by_name() -> None:
    model, x = mlp()
    weights, biases = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
    optimizer = torch.optim.SGD([{"params": weights, "weight_decay": 1e-2}, {"params": biases}], lr=0.1)
    with pytest.raises(ValueError, match="SGD has no weight decay for '0.bias', .* give prior_precision by name"):
        fit(model, in_batches(x), F.cross_entropy, prior_precision=optimizer)


def test_a_fit_between_forward_and_step_is_at_the_mean_and_leaves_the_draw() -> None:
    model, x = mlp()
    expected = fit(model, in_batches(x), F.cross_entropy, **EXACT)
    optimizer = vlearn.IVON(model, lr=0.1, ess=N)
    loss = F.cross_entropy(model(x), labels)
    draw = [p.detach().clone() for p in model.parameters()]
    found = fit(model, in_batches(x), F.cross_entropy, **EXACT)
    assert all(torch.equal(found.mean[name], expected.mean[name]) for name in expected.mean)
    assert torch.equal(covariance(found, model), covariance(expected, model))
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), draw, strict=True))
    loss.backward()
    optimizer.step()


def test_prior_precisions_come_by_name_and_from_an_optimizers_penalty() -> None:
    model, x = mlp()
    by_name = {name: 1.0 + n for n, (name, _) in enumerate(model.named_parameters())}
    hessian = dense_hessian(model, x, labels, "ggn").diagonal()
    prior = torch.cat([torch.full((p.numel(),), by_name[name]) for name, p in model.named_parameters()])
    found = fit(model, in_batches(x), F.cross_entropy, "diagonal", **{**EXACT, "prior_precision": by_name})
    assert relative_error(flat(dict(found.variance)), 1 / (hessian + prior)) < 1e-10
    structured = fit(model, in_batches(x), F.cross_entropy, "kronecker", **{**EXACT, "prior_precision": by_name})
    assert set(structured.names) == set(by_name) and structured.prior_precision == by_name
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[2].parameters()}],
        lr=0.1,
        weight_decay=0.5,
    )
    told = fit(model, in_batches(x), F.cross_entropy, "diagonal", **{**EXACT, "prior_precision": optimizer})
    assert told.prior_precision == pytest.approx(
        {"0.weight": 0.1 * N, "0.bias": 0.1 * N, "2.weight": 0.5 * N, "2.bias": 0.5 * N}
    )


@networks
@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "full"])
def test_the_most_likely_prior_precision_is_laplace_torchs(network: Any, structure: str) -> None:
    pytest.importorskip("laplace")
    model, x = network(bias=False)
    told: dict[str, Any] = {**EXACT, "prior_precision": "marginal-likelihood"}
    found = set(fit(model, in_batches(x), F.cross_entropy, structure, **told).prior_precision.values())
    (likeliest,) = found
    la = laplace_of(model, x, {"diagonal": "diag", "kronecker": "kron", "full": "full"}[structure])
    delta = torch.tensor(float(likeliest), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(la.log_marginal_likelihood(delta), delta)
    assert abs(float(slope) * likeliest) < 1e-4


# -- as users have it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_public_function_takes_it(structure: str) -> None:
    model, x = mlp()
    batches = in_batches(x)
    found = fit(model, batches, F.cross_entropy, structure, progress=False)
    table = vlearn.sweep(model, found, batches, F.cross_entropy, leverage="exact", progress=False)
    assert bool(table.loo_loss.isfinite().all()) and bool((table.self_influence > 0).all())
    assert vlearn.influence(model, found, batches, batches[:1], F.cross_entropy, progress=False).values.shape == (N, 10)
    vlearn.leave_group_out(model, found, batches, {"some": [1, 15]}, F.cross_entropy, progress=False)
    assert vlearn.predict(model, found, x, draws=4).shape == (N, C)
    assert found.kl() > 0


def test_it_is_a_copy_and_leaves_the_model_as_it_was() -> None:
    model, x = mlp()
    model.insert(1, nn.BatchNorm1d(5).double())
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = fit(model, in_batches(x), F.cross_entropy, progress=False)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model[0].weight.add_(1)
    assert torch.equal(found.mean["0.weight"], before["0.weight"])
    table = vlearn.sweep(model, found, in_batches(x), F.cross_entropy, progress=False)
    with torch.no_grad():
        model[0].weight.sub_(1)
    again = vlearn.sweep(model, found, in_batches(x), F.cross_entropy, progress=False)
    assert torch.equal(table.loss, again.loss)  # at its mean


def test_bfloat16_models_have_float32_factors() -> None:
    model, x = mlp()
    exact = fit(model.float(), in_batches(x.float()), F.cross_entropy, **EXACT)
    narrow = fit(copy.deepcopy(model).bfloat16(), in_batches(x.bfloat16()), F.cross_entropy, **EXACT)
    for name in exact.names:
        assert narrow.variance[name].dtype == torch.float32
        assert relative_error(narrow.variance[name], exact.variance[name]) < 0.05


def test_sequences_have_the_convention_of_their_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    tokens, targets = torch.randint(0, 7, (6, 5)), torch.randint(0, 7, (6, 5))

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, t: Tensor) -> Tensor:
            return self.body(t).transpose(1, 2)

    swapped = Swapped()
    truth = per_example(swapped, lambda m: m(tokens), lambda f: F.cross_entropy(f, targets, reduction="none").mean(1))
    found = fit(swapped, [(tokens, targets)], F.cross_entropy, "diagonal", **EXACT)
    assert relative_error(flat(dict(found.variance)), 1 / (truth.ggn().diagonal() + PRIOR)) < 1e-8
    sampled = fit(
        swapped,
        [(tokens, targets)],
        F.cross_entropy,
        "diagonal",
        curvature="sampled",
        draws=1000,
        prior_precision=PRIOR,
        generator=torch.Generator().manual_seed(0),
    )
    assert relative_error(1 / flat(dict(sampled.variance)), truth.ggn().diagonal() + PRIOR) < 0.05


def test_concatenated_graphs_are_fitted_by_their_index() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, C)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            h = self.first(x).tanh()
            return self.head(h.new_zeros(int(index.max()) + 1, 5).index_add(0, index, h))

    torch.manual_seed(0)
    model, x, index = Pooled().double(), torch.randn(9, 4).double(), torch.tensor([0, 1, 1, 0, 2, 2, 2, 3, 0])
    truth = per_example(model, lambda m: m(x, index), rows_of_cross_entropy(labels[:4]))
    found = fit(model, [((x, index), labels[:4])], F.cross_entropy, "diagonal", example_index="index", **EXACT)
    assert relative_error(flat(dict(found.variance)), 1 / (truth.ggn().diagonal() + PRIOR)) < 1e-10
    with pytest.raises(RuntimeError, match="example_index"):
        fit(model, [((x, index), labels[:4])], F.cross_entropy, **EXACT)


def test_a_regression_has_the_likelihoods_of_its_loss() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(N, 3).double()
    y, variance = torch.randn(N, 1).double(), 0.3

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().flatten(1).sum(1) / (2 * variance)

    design = torch.cat([x, torch.ones(N, 1).double()], 1)
    precision = design.mT @ design / variance + PRIOR * torch.eye(4).double()
    for curvature in ("ggn", "ggn-exact"):
        found = fit(model, in_batches(x, y), loss, "full", curvature=curvature, prior_precision=PRIOR)
        assert relative_error(covariance(found, model), torch.linalg.inv(precision)) < 1e-10


# -- losses that are not convex in the output ------------------------------------------------------------------------


def robust(output: Tensor, target: Tensor) -> Tensor:
    """That of Cauchy noise, which curves downwards where |f₀ + f₁ - y| > 1, and a square."""
    return torch.log1p((output.sum(1) - target).square()) + output[:, 1].square() / 10


def robust_regression() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """(Model, x, y, Σ JᵀΛJ, the same without the negative eigenvalues of Λ) by torch.func alone."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(N, 3).double(), torch.randn(N).double()
    with torch.no_grad():
        weight, bias = model.weight, model.bias
        output = x @ weight.T + bias
        hessian = torch.func.vmap(torch.func.hessian(lambda f, t: robust(f[None], t[None])[0]))(output, y)
        eye = torch.eye(2, dtype=torch.float64)
        jacobian = torch.stack([torch.cat([torch.kron(eye, row[None]), eye], 1) for row in x])
        values, vectors = torch.linalg.eigh(hessian)
        positive = vectors @ torch.diag_embed(values.clamp_min(0)) @ vectors.mT
        whole, part = (torch.einsum("ncp,ncd,ndq->pq", jacobian, each, jacobian) for each in (hessian, positive))
    assert 0.1 < float((values[:, 0] < 0).double().mean()) < 0.9
    return model, x, y, whole, part


@pytest.mark.parametrize("structure", ["full", "last-layer", "diagonal"])
def test_what_curves_downwards_counts_in_dense_and_diagonal_structures(structure: str) -> None:
    model, x, y, whole, _ = robust_regression()
    found = fit(model, in_batches(x, y), robust, structure, **{**EXACT, "prior_precision": 9.0})
    precision = whole + 9 * torch.eye(8, dtype=torch.float64)
    expected = precision.diagonal().diag() if structure == "diagonal" else precision
    assert relative_error(covariance(found, model), torch.linalg.inv(expected)) < 1e-10


def test_probes_and_kronecker_factors_leave_it_out_and_say_of_how_many_examples() -> None:
    model, x, y, whole, part = robust_regression()
    downwards = torch.linalg.eigvalsh(
        torch.func.vmap(torch.func.hessian(lambda f, t: robust(f[None], t[None])[0]))(model(x).detach(), y)
    )[:, 0].lt(0)
    share = f"{downwards.double().mean():.0%} of the examples"
    with pytest.warns(UserWarning, match=f"curves downwards in the output of {share}, which probes cannot hold"):
        found = fit(model, in_batches(x, y), robust, "diagonal", draws=1000, prior_precision=9.0)
    assert relative_error(1 / flat(dict(found.variance)), part.diagonal() + 9) < 0.02
    assert relative_error(whole.diagonal() + 9, part.diagonal() + 9) > 0.04
    for structure in ("kronecker", "eigenvalue-corrected", "last-layer-kronecker"):
        with pytest.warns(UserWarning, match=f"of {share}, which Kronecker factors cannot hold: that was left out"):
            fit(model, in_batches(x, y), robust, structure, **EXACT)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_a_curvature_that_is_no_precision_is_refused(structure: str) -> None:
    model, x, y, _, _ = robust_regression()

    def downwards(output: Tensor, target: Tensor) -> Tensor:
        return -output.square().sum(1)

    with pytest.raises(ValueError, match="not positive definite.* larger prior_precision, or use curvature='ggn'"):
        fit(model, in_batches(x, y), downwards, structure, **EXACT)
    with pytest.raises(ValueError, match="prior_precision='marginal-likelihood' of a curvature with negative"):
        fit(model, in_batches(x, y), downwards, structure, **{**EXACT, "prior_precision": "marginal-likelihood"})


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "kron"}, "structure='kron', but it must be one of 'diagonal', 'kronecker'"),
        ({"curvature": "hessian"}, "curvature='hessian', but it must be one of 'ggn'"),
        ({"convention": "sum"}, "convention='sum'"),
        ({"draws": 0}, "draws=0, but it must be a positive whole number"),
        ({"num_data": 0}, "num_data=0, but it must be positive"),
        ({"likelihood": "poisson", "curvature": "sampled"}, "likelihood='poisson'"),
        ({"prior_precision": 0.0}, "the prior precision of '0.weight' is 0, but it must be positive"),
        ({"prior_precision": {"0.weight": 1.0}}, "prior_precision has no '0.bias'"),
        ({"prior_precision": "evidence"}, "prior_precision='evidence', but it must be a number"),
    ],
)
def test_bad_arguments_are_refused_before_any_pass(arguments: dict[str, Any], message: str) -> None:
    model, x = mlp()

    def loader() -> Any:
        raise AssertionError("the data were read")
        yield

    with pytest.raises(ValueError, match=message):
        fit(model, loader(), F.cross_entropy, **arguments)


def test_a_decoupled_decay_is_a_penalty_past_the_preconditioner() -> None:
    """AdamW rests where g/(√v̂ + ε) + λθ = 0: the prior's precision is N·λ(√v̂ + ε), one for each module."""
    model, x = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.3)
    for n in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x[10 * n :]), labels[10 * n :]).backward()
        optimizer.step()
    posterior = fit(model, in_batches(x), F.cross_entropy, prior_precision=optimizer, progress=False)
    for name in posterior.names:
        own = [p for other, p in model.named_parameters() if other.split(".")[0] == name.split(".")[0]]
        roots = [(optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**5)).sqrt().flatten() + 1e-8 for p in own]
        expected = N * 0.3 * float(torch.cat(roots).mean())
        assert posterior.prior_precision[name] == pytest.approx(expected, rel=1e-6)


def decaying() -> list[type[torch.optim.Optimizer]]:
    classes = [each for each in vars(torch.optim).values() if isinstance(each, type)]
    return [each for each in classes if "weight_decay" in inspect.signature(each).parameters]


@pytest.mark.parametrize("kind", decaying(), ids=lambda kind: kind.__name__)
def test_the_decay_of_an_optimizer_is_read_where_it_is_a_penalty(kind: Any) -> None:
    """It is one where a gradient of -λθ leaves the weights where they are."""
    model, x = mlp()
    weights = [p for p in model.parameters() if p.dim() == 2]  # Muon takes no others
    for p in set(model.parameters()).difference(weights):
        p.requires_grad_(False)
    optimizer = kind(weights, lr=0.1, weight_decay=0.5)  # without rounding
    before = [p.detach().clone() for p in weights]
    for p in weights:
        p.grad = -0.5 * p.detach()
    optimizer.step()
    if all(map(torch.equal, before, weights)):
        posterior = fit(model, in_batches(x), F.cross_entropy, prior_precision=optimizer, progress=False)
        assert set(posterior.prior_precision.values()) == {N * 0.5}
    elif kind is not torch.optim.AdamW:
        with pytest.raises(ValueError, match=f"what penalty the weight decay of {kind.__name__} is cannot be told"):
            fit(model, in_batches(x), F.cross_entropy, prior_precision=optimizer)


def test_a_decoupled_decay_without_a_step_has_no_scale() -> None:
    model, x = mlp()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters())]
    if "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters:  # from torch 2.7
        optimizers.append(torch.optim.Adam(model.parameters(), weight_decay=0.1, decoupled_weight_decay=True))
    for optimizer in optimizers:
        with pytest.raises(ValueError, match="has taken no step for '0.weight', so its decoupled"):
            fit(model, in_batches(x), F.cross_entropy, prior_precision=optimizer)


def test_an_empty_loader_and_one_that_ends_are_refused() -> None:
    model, x = mlp()
    for loader in ([], iter(in_batches(x))):
        with pytest.raises(ValueError, match="the loader gave no batch"):
            fit(model, loader, F.cross_entropy, "eigenvalue-corrected")


def test_a_frozen_model_and_one_that_is_too_large_are_refused() -> None:
    model, x = mlp()
    large = nn.Linear(200, 50)
    with pytest.raises(ValueError, match="'full' of 10050 parameters needs a matrix"):
        fit(large, [(torch.randn(2, 200), torch.tensor([0, 1]))], F.cross_entropy, "full")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        fit(model, in_batches(x), F.cross_entropy)


def test_examples_that_meet_are_refused() -> None:
    class Centred(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0)) * (1 + x.mean())

    model, x = mlp()
    with pytest.raises(RuntimeError, match="other examples"):
        fit(Centred(*model), in_batches(x), F.cross_entropy)


def test_without_a_kronecker_layer_the_eigenvalue_corrected_one_is_the_diagonal_one() -> None:
    torch.manual_seed(0)
    model, x = nn.LayerNorm(C).double(), torch.randn(N, C).double()
    found = fit(model, in_batches(x), F.cross_entropy, "eigenvalue-corrected", **EXACT)
    expected = fit(model, in_batches(x), F.cross_entropy, "diagonal", **EXACT)
    assert relative_error(flat(dict(found.variance)), flat(dict(expected.variance))) < 1e-12
