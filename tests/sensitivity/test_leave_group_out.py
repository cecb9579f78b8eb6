"""Leaving out groups, against dense algebra over all their examples and against exact refits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.oracles.networks import CASES, Model
from tests.oracles.per_example import flat, moving, per_example, relative_error
from tests.oracles.refits import Logistic, ridge
from tests.posterior.structures import STRUCTURES, posterior_of
from tests.sensitivity.test_closed_form import at, half_square
from tests.sensitivity.test_influence import Noisy
from tests.sensitivity.test_refined import regression

LABELS = torch.arange(12) % 3


def left_out(model, posterior, loader, groups, loss_fn=F.cross_entropy, **arguments):
    return vlearn.leave_group_out(model, posterior, loader, groups, loss_fn, progress=False, **arguments)


def network(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *between, nn.Linear(8, 3)).double()


def inputs():
    return torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def arguments_of(model=None):
    model = network() if model is None else model
    return model, vlearn.IVON(model, lr=0.1, ess=50).posterior(), [(inputs(), LABELS)]


# -- dense algebra ----------------------------------------------------------------------------------------------------


def dense_change(truth, covariance, rows, refined=False):
    """(I - V_MΛ_M)⁻¹ V_M e_M or V_M e_M, V_M over all outputs of all members."""
    jacobian = truth.jacobian[rows].flatten(0, 1)
    v = jacobian @ covariance @ jacobian.mT
    change = v @ truth.residual[rows].flatten()
    if refined:
        change = torch.linalg.solve(
            torch.eye(len(v), dtype=v.dtype) - v @ torch.block_diag(*truth.hessian[rows]), change
        )
    return change.reshape(len(rows), -1)


def dense_posterior(case, loss, prior_precision=0.5):
    truth = per_example(case.model.eval(), case.call, lambda f: loss(f, case.target))
    mean = {name: p.detach() for name, p in moving(case.model).items()}
    precision = truth.ggn() + prior_precision * torch.eye(truth.gradients.shape[1], dtype=torch.float64)
    return truth, torch.linalg.inv(precision), vlearn.posterior.Full(mean, precision, num_data=len(case.target))


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "convolution_with_stride",
        "grouped_convolution",
        "embedding_tied_with_the_output_layer",
        "weight_used_by_its_module_and_outside_it",
        "attention",
        "layer_norm_on_sequences",
        "parameter_of_no_dimension",
        "frozen_first_layer",
        "keyword_inputs",
        "two_inputs",
    ],
)
def test_networks_equal_dense_algebra_over_the_group(name, refined):
    case = CASES[name]()

    def loss(output, target):
        return F.cross_entropy(output, target, reduction="none")

    truth, covariance, posterior = dense_posterior(case, loss)
    groups = {"first": [2, 0, 1], "second": [3, 1]}
    table = left_out(
        case.model,
        posterior,
        [(case.x, case.target)],
        groups,
        case.loss,
        refined=refined,
        tolerance=1e-13,
        threshold=1.0,
    )
    assert table.group == ["first", "second"] and table.size.tolist() == [3, 2]
    for k, rows in enumerate(table.index):
        assert sorted(rows.tolist()) == sorted(groups[table.group[k]])
        change = dense_change(truth, covariance, rows, refined)
        assert relative_error(table.deviation[k], change) < 1e-9
        expected = loss((truth.output[rows] + change), case.target[rows]).mean()
        assert relative_error(table.left_out_loss[k], expected) < 1e-9
        assert relative_error(table.loss[k], truth.loss[rows].mean()) < 1e-12
    assert table.converged is None or bool(table.converged.all())


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "convolution_with_stride", "attention"])
def test_every_structure_of_a_covariance_equals_its_dense_form(name, structure, refined):
    case = CASES[name]()
    posterior, covariance = posterior_of(moving(case.model), structure)
    truth = per_example(case.model.eval(), case.call, lambda f: F.cross_entropy(f, case.target, reduction="none"))
    loader, groups = [(case.x, case.target)], [0, 0, 1, 0]
    table = left_out(case.model, posterior, loader, groups, case.loss, refined=refined, tolerance=1e-13, threshold=1.0)
    for k, rows in enumerate(table.index):
        own = refined and not bool(table.used_first_order[k])
        assert relative_error(table.deviation[k], dense_change(truth, covariance, rows, own)) < 1e-8
    assert not refined or not bool(table.used_first_order.all())


def test_conjugate_gradients_in_float32_are_near_float64():
    found = []
    for dtype in (torch.float64, torch.float32):
        model = network(nn.LayerNorm(8)).to(dtype)
        posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()
        found.append(left_out(model, posterior, [(inputs().to(dtype), LABELS)], LABELS, refined=True))
    assert bool(found[1].converged.all()) and found[1].deviation[0].dtype == torch.float32
    assert relative_error(found[1].left_out_loss, found[0].left_out_loss) < 1e-4


def test_the_largest_eigenvalue_is_that_of_the_group():
    case = CASES["mlp"]()
    truth, covariance, posterior = dense_posterior(case, lambda f, t: F.cross_entropy(f, t, reduction="none"))
    table = left_out(
        case.model, posterior, [(case.x, case.target)], [0, 0, 1, 0], refined=True, tolerance=1e-13, threshold=1.0
    )
    for k, rows in enumerate(table.index):
        jacobian = truth.jacobian[rows].flatten(0, 1)
        product = jacobian @ covariance @ jacobian.mT @ torch.block_diag(*truth.hessian[rows])
        assert float(table.largest_eigenvalue[k]) == pytest.approx(
            float(torch.linalg.eigvals(product).real.max()), rel=1e-6
        )


def test_a_group_of_one_is_leaving_one_out():
    model, posterior, loader = arguments_of()
    for refined in (False, True):
        table = vlearn.sweep(model, posterior, loader, F.cross_entropy, None, progress=False, refined=refined)
        alone = left_out(model, posterior, loader, torch.arange(12), refined=refined, tolerance=1e-12)
        assert alone.index == list(torch.arange(12).unsqueeze(1))
        assert relative_error(torch.cat(alone.deviation), table.deviation) < 1e-10
        assert relative_error(alone.left_out_loss, table.loo_loss) < 1e-10


def test_a_loss_of_several_outputs_counts_whole():
    model = Model(lambda m, x: {"logits": m.net(x), "aux": m.aux(x)}, net=network(), aux=nn.Linear(5, 1)).double()
    posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()

    def loss(output, target):
        return F.cross_entropy(output["logits"], target, reduction="none") + output["aux"].square().squeeze(1)

    def joined(m):
        return torch.cat([m.net(inputs()), m.aux(inputs())], 1)

    truth = per_example(model.eval(), joined, lambda f: loss({"logits": f[:, :3], "aux": f[:, 3:]}, LABELS))
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(model)}))
    table = left_out(
        model,
        posterior,
        [(inputs(), LABELS)],
        LABELS,
        loss,
        refined=True,
        tolerance=1e-12,
        output="logits",
        threshold=1,
    )
    for k, rows in enumerate(table.index):
        change = dense_change(truth, covariance, rows, refined=True)
        assert relative_error(table.deviation[k], change[:, :3]) < 1e-9


def test_an_operation_without_forward_derivative_takes_another_way():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x / 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    model = Model(lambda m, x: Halved.apply(m.net(x)), net=network())
    twin = Model(lambda m, x: m.net(x) / 2, net=network())
    for refined in (False, True):
        table, other = (left_out(*arguments_of(m), LABELS, refined=refined) for m in (model, twin))
        assert relative_error(table.left_out_loss, other.left_out_loss) < 1e-12


# -- exact refits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior_precision", [0.1, 30.0])
def test_linear_regression_without_a_group_is_predicted_exactly(prior_precision):
    x, y, model, posterior, _ = regression(prior_precision)
    groups = {"few": [3, 7, 11], "half": torch.arange(20), "most": torch.arange(5, 40)}
    loader = [(x[:15], y[:15]), (x[15:], y[15:])]
    table = left_out(model, posterior, loader, groups, half_square, refined=True, tolerance=1e-14, threshold=1.0)
    assert bool(table.converged.all()) and int(table.iterations.max()) <= 7  # five weights
    for k, rows in enumerate(table.index):
        keep = torch.ones(40, dtype=torch.bool)
        keep[rows] = False
        refit = x[rows] @ ridge(x[keep], y[keep, 0], prior_precision)
        assert relative_error(model(x[rows]).detach().squeeze(1) + table.deviation[k].squeeze(1), refit) < 1e-10
        assert float(table.left_out_loss[k]) == pytest.approx(
            float(half_square(refit.unsqueeze(1), y[rows]).mean()), rel=1e-9
        )


def three_classes(prior_precision):
    """Logistic regression at its optimum, its posterior, and its 200 examples in two batches."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(200) % 3
    x = torch.randn(200, 4, dtype=torch.float64, generator=generator)
    x[:, :3] += 2.0 * F.one_hot(y, 3)
    x[:, -1] = 1
    oracle = Logistic(x, y, classes=3, prior_precision=prior_precision)
    weight = oracle.fit()
    model = at(nn.Linear(4, 3, bias=False).double(), weight)
    posterior = vlearn.posterior.Full({"weight": weight}, oracle.hessian(weight), num_data=200)
    loader = [(x[:77], y[:77]), (x[77:], y[77:])]
    return oracle, model, posterior, loader


@pytest.mark.parametrize(
    ("prior_precision", "train", "exact", "joint", "refined"),
    [(1.0, 0.351, 3.586, 0.606, 1.944), (60.0, 0.550, 1.497, 0.890, 1.415)],
)
def test_a_class_of_logistic_regression_is_predicted_best_by_the_refined_form(
    prior_precision, train, exact, joint, refined
):
    oracle, model, posterior, loader = three_classes(prior_precision)
    x, y, weight = oracle.x, oracle.y, model.weight.detach()
    found = [
        left_out(model, posterior, loader, y).left_out_loss[0],
        left_out(model, posterior, loader, y, refined=True).left_out_loss[0],
    ]
    assert torch.stack(found).tolist() == pytest.approx([joint, refined], abs=2e-3)
    kept = oracle.fit(y != 0, weight)
    assert float(F.cross_entropy(x[y == 0] @ kept.mT, y[y == 0])) == pytest.approx(exact, abs=2e-3)
    assert float(F.cross_entropy(x[y == 0] @ weight.mT, y[y == 0])) == pytest.approx(train, abs=2e-3)


# -- conjugate gradients that do not arrive ------------------------------------------------------------------------


def test_a_covariance_that_leaves_no_positive_precision_keeps_the_first_order():
    model = network()
    posterior = vlearn.IVON(model, lr=0.1, ess=0.5).posterior()  # variances that no data support
    loader = [(inputs(), LABELS)]
    plain, table = (left_out(model, posterior, loader, LABELS, refined=refined) for refined in (False, True))
    assert table.num_first_order == 3 and bool(table.used_first_order.all()) and not bool(table.converged.any())
    assert all(torch.equal(a, b) for a, b in zip(table.deviation, plain.deviation, strict=True))
    assert plain.num_first_order is None


def test_too_few_iterations_are_told():
    table = left_out(*arguments_of(), LABELS, refined=True, max_iterations=1, tolerance=1e-10)
    assert table.iterations.tolist() == [1, 1, 1] and not bool(table.converged.any())


# -- loaders ----------------------------------------------------------------------------------------------------------


def test_neither_batches_nor_their_order_matter():
    model, posterior, loader = arguments_of()
    plain = left_out(model, posterior, loader, LABELS)
    dataset = vlearn.IndexedDataset(TensorDataset(inputs(), LABELS))
    shuffled = left_out(model, posterior, DataLoader(dataset, batch_size=5, shuffle=True), LABELS.tolist())
    assert relative_error(shuffled.left_out_loss, plain.left_out_loss) < 1e-12
    for k in range(3):
        order = shuffled.index[k].argsort()
        assert relative_error(shuffled.deviation[k][order], plain.deviation[k]) < 1e-12


def test_members_scattered_over_batches_are_gathered_into_full_ones():
    model, posterior, _ = arguments_of()
    sizes = []
    model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    left_out(model, posterior, DataLoader(TensorDataset(inputs(), LABELS), batch_size=4), LABELS)
    # As it came from the loader: recorded, one example less, values of two, the other two and all, gradients,
    # and as it is cut.
    first_checked = [4, 3, 2, 4, 4, 3, 3]
    assert sizes == first_checked + [4] * 9  # three groups: gradients, and again with the forward-mode pass


def test_batches_of_different_lengths_are_not_gathered():
    torch.manual_seed(0)
    model = Model(lambda m, x: m.out(torch.tanh(m.embedding(x)).mean(1)), embedding=nn.Embedding(7, 4))
    model.out = nn.Linear(4, 3)
    model.double()
    posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()
    parts = [(torch.randint(7, (6, length)), LABELS[:6]) for length in (3, 5)]
    table = left_out(model, posterior, parts, [0, 1] * 6)
    truths = [per_example(model.eval(), lambda m, x=x: m(x), lambda f: rows_of(f, LABELS[:6])) for x, _ in parts]
    covariance = torch.eye(truths[0].gradients.shape[1], dtype=torch.float64) / (50 * (1 + 1e-4))
    for k in (0, 1):
        move = covariance @ sum(t.gradients[k::2].sum(0) for t in truths)
        change = torch.cat([t.jacobian[k::2] @ move for t in truths])
        assert relative_error(table.deviation[k], change) < 1e-10


def with_table(m, x, table):
    return m.out(m.into(x + table).tanh().mean(1))


def with_scores(m, x, scores):
    return m.out(((m.into(x) @ m.into(x).mT + scores).softmax(-1) @ x).tanh().mean(1))


@pytest.mark.parametrize("sizes", [(6,), (8, 6), (6, 8)])
@pytest.mark.parametrize("forward", [with_table, with_scores])
def test_an_input_that_all_examples_share_is_not_cut_where_it_is_as_long_as_the_batch(forward, sizes):
    torch.manual_seed(0)
    out = nn.Linear(4 if forward is with_table else 5, 3)
    model = Model(forward, into=nn.Linear(5, 4), out=out).double().eval()
    count = sum(sizes)
    x, y, shared = torch.randn(count, 6, 5).double(), torch.arange(count) % 3, torch.randn(6, 6).double()
    shared = shared[:, :5] if forward is with_table else shared
    loader = [((part, shared.clone()), t) for part, t in zip(x.split(sizes), y.split(sizes), strict=True)]
    posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()
    truth = per_example(model, lambda m: m(x, shared), lambda f: rows_of(f, y))
    covariance = torch.eye(truth.gradients.shape[1], dtype=torch.float64) / (50 * (1 + 1e-4))
    for groups in ({i: [i] for i in range(count)}, {"three": [0, 3, 5], "all": list(range(count))}):
        table = left_out(model, posterior, loader, groups)
        for k, rows in enumerate(table.index):
            assert relative_error(table.deviation[k], dense_change(truth, covariance, rows, False)) < 1e-9
            assert relative_error(table.loss[k], truth.loss[rows].mean()) < 1e-12


def test_a_target_that_all_examples_share_is_refused_where_it_is_as_long_as_the_batch():
    model, y = network(), torch.tensor([0, 1, 2])

    def loss(output, target):
        labels, weights = target
        return weights[labels] * rows_of(output, labels)

    posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()
    loader = [(inputs()[:3], (y, torch.tensor([0.5, 1.0, 2.0]).double()))]
    with pytest.raises(RuntimeError, match="keep it in a buffer of the model or in the loss|depends on the other"):
        left_out(model, posterior, loader, [0, 1, 1], loss)


def rows_of(output, target):
    return F.cross_entropy(output, target, reduction="none")


def test_a_draw_that_waits_for_its_step_does_not_matter():
    model = network()
    optimizer = vlearn.IVON(model, lr=0.1, ess=50)
    plain = left_out(model, optimizer.posterior(), [(inputs(), LABELS)], LABELS, refined=True)
    F.cross_entropy(model(inputs()), LABELS).backward()
    drawn = [p.detach().clone() for p in model.parameters()]
    again = left_out(model, optimizer.posterior(), [(inputs(), LABELS)], LABELS, refined=True)
    assert torch.equal(again.left_out_loss, plain.left_out_loss)
    assert all(torch.equal(p, d) for p, d in zip(model.parameters(), drawn, strict=True))
    assert bool(optimizer.sensitivities().self_influence.isfinite().all())


def test_the_model_is_left_as_it_was():
    model, posterior, loader = arguments_of(network(nn.Dropout(0.5)).train())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    left_out(model, posterior, loader, LABELS, refined=True)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 2}, "threshold=2, but it must be in (0, 1]: use .95."),
        ({"tolerance": 0}, "tolerance=0, but it must be in (0, 1): use 1e-4."),
        ({"max_iterations": 0}, "max_iterations=0, but it must be positive: use 100."),
        ({"groups": {}}, "groups is empty"),
        ({"groups": {"a": []}}, "group 'a' has no example: leave it out."),
        ({"groups": {"a": [1, 1]}}, "group 'a' has an example twice: name each once."),
        ({"groups": [0.5] * 12}, "groups has 0.5 of type float, but it must name the group of each example by a whole"),
        ({"groups": [0] * 11}, "the loader gave example 11, but groups has 11 entries"),
        ({"groups": {"a": [3, 12]}}, "group 'a' has 2 examples, but a pass through the loader gave 1 of them"),
    ],
)
def test_an_argument_that_breaks_its_rule_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        left_out(*arguments_of(), **{"groups": LABELS, **arguments})
    assert message in str(error.value)


def test_a_loader_that_can_be_iterated_once_is_refused():
    model, posterior, loader = arguments_of()
    with pytest.raises(ValueError, match="a pass through the loader gave 0 of them"):
        left_out(model, posterior, iter(loader), LABELS)


@pytest.mark.parametrize("arguments", [{}, {"refined": True}, {"refine": 3}])
def test_examples_that_change_between_passes_are_refused(arguments):
    model, posterior, _ = arguments_of()
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"\(example \d+ had the loss .*: turn shuffling and random augmentation off"):
        left_out(model, posterior, DataLoader(Noisy(), batch_size=4), {0: [0], 1: [3, 7]}, **arguments)


def test_a_curvature_of_other_examples_in_each_pass_is_refused():
    """The group's own are in all of them."""
    model, posterior, _ = arguments_of()

    class Dropping:
        passes = 0

        def __iter__(self):
            self.passes += 1
            given = torch.arange(12)[torch.arange(12) != 1 + self.passes % 11]
            yield inputs()[given], LABELS[given], given

    with pytest.raises(ValueError, match=r"\(1 of 11 were missing\): use one that gives every example each time"):
        left_out(model, posterior, Dropping(), {0: [0]}, refine=3)


def test_batch_statistics_are_refused():
    with pytest.raises(RuntimeError, match="BatchNorm1d"):
        left_out(*arguments_of(network(nn.BatchNorm1d(8, track_running_stats=False))), LABELS)
