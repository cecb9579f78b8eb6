"""Which example each row is of: as the index says, or by chance as many; a wrong index is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.graphs import CLASSES, NETWORKS, Network, graphs, passed, pooled, summed
from tests.oracles.per_example import relative_error
from tests.sensitivity.test_exactness import covariance_of
from tests.sensitivity.test_example_index import check_live, loss_of, truth_at, watched


def rows(model, g, index="batch", **asked):
    optimizer = watched(model, index)
    loss_of(model, g).backward()
    return optimizer.sensitivities(**asked)


def sweep(model, g, index="batch", target=None):
    posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()
    given = [(g.inputs, g.y if target is None else target)]
    return vlearn.sweep(model, posterior, given, F.cross_entropy, progress=False, example_index=index)


def network(function, **parts):
    torch.manual_seed(0)
    return Network(function, **parts).double()


# -- as many by chance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 0, 1, 1), (0, 3, 0, 1), (3,), (1,)])
@pytest.mark.parametrize("name", NETWORKS)
def test_graphs_may_be_as_many_as_nodes(name, sizes):
    model, g = NETWORKS[name](), graphs(sizes)
    optimizer = watched(model)
    for _ in range(2):
        check_live(optimizer, model, g)
        optimizer.zero_grad()


def ring(nodes, seed=0):
    """Two rings: as many edges as nodes."""
    g = graphs((nodes, nodes), seed=seed)
    starts = torch.cat([(g.batch == n).nonzero().squeeze(1) for n in (0, 1)])
    ends = torch.cat([(g.batch == n).nonzero().squeeze(1).roll(1) for n in (0, 1)])
    g.edges = torch.stack([starts, ends])
    g.features = torch.randn(2 * nodes, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return g


@pytest.mark.parametrize(
    "index", ["batch", lambda **i: (i["batch"], i["batch"][i["edges"][0]])], ids=["nodes", "edges"]
)
@pytest.mark.parametrize("name", ["layers_of_edges", "convolutions_with_parameters_of_their_own"])
def test_edges_may_be_as_many_as_nodes(name, index):
    model = NETWORKS[name]()
    optimizer = watched(model, index)
    for nodes in (3, 4, 3):
        check_live(optimizer, model, ring(nodes, nodes))
        optimizer.zero_grad()
    check_live(optimizer, model, graphs())


def test_a_table_that_is_as_long_by_chance_is_refused_at_first():
    model = network(
        lambda m, g: m.out(pooled(torch.tanh(m.first(g.x)) + m.kinds(m.table)[g.kinds], g)),
        first=nn.Linear(3, 4),
        kinds=nn.Linear(2, 4),
        out=nn.Linear(4, CLASSES),
    )
    model.register_buffer("table", torch.randn(4, 2).double())
    with pytest.raises(RuntimeError, match="use another batch size if it is a table that is as long by chance"):
        rows(model, graphs())
    check_live(watched(model), model, graphs((4, 1, 3)))


def test_a_layer_without_gradient_is_looked_at_again():
    """Nothing is learned from a last layer of zeros about those before it."""
    g, model = graphs((2, 0, 1, 1)), NETWORKS["two_layers_of_message_passing"]()
    model.out.requires_grad_(False).weight.zero_()
    optimizer = watched(model, lambda **inputs: inputs["batch"].roll(1))
    loss_of(model, g).backward()
    assert not optimizer.sensitivities().self_influence.any()
    model.out.weight.fill_diagonal_(1.0)
    optimizer.zero_grad()
    loss_of(model, g).backward()
    with pytest.raises(RuntimeError, match="rows go into other rows"):
        optimizer.sensitivities()


# -- refused ----------------------------------------------------------------------------------------------------------

WRONG = {
    "one node of another graph": lambda batch: torch.where(torch.arange(len(batch)) == 1, (batch + 1) % 4, batch),
    "graphs in another order": lambda batch: 3 - batch,
    "nodes in another order": lambda batch: batch.flip(0),
    "in order, as the nodes are not": lambda batch: batch.sort().values,
    "all of one": lambda batch: torch.full_like(batch, 3),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", ["two_layers_of_message_passing", "layers_of_nodes_alone", "pooling_by_attention"])
def test_a_wrong_index_is_refused(name, how):
    model, g = NETWORKS[name](), graphs((4, 1, 3, 5))

    def index(**inputs):
        return WRONG[how](inputs["batch"])

    with pytest.raises(RuntimeError, match="rows go into other rows of the model's output than example_index says"):
        rows(model, g, index)
    with pytest.raises(RuntimeError, match="rows go into other rows of the model's output than example_index says"):
        sweep(NETWORKS[name](), g, index)
    model = NETWORKS[name]()
    optimizer = vlearn.VOGN(model, lr=0.1, ess=50)
    optimizer.watch(model, example_index=index)
    loss_of(model, g).backward()
    with pytest.raises(RuntimeError, match="rows go into other rows of the model's output than example_index says"):
        optimizer.step()


def test_a_wrong_index_is_refused_after_a_right_one():
    model, g = NETWORKS["two_layers_of_message_passing"](), graphs((4, 1, 3, 5))
    for _ in range(2):
        rows(model, g)
        sweep(model, g)
    with pytest.raises(RuntimeError, match="rows go into other rows"):
        rows(model, g, lambda **inputs: inputs["batch"].roll(1))
    with pytest.raises(RuntimeError, match="rows go into other rows"):
        sweep(model, g, lambda **inputs: inputs["batch"].roll(1))


def test_of_many_graphs_one_node_of_another_is_seen():
    g = graphs([2] * 600)
    model = network(lambda m, g: m.out(pooled(torch.tanh(m.first(g.x)), g)), first=nn.Linear(3, 2), out=nn.Linear(2, 3))
    assert len(rows(model, g).self_influence) == 600
    wrong = g.batch.clone()
    wrong[700] = (wrong[700] + 512) % 600
    with pytest.raises(RuntimeError, match="rows go into other rows"):
        rows(model, g, lambda **inputs: wrong)


class CentredByTheBatch(nn.Module):
    def __init__(self, with_gradient):
        super().__init__()
        self.with_gradient = with_gradient

    def forward(self, h):
        return h - (h if self.with_gradient else h.detach()).mean(0)


SEE_ONE_ANOTHER = {
    "in the gradient": lambda m, g: m.out(pooled(m.centre(m.first(g.x)), g)),
    "in the values": lambda m, g: m.out(pooled(m.detached(m.first(g.x)), g)),
    "in the inputs": lambda m, g: m.out(pooled(m.first(m.centre(g.x)), g)),
    "in the inputs' values": lambda m, g: m.out(pooled(m.first(m.detached(g.x)), g)),
    "between layers": lambda m, g: m.out(pooled(m.second(m.centre(torch.tanh(m.first(g.x)))), g)),
    "between graphs": lambda m, g: m.out(m.centre(torch.tanh(pooled(m.first(g.x), g)))),
    "by an edge": lambda m, g: m.out(
        pooled(m.second(torch.tanh(m.first(g.x)) + torch.tanh(m.first(g.x)).roll(1, 0)), g)
    ),
}


@pytest.mark.parametrize("how", SEE_ONE_ANOTHER)
def test_graphs_that_see_one_another_are_refused(how):
    parts = {"first": nn.Linear(3, 4), "second": nn.Linear(4, 4), "out": nn.Linear(4, CLASSES)}
    model = network(SEE_ONE_ANOTHER[how], **parts, centre=CentredByTheBatch(True), detached=CentredByTheBatch(False))
    for find in (rows, sweep):
        with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
            find(model, graphs((4, 1, 3, 5)))


def test_statistics_of_the_batch_are_refused_in_training_and_fixed_in_eval_mode():
    def model():
        return network(
            lambda m, g: m.out(pooled(m.norm(m.first(passed(g.x, g))), g)),
            first=nn.Linear(3, 4),
            norm=nn.BatchNorm1d(4),
            out=nn.Linear(4, CLASSES),
        )

    with pytest.raises(RuntimeError, match="BatchNorm1d.*in train mode"):
        rows(model(), graphs())
    assert sweep(model(), graphs()).self_influence.isfinite().all()


REFUSED = {
    "floating": (lambda **i: i["batch"].double(), r"gives shape \(13,\) and torch.float64, but it must give whole"),
    "two dimensions": (lambda **i: i["edges"], "it must give whole numbers"),
    "no tensor": (lambda **i: i["size"], "gives int, but it must give whole numbers"),
    "nothing": (lambda **i: [], "gives list, but"),
    "negative": (lambda **i: i["batch"] - 1, "negative number: let it number the examples from 0"),
    "a name that is none": ("graph", "is called without an argument 'graph'"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_no_index_is_refused(how):
    index, message = REFUSED[how]
    g = graphs((4, 1, 3, 5))
    with pytest.raises(RuntimeError, match=message):
        rows(NETWORKS["layers_of_nodes_alone"](), g, index)
    with pytest.raises(ValueError, match=message):
        sweep(NETWORKS["layers_of_nodes_alone"](), g, index)


def test_an_index_that_is_given_itself_is_refused_at_once():
    model, g = NETWORKS["layers_of_nodes_alone"](), graphs()
    with pytest.raises(ValueError, match="example_index is a Tensor, but each batch has its own"):
        watched(model, g.batch)
    with pytest.raises(ValueError, match="example_index is a Tensor, but each batch has its own"):
        sweep(model, g, g.batch)


def test_an_index_has_as_many_examples_as_the_output_and_the_targets():
    model, g = NETWORKS["layers_of_nodes_alone"](), graphs((4, 1, 3, 5))
    with pytest.raises(RuntimeError, match=r"output of shape \(4, 3\), but example_index names 5 examples"):
        rows(model, g, lambda **i: i["batch"] + 1)
    with pytest.raises(ValueError, match="names example 4, but the batch has 4 targets"):
        sweep(model, g, lambda **i: i["batch"] + 1)
    with pytest.raises(ValueError, match="gave 13 targets, one for each row"):
        sweep(model, g, target=torch.arange(13) % 3)
    last_is_empty = graphs((4, 1, 0))
    with pytest.raises(RuntimeError, match=r"output of shape \(3, 3\), but example_index names 2 examples"):
        rows(model, last_is_empty)
    assert len(sweep(model, last_is_empty)) == 3  # as there are targets


def test_without_an_index_the_refusal_names_it():
    for name in ("two_layers_of_message_passing", "layers_of_nodes_alone"):
        for find in (rows, sweep):
            with pytest.raises(RuntimeError, match="pass example_index= to"):
                find(NETWORKS[name](), graphs((4, 1, 3, 5)), None)
        model, g = NETWORKS[name](), graphs((4, 1, 3, 5))
        optimizer = vlearn.VOGN(model, lr=0.1, ess=50)
        loss_of(model, g).backward()
        with pytest.raises(RuntimeError, match="pass example_index= to"):
            optimizer.step()


def test_a_loss_alone_does_not_show_the_examples():
    g = graphs()
    model = network(
        lambda m, given: F.cross_entropy(pooled(m.out(torch.tanh(m.first(given.x))), given), g.y),
        first=nn.Linear(3, 4),
        out=nn.Linear(4, CLASSES),
    )
    optimizer = watched(model)
    model(**g.inputs).backward()
    with pytest.raises(RuntimeError, match="no output with a row for each example"):
        optimizer.sensitivities()


# -- what else a pass may be ------------------------------------------------------------------------------------------


def test_dropout_repeats_its_masks():
    model, g = (
        network(
            lambda m, g: m.out(pooled(m.drop(torch.tanh(m.first(passed(g.x, g)))), g)),
            first=nn.Linear(3, 8),
            drop=nn.Dropout(0.4),
            out=nn.Linear(8, CLASSES),
        ),
        graphs((4, 1, 3, 5)),
    )
    optimizer = watched(model)
    torch.manual_seed(3)
    loss_of(model, g).backward()
    s = optimizer.sensitivities(deviation=True)
    variance = optimizer.posterior().variance
    torch.manual_seed(3)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer.unwatch()
    losses = F.cross_entropy(torch.func.functional_call(model, weights, (), g.inputs), g.y, reduction="none")
    gradients = [torch.autograd.grad(loss, list(weights.values()), retain_graph=True) for loss in losses]
    truth = [sum((variance[n] * v.square()).sum() for n, v in zip(weights, row, strict=True)) for row in gradients]
    assert relative_error(s.self_influence, torch.stack(truth)) < 1e-10
    assert s.deviation.isfinite().all()


class Once(torch.autograd.Function):
    """tanh without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


@pytest.mark.parametrize("name", ["plain", "convolution"])
def test_an_operation_without_forward_derivative_is_served_in_reverse(name):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, h, edges):
            return Once.apply(h + summed(h[edges[0]], edges[1], len(h)) @ self.weight.T @ self.weight)

    if name == "plain":
        model = network(
            lambda m, g: m.out(pooled(Once.apply(m.first(passed(g.x, g))), g)),
            first=nn.Linear(3, 4),
            out=nn.Linear(4, CLASSES),
        )
    else:
        model = network(lambda m, g: m.out(pooled(m.first(g.x, g.edges), g)), first=Layer(), out=nn.Linear(3, CLASSES))
    check_live(watched(model), model, graphs())


class OfObjects(nn.Module):
    """A model that takes a batch whole, as torch_geometric's models take their Data."""

    def __init__(self):
        super().__init__()
        self.inner = NETWORKS["convolutions_with_parameters_of_their_own"]()

    def forward(self, g):
        return self.inner(**g.inputs)


def test_a_model_may_take_all_of_a_batch_in_one_object():
    model, g = OfObjects(), graphs()
    optimizer = watched(model, lambda g: g.batch)
    F.cross_entropy(model(g), g.y).backward()
    s, covariance = optimizer.sensitivities(deviation=True), covariance_of(optimizer, model)
    truth = truth_at(model.inner, g)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10
    table = vlearn.sweep(
        model, optimizer.posterior(), [(g, g.y)], F.cross_entropy, progress=False, example_index=lambda g: g.batch
    )
    assert len(table) == 4


def test_a_rule_whose_output_rows_overlap_is_refused():
    model = network(
        lambda m, g: m.out(pooled(m.transposed(m.first(g.x).unsqueeze(1)).flatten(1), g)),
        first=nn.Linear(3, 4),
        transposed=nn.ConvTranspose1d(1, 2, 3),
        out=nn.Linear(12, CLASSES),
    )
    with pytest.raises(RuntimeError, match="ConvTransposeWeightGradient cannot be summed over the rows of an example"):
        rows(model, graphs())
