"""What a recorded pass holds: which call explains which parameter, and nothing afterwards."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import CASES, Case, Model
from tests.oracles.per_example import flat, moving, per_example, relative_error
from vlearn.capture.hooks import hooks_are_silent, hooks_paused, module_paths, record
from vlearn.capture.pytrees import tensor_leaves
from vlearn.capture.trace import is_close


def recorded(case):
    """The trace of one pass of a case's model."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    with record(case.model.eval(), parameters) as trace:
        output = case.call(case.model)
    return trace, output


# -- which call explains which parameter ------------------------------------------------------------------------------


def places(case):
    """{parameter's name: [(path of a call, has a rule)]}"""
    trace, _ = recorded(case)
    assert not trace.problems
    return {
        name: [(call.path, call.rule is not None) for call in trace.layer_calls if any(p is q for q in call.parameters)]
        for name, p in case.model.named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"0.weight": [("0", True)], "4.bias": [("4", True)]}),
        ("linear_used_twice", {"fc.weight": [("fc", True)] * 2}),
        ("weight_shared_by_two_layers", {"0.weight": [("0", True), ("2", True)], "2.bias": [("2", True)]}),
        ("embedding_tied_with_the_output_layer", {"embedding.weight": [("embedding", True), ("out", True)]}),
        ("subclass_of_linear_with_another_forward", {"0.weight": [("0", False)]}),
        ("pruned_weight", {"0.weight_orig": [("0", False)], "2.weight": [("2", True)]}),
        ("layer_called_with_a_keyword", {"fc.weight": [("fc", False)], "out.weight": [("out", True)]}),
        ("attention", {"attention.in_proj_weight": [("attention", False)], "into.weight": [("into", True)]}),
        ("attention", {"attention.out_proj.weight": [("attention", False)]}),
        ("gated_recurrent_network", {"gru.weight_hh_l0": [("gru", False)], "out.weight": [("out", True)]}),
        ("rows_flattened_inside_a_block", {"2.fc.weight": [("2", False)], "0.weight": [("0", True)]}),
        ("rows_flattened_around_a_linear_layer", {"fc.weight": [("Model", False)], "out.weight": [("out", True)]}),
        ("one_layer_used_both_flattened_and_not", {"fc.weight": [("Model", False)], "out.weight": [("out", True)]}),
        ("parameter_of_a_block_tied_to_a_layer_inside_it", {"1.weight": [("1", False)], "0.weight": [("0", True)]}),
        ("layer_that_is_not_called_tied_to_one_that_is", {"1.silent.weight": [("1", False)]}),
        ("weight_used_only_outside_its_module", {"fc.weight": [("Model", False)], "out.weight": [("out", True)]}),
        ("weight_used_by_its_module_and_outside_it", {"fc.weight": [("Model", False)], "fc.bias": [("fc", True)]}),
        ("bias_used_by_its_module_and_outside_it", {"fc.weight": [("fc", True)], "fc.bias": [("Model", False)]}),
        ("weight_used_outside_its_module_inside_a_block", {"1.fc.weight": [("Sequential", False)]}),
        ("intermediate_value_left_in_an_attribute", {"block.gain": [("Model", False)], "fc.weight": [("fc", True)]}),
        ("weight_handed_to_a_block", {"block.fc.weight": [("Model", False)], "block.gain": [("block", False)]}),
        ("layer_that_is_never_used", {"1.spare.weight": []}),
        ("parameters_in_a_dict", {"2.own.a": [("2", False)], "0.weight": [("0", True)]}),
        ("parameters_in_lists_within_a_dict", {"2.own.a.0": [("2", False)], "2.own.b.0": [("2", False)]}),
        ("weight_of_a_child_that_is_not_called", {"2.fc.weight": [("2", False)]}),
        (
            "parameters_in_a_dict_beside_a_layer_that_is_called",
            {"2.own.b": [("2", False)], "2.fc.weight": [("2.fc", True)]},
        ),
        ("parameters_in_a_dict_of_a_block_that_is_called_twice", {"2.block.own.a": [("2.block", False)] * 2}),
        ("parameters_in_a_dict_used_outside_their_block", {"block.own.a": [("Model", False)]}),
        ("parameters_in_a_dict_where_rows_are_folded", {"1.block.own.a": [("1", False)]}),
        ("recurrence_with_positions_first", {"rnn.weight_ih_l0": [("rnn", False)]}),
        ("state_that_a_block_returns", {"encoder.gain": [("encoder", False)]}),
        ("linear_whose_first_use_is_under_no_grad", {"fc.weight": [("fc", True)]}),
    ],
)
def test_a_parameter_belongs_to_the_smallest_call_that_explains_all_of_it(name, expected):
    found = places(CASES[name]())
    assert {key: found[key] for key in expected} == expected


def test_calls_of_a_module_are_numbered_those_without_gradient_too():
    trace, _ = recorded(CASES["linear_whose_first_use_is_under_no_grad"]())
    assert [(call.path, call.number) for call in trace.layer_calls] == [("fc", 1), ("out", 0)]


def test_a_cached_cast_of_the_weight_that_is_used_elsewhere_is_seen():
    """Autocast casts the weight once, so both uses meet in the cast and not in the weight."""
    model = Model(lambda m, x: F.linear(torch.tanh(m.fc(x)), m.fc.weight), fc=nn.Linear(4, 4))
    with torch.autocast("cpu", torch.bfloat16), record(model, model.parameters()) as trace:
        model(torch.randn(2, 4))
    assert [(call.path, len(call.parameters)) for call in trace.layer_calls] == [("fc", 1), ("Model", 1)]
    assert trace.layer_calls[1].parameters[0] is model.fc.weight


def test_a_parameter_of_no_submodule_is_a_problem():
    hidden = [nn.Linear(4, 4)]
    model = Model(lambda m, x: m.fc(hidden[0](x)), fc=nn.Linear(4, 4))
    with record(model, [*model.parameters(), *hidden[0].parameters()]) as trace:
        model(torch.randn(2, 4))
    assert "uses a parameter of shape (4, 4) that belongs to none of its modules" in trace.problems[0]


def test_a_module_that_is_called_elsewhere_is_not_adopted():
    """A container that this call skips; what it calls at another time explains the parameters already."""
    model = Model(lambda m, x: m.block(m.block(x, 0), 1), block=Model(lambda m, x, k: x.tanh() if k else m.fc(x)))
    model.block.fc = nn.Linear(4, 4)
    with record(model, model.parameters()) as trace:
        model(torch.randn(2, 4))
    assert [(call.path, len(call.parameters)) for call in trace.layer_calls] == [("block.fc", 2)]


def test_outputs_without_an_example_axis_are_a_problem():
    model = Model(lambda m, x: m.fc(x.reshape(-1, 4)), fc=nn.Linear(4, 4))
    with record(model, model.parameters()) as trace:
        model(torch.randn(2, 3, 4))
    assert trace.problems == [
        "Model (Model): its inputs or outputs have no example axis of size 2 as dimension 0, so per-example gradients "
        "are not defined."
    ]


def test_a_call_without_tensors_is_a_problem():
    class Graph:
        def __init__(self, x):
            self.x = x

    model = Model(lambda m, graph: m.fc(graph.x), fc=nn.Linear(4, 4))
    with record(model, model.parameters()) as trace:
        model(Graph(torch.randn(2, 4)))
    assert trace.problems == [
        "Model (Model): it was called with no tensors, nor tuples or dicts of them, but with Graph, so per-example "
        "gradients are not defined." + trace.hint_at_index()
    ]
    assert "pass example_index=" in trace.hint_at_index()


class Tying(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(5, 5), nn.Linear(5, 3)
        self.tied = False

    def forward(self, x):
        h = torch.tanh(self.fc(x))
        return self.out(F.linear(h, self.fc.weight) if self.tied else h)


@pytest.mark.parametrize("how", ["live", "sweep"])
def test_a_weight_that_comes_to_be_used_elsewhere_during_training_is_seen(how):
    """The calls are the same as before: only the graph tells."""
    torch.manual_seed(0)
    model, x, y = Tying().double(), torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    optimizer = vlearn.IVON(model, lr=0.1, ess=10)
    for tied in (False, True):
        model.tied = tied
        if how == "live":
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            s = optimizer.sensitivities(deviation=True)
        else:
            s = vlearn.sweep(model, optimizer.posterior(), [(x, y)], F.cross_entropy, leverage=None, progress=False)
        twin = Tying().double()
        twin.tied = tied
        with torch.no_grad():
            for theirs, p in zip(twin.parameters(), model.parameters(), strict=True):
                theirs.copy_(p)
        truth = per_example(twin, lambda m: m(x), lambda f: F.cross_entropy(f, y, reduction="none"))
        covariance = torch.diag(flat({name: optimizer.posterior().variance[name] for name in moving(twin)}))
        assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
        assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


# -- cotangents -------------------------------------------------------------------------------------------------------


def test_backward_fills_the_gradients_of_the_outputs_and_none_of_the_weights():
    case = CASES["mlp"]()
    trace, output = recorded(case)
    cotangent = torch.randn_like(output)
    trace = trace.pulled_back([output], [cotangent], retain_graph=True)
    assert all(p.grad is None for p in case.model.parameters())
    assert torch.equal(trace.layer_calls[-1].cotangents[0], cotangent)
    for call, p in zip(trace.layer_calls, (case.model[0].bias, case.model[2].bias, case.model[4].bias), strict=True):
        truth = torch.autograd.grad(output, p, cotangent, retain_graph=True)[0]
        assert torch.allclose(call.cotangents[0].sum(0), truth, rtol=1e-13)


def test_a_use_that_the_gradient_does_not_reach_is_left_out():
    model = Model(lambda m, x: (m.left(x), m.right(x)), left=nn.Linear(3, 2), right=nn.Linear(3, 2))
    with record(model, model.parameters()) as trace:
        left, _ = model(torch.randn(4, 3))
    trace = trace.pulled_back([left], [torch.ones_like(left)])
    assert list(trace.calls_by_parameter()) == [model.left.weight, model.left.bias]


# -- hooks ----------------------------------------------------------------------------------------------------------


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_the_hooks_are_gone_after_any_exit(error):
    case = CASES["transformer_layer"]()
    try:
        with record(case.model, case.model.parameters()):
            assert hooks_of(case.model) > 0
            case.call(case.model)
            if error is not None:
                raise error
    except BaseException as caught:
        assert type(caught) is error
    assert hooks_of(case.model) == 0


def test_nothing_is_recorded_while_hooks_are_paused():
    case = CASES["mlp"]()
    with record(case.model, case.model.parameters()) as trace, hooks_paused():
        assert hooks_are_silent()
        case.call(case.model)
    assert not hooks_are_silent()
    assert trace.layer_calls == [] and trace.root is None


def test_a_call_that_raised_inside_the_model_leaves_no_frame():
    def forward(m, x):
        try:
            m.bad(x)
        except ZeroDivisionError:
            pass
        return m.fc(x)

    bad = Model(lambda m, x: m.inner(x) / 0 if m.training else 1 // 0, inner=nn.Linear(4, 4))
    model = Model(forward, fc=nn.Linear(4, 4), bad=bad).eval()
    case = Case(model, torch.randn(2, 4), torch.zeros(2, dtype=torch.long))
    assert places(case)["fc.weight"] == [("fc", True)]


@pytest.mark.parametrize("used", ["live", "sweep"])
def test_nothing_keeps_a_model_alive(used):
    case = CASES["embedding_used_by_its_module_and_outside_it"]()
    optimizer = vlearn.IVON(case.model, lr=0.1, ess=10)
    if used == "live":
        case.loss(case.call(case.model), case.target).backward()
        optimizer.sensitivities(deviation=True)
        optimizer.step()
    else:
        vlearn.sweep(case.model, optimizer.posterior(), [(case.x, case.target)], case.loss, progress=False)
    gone = [weakref.ref(case.model), weakref.ref(optimizer), weakref.ref(next(case.model.parameters()))]
    del case, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]


# -- repeated values --------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("replayed", "recorded", "close"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.00001], [1.0, 2.0], True),
        ([1.0, 2.001], [1.0, 2.0], False),
        ([1e-9, 2.0], [0.0, 2.0], True),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([1e-9, 0.0], [0.0, 0.0], False),
        ([-INF, 2.0], [-INF, 2.0], True),
        ([-INF, 2.1], [-INF, 2.0], False),
        ([1.0, 2.0], [-INF, 2.0], False),
        ([INF, 2.0], [-INF, 2.0], False),
        ([NAN, 2.0], [NAN, 2.0], True),
        ([NAN, 2.0], [1.0, 2.0], False),
        ([1.0, 2.0], [NAN, 2.0], False),
        ([1.0, 2.0, 3.0], [1.0, 2.0], False),
        ([], [], True),
    ],
)
def test_values_repeat_up_to_rounding(replayed, recorded, close):
    assert is_close(torch.tensor(replayed), torch.tensor(recorded), 1e-4) is close


# -- names and leaves -------------------------------------------------------------------------------------------------


def test_modules_are_called_by_their_path_and_the_model_by_its_class():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
    assert list(module_paths(model).values()) == ["Sequential", "0", "1", "1.0"]


def test_leaves_are_those_of_any_nesting():
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    for tree, leaves in (
        (a, [a]),
        ((a, [b, {"c": c}]), [a, b, c]),
        (((), {}), []),
        (((a,), {"x": b, "flag": True}), [a, b]),
        ({"b": b, "none": None, "list": [a, "text", 3]}, [b, a]),
        (None, []),
        (3.0, []),
    ):
        found = tensor_leaves(tree)
        assert len(found) == len(leaves) and all(x is y for x, y in zip(found, leaves, strict=True))
