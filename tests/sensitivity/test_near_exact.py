"""refine=: solves with the curvature of the training data, preconditioned by a posterior, against dense algebra."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import CASES, Model
from tests.oracles.per_example import moving, per_example, relative_error
from tests.oracles.refits import ridge
from tests.pairs import pairs
from tests.posterior.structures import NUM_DATA, STRUCTURES, posterior_of
from tests.sensitivity.test_closed_form import half_square
from tests.sensitivity.test_influence import LABELS, arguments_of, influence_of, inputs, network
from tests.sensitivity.test_leave_group_out import left_out
from tests.sensitivity.test_refined import regression
from vlearn.linearized import gauss_newton
from vlearn.posterior import measured_scale

MANY = 150  # steps, with which the networks of these tests are solved to rounding
SLOW = pytest.mark.slow
PATHS = pytest.mark.parametrize("few_outputs", [32, pytest.param(0, marks=SLOW)], ids=["by output", "by vector"])
PRIOR = 0.7


def rows(output, target):
    return F.cross_entropy(output, target, reduction="none")


def truth_of(model, call, target):
    return per_example(model.eval(), call, lambda f: rows(f, target))


def curvature(truth, num_data=None, prior=PRIOR):
    count = len(truth.loss)
    identity = torch.eye(truth.gradients.shape[1], dtype=torch.float64)
    return truth.ggn() * ((num_data or count) / count) + prior * identity


def diagonal(model, num_data, prior=PRIOR):
    """A diagonal posterior that is far from the curvature."""
    generator = torch.Generator().manual_seed(4)
    mean = {name: p.detach() for name, p in moving(model).items()}
    precision = {n: 0.5 + 3 * torch.rand(p.shape, dtype=torch.float64, generator=generator) for n, p in mean.items()}
    return vlearn.posterior.Diagonal.from_precision(mean, precision, num_data, prior)


# -- influence --------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "convolution_with_stride",
        "grouped_convolution",
        "transposed_convolution",
        "embedding_tied_with_the_output_layer",
        "weight_used_by_its_module_and_outside_it",
        "attention",
        "layer_norm_on_sequences",
        "parameter_of_no_dimension",
        "frozen_first_layer",
        "two_inputs",
    ],
)
def test_networks_equal_dense_solves(name, few_outputs, monkeypatch):
    monkeypatch.setattr(gauss_newton, "FEW_OUTPUTS", few_outputs)
    case = CASES[name]()
    truth = truth_of(case.model, case.call, case.target)
    posterior = diagonal(case.model, num_data=len(case.target))
    loader = [(case.x, case.target)]
    found = influence_of(case.model, posterior, loader, loader, case.loss, refine=MANY)
    exact = truth.gradients @ torch.linalg.solve(curvature(truth), truth.gradients.mT)
    assert relative_error(found.values, exact) < 1e-8
    assert float(found.residual.max()) < 1e-12


@SLOW
@pytest.mark.parametrize(("structure", "few_outputs", "chunk"), pairs(list(STRUCTURES), [32, 0], [None, 4]), ids=str)
def test_any_structure_preconditions_in_any_chunks(structure, few_outputs, chunk, monkeypatch):
    monkeypatch.setattr(gauss_newton, "FEW_OUTPUTS", few_outputs)
    model, _, _, test = arguments_of(network(nn.LayerNorm(8)))
    train = [(inputs(), LABELS)]
    posterior, _ = posterior_of(moving(model), structure)
    truth = truth_of(model, lambda m: m(inputs()), LABELS)
    tests = truth_of(model, lambda m: m(inputs(7, 6)), LABELS[:7])
    prior = torch.cat([torch.full((p.numel(),), posterior.prior_precision[n]) for n, p in moving(model).items()])
    dense = truth.ggn() * (NUM_DATA / 12) + torch.diag(prior.double())
    exact = truth.gradients @ torch.linalg.solve(dense, tests.gradients.mT)
    found = influence_of(model, posterior, train, test, refine=MANY, chunk=chunk)
    assert relative_error(found.values, exact) < 1e-8


def test_each_step_comes_nearer_in_the_norm_of_the_curvature():
    """gᵀx of a conjugate gradient rises to gᵀH⁻¹g, from the first step above what any multiple of Σg gives."""
    model, _, train, _ = arguments_of()
    posterior = diagonal(model, num_data=12)
    truth = truth_of(model, lambda m: m(inputs()), LABELS)
    dense = curvature(truth)
    exact = (truth.gradients @ torch.linalg.inv(dense) * truth.gradients).sum(1)
    moved = truth.gradients / torch.cat([posterior.precision[name].flatten() for name in moving(model)])
    along = (truth.gradients * moved).sum(1).square() / ((moved @ dense) * moved).sum(1)
    before = along * (1 - 1e-10)
    for steps in range(1, 8):
        found = influence_of(model, posterior, train, train, refine=steps).values.diagonal()
        assert bool((found >= before).all()) and bool((found <= exact * (1 + 1e-10)).all())
        before = found
    first = influence_of(model, posterior, train, train, refine=1)
    assert relative_error(first.values.diagonal(), along) < 1e-10
    error = (moved * (along / (truth.gradients * moved).sum(1)).unsqueeze(1)) @ dense - truth.gradients
    variance = 1 / torch.cat([posterior.precision[name].flatten() for name in moving(model)])
    relative = ((error.square() @ variance) / (truth.gradients.square() @ variance)).sqrt()
    assert relative_error(first.residual, relative) < 1e-10


def test_the_curvature_is_num_data_times_the_mean_of_the_examples():
    model, _, train, _ = arguments_of()
    truth = truth_of(model, lambda m: m(inputs()), LABELS)
    found = influence_of(model, diagonal(model, num_data=300), train, train, refine=MANY)
    exact = truth.gradients @ torch.linalg.solve(curvature(truth, 300), truth.gradients.mT)
    assert relative_error(found.values, exact) < 1e-8


def test_linear_regression_needs_no_posterior_worth_the_name():
    x, y, model, _, _ = regression()
    new = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    posterior = diagonal(model, num_data=40, prior=1.0)
    found = influence_of(model, posterior, [(x, y)], [new], half_square, refine=10)
    variance = torch.linalg.inv(x.mT @ x + torch.eye(5, dtype=torch.float64))
    gradients = [(model(a) - b).detach() * a for a, b in ((x, y), new)]
    assert relative_error(found.values, gradients[0] @ variance @ gradients[1].mT) < 1e-10


def test_tokens_are_refined_too():
    from tests.sensitivity.test_sequences import T, language_model, rows_by_token, token_truth, tokens

    x, y = tokens(masked=False)
    model = language_model()
    posterior = diagonal(model, num_data=4)
    found = influence_of(model, posterior, [(x, y)], [(x, y)], rows_by_token, per="token", refine=MANY)
    whole = per_example(model.eval(), lambda m: m(x), lambda f: rows_by_token(f, y).mean(1))
    solved = torch.linalg.solve(curvature(whole), whole.gradients.mT)
    for t in range(T):
        exact = token_truth(model, x, y, t).gradients @ solved
        assert relative_error(found.values[found.position == t], exact) < 1e-8


# -- leaving out ------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("refined", [False, True])
def test_groups_equal_dense_solves(refined, few_outputs, monkeypatch):
    monkeypatch.setattr(gauss_newton, "FEW_OUTPUTS", few_outputs)
    model, _, train, _ = arguments_of(network(nn.LayerNorm(8)))
    truth = truth_of(model, lambda m: m(inputs()), LABELS)
    dense = curvature(truth)
    table = left_out(
        model,
        diagonal(model, 12),
        train,
        {"one": [3], "few": [0, 5, 7]},
        refine=MANY,
        refined=refined,
        tolerance=1e-14,
    )
    assert bool(table.converged.all()) and not bool(table.used_first_order.any())
    assert float(table.residual.max()) < 1e-13 and table.largest_eigenvalue is None
    for k, members in enumerate(table.index):
        jacobian = truth.jacobian[members].flatten(0, 1)
        removed = jacobian.mT @ torch.block_diag(*truth.hessian[members]) @ jacobian if refined else 0
        change = jacobian @ torch.linalg.solve(dense - removed, jacobian.mT @ truth.residual[members].flatten())
        change = change.reshape(len(members), -1)
        assert relative_error(table.deviation[k], change) < 1e-8
        expected = rows(truth.output[members] + change, LABELS[members]).mean()
        assert relative_error(table.left_out_loss[k], expected) < 1e-8


def test_a_refined_solve_leaves_single_examples_of_a_regression_out_exactly():
    x, y, model, _, _ = regression()
    posterior = diagonal(model, num_data=40, prior=1.0)
    few = (0, 17, 39)
    table = left_out(
        model, posterior, [(x, y)], {i: [i] for i in few}, half_square, refine=10, refined=True, tolerance=1e-13
    )
    for k, i in enumerate(few):
        keep = torch.arange(40) != i
        refit = x[i] @ ridge(x[keep], y[keep, 0], 1.0)
        assert float((model(x[i]).detach() + table.deviation[k].flatten() - refit).abs().max()) < 1e-10


# -- the measured scale -----------------------------------------------------------------------------------------------


def test_the_measured_scale_is_the_ratio_of_dense_self_influences():
    model, _, train, _ = arguments_of(network(nn.LayerNorm(8)))
    posterior = diagonal(model, num_data=12)
    truth = truth_of(model, lambda m: m(inputs()), LABELS)
    variance = 1 / torch.cat([posterior.precision[name].flatten() for name in moving(model)])
    exact = (truth.gradients @ torch.linalg.inv(curvature(truth)) * truth.gradients).sum(1)
    generator = torch.Generator().manual_seed(2)
    found = measured_scale(
        model, posterior, train, F.cross_entropy, examples=5, steps=MANY, generator=generator, progress=False
    )
    chosen = found.index
    assert len(set(chosen.tolist())) == 5
    assert relative_error(found.near_exact, exact[chosen]) < 1e-8
    assert relative_error(found.self_influence, (truth.gradients.square() @ variance)[chosen]) < 1e-10
    assert found.scale == pytest.approx(
        float(exact[chosen].sum() / (truth.gradients.square() @ variance)[chosen].sum()), rel=1e-8
    )
    everyone = measured_scale(model, posterior, train, F.cross_entropy, steps=3, progress=False)
    assert sorted(everyone.index.tolist()) == list(range(12)) and bool((everyone.residual > 1e-6).all())


def test_the_scale_is_right_where_an_input_that_all_examples_share_is_as_long_as_the_batch():
    torch.manual_seed(0)
    model = Model(lambda m, x, table: m.net(x + table).mean(1), net=network()).double()
    x, table, y = torch.randn(6, 6, 5).double(), torch.randn(6, 5).double(), torch.arange(6) % 3
    truth = truth_of(model, lambda m: m(x, table), y)
    posterior = diagonal(model, num_data=6)
    variance = 1 / torch.cat([posterior.precision[name].flatten() for name in moving(model)])
    exact = (truth.gradients @ torch.linalg.inv(curvature(truth)) * truth.gradients).sum(1)
    for examples in (1, 3):
        found = measured_scale(
            model, posterior, [((x, table), y)], F.cross_entropy, examples=examples, steps=MANY, progress=False
        )
        assert relative_error(found.self_influence, (truth.gradients.square() @ variance)[found.index]) < 1e-10
        assert relative_error(found.near_exact, exact[found.index]) < 1e-8


def test_the_scale_of_the_exact_posterior_is_one():
    model, _, train, _ = arguments_of()
    posterior = vlearn.posterior.fit(
        model, train, F.cross_entropy, "full", curvature="ggn-exact", prior_precision=PRIOR, progress=False
    )
    found = measured_scale(model, posterior, train, F.cross_entropy, steps=1, progress=False)
    assert found.scale == pytest.approx(1, rel=1e-10) and float(found.residual.max()) < 1e-10


def test_the_scale_of_graphs_is_that_of_each_alone():
    from tests.oracles.graphs import NETWORKS, graphs

    name = next(iter(NETWORKS))
    model, g = NETWORKS[name](), graphs()
    truth = per_example(model.eval(), g.each(), lambda f: rows(f, g.y))
    posterior = diagonal(model, num_data=len(g))
    exact = (truth.gradients @ torch.linalg.inv(curvature(truth)) * truth.gradients).sum(1)
    found = measured_scale(
        model,
        posterior,
        [(g.inputs, g.y)],
        F.cross_entropy,
        examples=2,
        steps=MANY,
        progress=False,
        example_index="batch",
    )
    assert relative_error(found.near_exact, exact[found.index]) < 1e-8


# -- errors -----------------------------------------------------------------------------------------------------------


def asked(model, posterior, train, test):
    yield lambda: influence_of(model, posterior, train, test, refine=3)
    yield lambda: left_out(model, posterior, train, {0: [1]}, refine=3)
    yield lambda: measured_scale(model, posterior, train, F.cross_entropy, steps=3, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.prior_precision.pop("0.bias"), "the prior precision of '0.bias' is unknown, but the curvature"),
        (lambda p: p.prior_precision.update({"0.bias": 0.0}), "the prior precision of '0.bias' is 0.0, but the curv"),
    ],
)
def test_a_posterior_without_a_prior_is_refused(change, message):
    model, _, train, test = arguments_of()
    posterior = diagonal(model, num_data=12)
    change(posterior)
    for call in asked(model, posterior, train, test):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_posterior_with_training_time_is_refused_also_from_disk(tmp_path):
    model, _, train, test = arguments_of()
    posterior = diagonal(model, num_data=12)
    posterior.belong_to(moving(model))
    stopped = posterior.stopped_at(2.0)
    stopped.save(tmp_path / "posterior.pt")
    for each in (
        stopped,
        vlearn.posterior.load(tmp_path / "posterior.pt", model),
        vlearn.posterior.ProductPosterior([stopped]),
    ):
        for call in asked(model, each, train, test):
            with pytest.raises(ValueError, match="has trained for a time of 2, whose response is not the inverse of"):
                call()
    influence_of(model, posterior.stopped_at(torch.inf), train, test, refine=1)


def test_a_loader_that_ends_after_one_pass_is_refused():
    model, _, train, test = arguments_of()
    with pytest.raises(
        ValueError, match=r"iterated again \(12 of 12 were missing\): .* pass a loader, not an iterator"
    ):
        influence_of(model, diagonal(model, 12), iter(list(train)), test, refine=3)
    with pytest.raises(ValueError, match="gave other examples when it was iterated again: pass a loader, not an"):
        measured_scale(model, diagonal(model, 12), iter(list(train)), F.cross_entropy, steps=3, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": 0}, "examples=0, but it must be a positive whole number: use 100."),
        ({"steps": -1}, "steps=-1, but it must be a number of steps: use 20."),
    ],
)
def test_arguments_of_the_scale_that_break_their_rule_are_refused(arguments, message):
    model, _, train, _ = arguments_of()
    with pytest.raises(ValueError) as error:
        measured_scale(model, diagonal(model, 12), train, F.cross_entropy, **arguments)
    assert str(error.value) == message


class Hidden(torch.autograd.Function):
    """A loss whose gradient is written in Python, and hides that it depends on the output."""

    @staticmethod
    def forward(ctx, output):
        ctx.output = output.detach()
        return output.square().sum(1)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.output * gradient.unsqueeze(1)


def test_a_curvature_that_the_loss_hides_is_refused_or_found_by_differences(monkeypatch):
    model, _, train, test = arguments_of()
    posterior = diagonal(model, num_data=12)
    loss = lambda output, target: Hidden.apply(output)  # noqa: E731
    plain = lambda output, target: output.square().sum(1)  # noqa: E731
    found = influence_of(model, posterior, train, test, loss, refine=MANY)
    assert relative_error(found.values, influence_of(model, posterior, train, test, plain, refine=MANY).values) < 1e-5
    monkeypatch.setattr(gauss_newton, "FEW_OUTPUTS", 0)
    with pytest.raises(RuntimeError, match="the loss has no second derivative in torch, and an output of 3 entries"):
        influence_of(model, posterior, train, test, loss, refine=1)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        hidden = self.inner[1](self.inner[0](x))
        return hidden, self.inner[2](hidden)


def test_a_loss_of_two_outputs_and_one_of_the_second_equal_dense_solves():
    model = TwoOutputs()
    posterior = diagonal(model, num_data=12)
    x, y = inputs(), LABELS
    loader = [(x, y)]
    truth = truth_of(model, lambda m: m(x)[1], y)
    exact = truth.jacobian[:1].flatten(0, 1) @ torch.linalg.solve(curvature(truth), truth.gradients[0])
    table = left_out(model, posterior, loader, {0: [0]}, output=1, refine=MANY, tolerance=1e-14)
    assert relative_error(table.deviation[0].flatten(), exact) < 1e-8

    def both(output, target):
        return rows(output[1], target) + 0.1 * output[0].square().sum(1)

    def joint(joined):
        return both((joined[:, :8], joined[:, 8:]), y)

    whole = per_example(model.eval(), lambda m: torch.cat(m(x), 1), joint)
    exact = whole.gradients @ torch.linalg.solve(curvature(whole), whole.gradients.mT)
    found = influence_of(model, posterior, loader, loader, both, refine=MANY)
    assert relative_error(found.values, exact) < 1e-8


def concave(output, target):
    return (1 - output.gather(1, target.unsqueeze(1)).squeeze(1)).relu() - output.logsumexp(1)


def test_a_curvature_that_is_not_positive_definite_is_told():
    """The loss is concave in the output: Σg is kept."""
    model, _, train, test = arguments_of()
    posterior = diagonal(model, num_data=3000)
    plain = influence_of(model, posterior, train, test, concave)
    found = influence_of(model, posterior, train, test, concave, refine=3)
    assert bool(found.residual.isnan().all()) and relative_error(found.values, plain.values) < 1e-12
