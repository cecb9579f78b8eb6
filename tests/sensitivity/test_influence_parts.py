"""Influence that is split over modules and tokens, and that of layers whose gradients are held by their factors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.layers.test_gradient_forms import largest_result
from tests.oracles.networks import CASES
from tests.oracles.per_example import moving, per_example, relative_error
from tests.posterior.structures import STRUCTURES, posterior_of
from tests.sensitivity.test_influence import LABELS, arguments_of, influence_of, inputs, network
from tests.sensitivity.test_sequences import T, language_model, rows_by_token, token_truth, tokens
from vlearn.gaussians.covariance_blocks import KroneckerBlock
from vlearn.linearized import inner_products
from vlearn.linearized.inner_products import RankOne, Terms

# -- by modules -------------------------------------------------------------------------------------------------------


def truth_by(model, covariance, names):
    """Explicit influence through the parameters of these names alone."""
    gradients = [
        per_example(model.eval(), lambda m, x=x: m(x), lambda f, y=y: F.cross_entropy(f, y, reduction="none")).gradients
        for x, y in ((inputs(), LABELS), (inputs(7, 6), LABELS[:7]))
    ]
    mask = torch.cat([torch.full((p.numel(),), float(n in names)) for n, p in moving(model).items()]).double()
    return (gradients[0] * mask) @ covariance @ gradients[1].mT


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "mixed"])
def test_modules_add_up_to_the_whole_and_each_is_its_own(structure, chunk):
    model, _, train, test = arguments_of(network(nn.LayerNorm(8)))
    posterior, covariance = posterior_of(moving(model), structure)
    whole = influence_of(model, posterior, train, test, chunk=chunk)
    split = influence_of(model, posterior, train, test, chunk=chunk, by="module")
    assert list(split.parts) == ["0", "2", "3"] and whole.parts is None
    assert relative_error(split.values, whole.values) < 1e-12
    assert relative_error(torch.stack(list(split.parts.values())).sum(0), whole.values) < 1e-12
    for module, part in split.parts.items():
        assert relative_error(part, truth_by(model, covariance, [f"{module}.weight", f"{module}.bias"])) < 1e-10


def test_any_groups_of_parameters_may_be_named():
    model, _, train, test = arguments_of()
    posterior, covariance = posterior_of(moving(model), "separate")
    split = influence_of(model, posterior, train, test, by=lambda name: name.endswith("bias"))
    assert relative_error(split.parts[True], truth_by(model, covariance, ["0.bias", "2.bias"])) < 1e-10


def test_the_parts_of_the_largest_are_theirs():
    model, posterior, train, test = arguments_of()
    whole = influence_of(model, posterior, train, test, by="module")
    best = influence_of(model, posterior, train, test, by="module", top_k=3, chunk=2)
    for module, part in best.parts.items():
        assert relative_error(part, whole.parts[module].gather(0, best.train_index)) < 1e-12
    assert relative_error(torch.stack(list(best.parts.values())).sum(0), best.values) < 1e-12


def test_a_weight_of_several_modules_counts_for_the_first():
    case = CASES["embedding_tied_with_the_output_layer"]()
    posterior = vlearn.IVON(case.model, lr=0.1, ess=50).posterior()
    loader = [(case.x, case.target)]
    split = influence_of(case.model, posterior, loader, loader, case.loss, by="module")
    assert list(split.parts) == list(dict.fromkeys(name.rpartition(".")[0] for name in moving(case.model)))
    assert relative_error(torch.stack(list(split.parts.values())).sum(0), split.values) < 1e-12


def test_frozen_modules_have_no_part():
    model, _, train, test = arguments_of(network(nn.LayerNorm(8)))
    posterior, _ = posterior_of(moving(model), "layers")
    model[2].requires_grad_(False)
    split = influence_of(model, posterior, train, test, by="module")
    assert list(split.parts) == ["0", "3"]
    assert relative_error(split.parts["0"] + split.parts["3"], split.values) < 1e-12


def test_a_posterior_that_correlates_modules_has_no_parts():
    model, _, train, test = arguments_of()
    posterior = vlearn.posterior.fit(model, train, F.cross_entropy, "full", progress=False)
    with pytest.raises(ValueError, match=r"correlates '0.weight' with '2.weight', which `by` puts into two groups"):
        influence_of(model, posterior, train, test, by="module")
    whole = influence_of(model, posterior, train, test)
    one = influence_of(model, posterior, train, test, by=lambda name: "all")
    assert relative_error(one.parts["all"], whole.values) < 1e-12


# -- by tokens --------------------------------------------------------------------------------------------------------


def sequences(**arguments):
    model = language_model()
    posterior = vlearn.IVON(model, lr=0.1, ess=30).posterior()
    x, y = tokens()
    test = tokens(masked=False)
    arguments = {"loss_fn": rows_by_token, **arguments}
    loss_fn = arguments.pop("loss_fn")
    return influence_of(model, posterior, [(x[:3], y[:3]), (x[3:], y[3:])], [test], loss_fn, **arguments)


def summed(output, target):
    return rows_by_token(output, target).sum(1)


@pytest.mark.parametrize("chunk", [None, 1])
def test_tokens_equal_explicit_gradients_of_each_tokens_loss(chunk):
    found = sequences(per="token", chunk=chunk)
    x, y = tokens()
    keep = y != -100
    assert torch.equal(torch.stack([found.train_index, found.position], 1), keep.nonzero())
    model = language_model().eval()
    test_x, test_y = tokens(masked=False)
    of_test = per_example(model, lambda m: m(test_x), lambda f: rows_by_token(f, test_y).mean(1)).gradients
    for t in range(T):
        own = token_truth(model, x, y, t).gradients @ of_test.mT / (30 * (1 + 1e-4))
        assert relative_error(found.values[found.position == t], own[keep[:, t]]) < 1e-10


def test_the_tokens_of_a_sequence_add_up_to_it():
    by_token = sequences(per="token", loss_fn=rows_by_token)
    whole = sequences(loss_fn=rows_by_token)  # averages over the T positions
    added = torch.zeros_like(whole.values).index_add_(0, by_token.train_index, by_token.values)
    assert relative_error(added / T, whole.values) < 1e-10


def test_the_largest_tokens_are_those_of_the_whole():
    whole, best = sequences(per="token"), sequences(per="token", top_k=4)
    order = whole.values.abs().argsort(0, descending=True)[:4]
    assert relative_error(best.values, whole.values.gather(0, order)) < 1e-12
    assert torch.equal(best.train_index, whole.train_index[order])
    assert torch.equal(best.position, whole.position[order])


def test_a_loss_that_sees_the_outputs_of_other_positions_has_its_tokens_too():
    def smoothed(output, target):
        return rows_by_token(output + output.roll(1, 1), target)

    x, y = tokens()
    model = language_model()
    posterior = vlearn.IVON(model, lr=0.1, ess=30).posterior()
    found = influence_of(model, posterior, [(x, y)], [(x, y)], smoothed, per="token")
    of_test = per_example(model.eval(), lambda m: m(x), lambda f: smoothed(f, y).mean(1)).gradients
    for t in range(T):
        truth = per_example(model, lambda m: m(x), lambda f, t=t: smoothed(f, y)[:, t]).gradients
        own = truth @ of_test.mT / (30 * (1 + 1e-4))
        assert relative_error(found.values[found.position == t], own[y[:, t] != -100]) < 1e-10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "sequence"}, "per='sequence', but it must be 'example' or 'token': use 'example'."),
        ({"by": "layer"}, "by='layer', but it must be 'module' or a function from a parameter's name to that of its"),
        ({"by": "module", "per": "token"}, "by with per='token': ask for one of them at a time."),
        ({"by": "module", "refine": 2}, "by with refine, whose H correlates all modules: ask for one of them"),
        ({"refine": 1.5}, "refine=1.5, but it must be a number of steps: use 20."),
        ({"per": "token", "loss_fn": summed}, "per='token' needs one for each position"),
    ],
)
def test_what_is_not_defined_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        sequences(**arguments)
    assert message in str(error.value)


# -- gradients held by their factors ----------------------------------------------------------------------------------


class Wide(nn.Module):
    """Linear layers that act at one position, or at several that are averaged, or twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(160, 120), nn.Linear(120, 3)
        self.again = False
        self.double()

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        if self.again:
            hidden = hidden + torch.tanh(self.inner(2 * x))
        return self.outer(hidden if x.dim() == 2 else hidden.mean(1))


def wide_posterior(model):
    """K-FAC, whose eigenvalues are products."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for layer in ("inner", "outer"):
        o, i = getattr(model, layer).weight.shape
        rows = [torch.randn(200, k, dtype=torch.float64, generator=generator) for k in (i + 1, o)]
        rows = [r * torch.logspace(0, -1, r.shape[1], dtype=torch.float64) for r in rows]
        factors[(f"{layer}.weight", f"{layer}.bias")] = vlearn.posterior.KroneckerFactors.from_covariances(
            *(r.mT @ r for r in rows)
        )
    mean = {name: p.detach().clone() for name, p in moving(model).items()}
    every = dict.fromkeys(mean, 1e-2)
    return vlearn.posterior.Kronecker(mean, factors, every, dict.fromkeys(mean, 50.0), 50.0)


def any_eigenvalues(model):
    """EK-FAC in the basis of the former: its eigenvalues are any."""
    kronecker = wide_posterior(model)
    factors = {
        tuple(each.pop("names")): vlearn.posterior.KroneckerFactors(
            each["out_basis"], each["in_basis"], each["hessian"] * (0.5 + torch.rand_like(each["hessian"]))
        )
        for each in kronecker.block_state()["factors"]
    }
    return vlearn.posterior.Kronecker(
        kronecker.mean, factors, kronecker.prior_precision, dict.fromkeys(kronecker.mean, 50.0), 50.0
    )


def independent(model):
    """Variances of their own for all entries."""
    mean = {name: p.detach().clone() for name, p in moving(model).items()}
    return vlearn.posterior.Diagonal.from_precision(
        mean, {name: 1 + torch.rand_like(p) for name, p in mean.items()}, 50
    )


def wide_inputs(count, positions=None):
    shape = (count, 160) if positions is None else (count, positions, 160)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("positions", [(None, None), (2, None), (None, 2), (2, 2)])
@pytest.mark.parametrize("make_posterior", [wide_posterior, any_eigenvalues, independent])
def test_every_way_to_hold_a_layer_equals_explicit_gradients(make_posterior, positions, again, monkeypatch):
    model = Wide()
    posterior = make_posterior(model)
    if make_posterior is not independent:
        blocks = [posterior.block(group) for group in dict.fromkeys(posterior.groups.values())]
        assert (Terms.of(blocks[0]) is not None) == (make_posterior is wide_posterior) and Terms.of(blocks[1]) is None
    model.again = again
    x, y = wide_inputs(9, positions[0]), torch.arange(9) % 3
    test_x, test_y = wide_inputs(5, positions[1]), torch.arange(5) % 3
    formed = []
    monkeypatch.setattr(
        inner_products,
        "dense_gradients",
        lambda recorded, calls_of, examples, of=inner_products.dense_gradients: (
            formed.append(model.inner.weight in calls_of) or of(recorded, calls_of, examples)
        ),
    )
    loaders = [(x[:5], y[:5]), (x[5:], y[5:])], [(test_x[:2], test_y[:2]), (test_x[2:], test_y[2:])]
    found = influence_of(model, posterior, *loaders)
    assert any(formed) == (again or positions != (None, None))
    of_train, of_test = (
        per_example(model.eval(), lambda m, x=x: m(x), lambda f, y=y: F.cross_entropy(f, y, reduction="none")).gradients
        for x, y in ((x, y), (test_x, test_y))
    )
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    given = of_test.split(sizes, 1)
    moved = posterior.covariance(moving(model)).multiply(
        {p: g.reshape(-1, *p.shape) for p, g in zip(parameters, given, strict=True)}
    )
    truth = of_train @ torch.cat([moved[p].flatten(1) for p in parameters], 1).mT
    assert relative_error(found.values, truth) < 1e-10


@pytest.mark.parametrize("entries", [1, 40, 2**18])
@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
@pytest.mark.parametrize("counts", [(2, 2), (2, 9), (9, 2), (9, 9), (0, 4), (4, 0)])
def test_the_full_sum_over_a_layer_is_that_of_its_entries(counts, shape, entries, monkeypatch):
    monkeypatch.setattr(inner_products, "PAIR_ENTRIES", entries)
    torch.manual_seed(0)
    block = KroneckerBlock(None, None, torch.rand(shape).double(), [torch.Size(shape)])
    one, other = (RankOne(torch.randn(n, shape[1]).double(), torch.randn(n, shape[0]).double(), block) for n in counts)
    dense = [rows.b.unsqueeze(2) * rows.a.unsqueeze(1) for rows in (one, other)]
    truth = torch.einsum("noi,oi,moi->nm", dense[0], block.variances, dense[1])
    assert torch.allclose(one.inner(other, None), truth, atol=1e-12)


@pytest.mark.parametrize("counts", [(10, 2000), (2000, 10)])
def test_the_full_sum_makes_no_more_at_once_however_many_test_examples_there_are(counts, monkeypatch):
    monkeypatch.setattr(inner_products, "PAIR_ENTRIES", 2**12)
    block = KroneckerBlock(None, None, torch.rand(30, 50), [torch.Size((30, 50))])
    one, other = (RankOne(torch.randn(n, 50), torch.randn(n, 30), block) for n in counts)
    assert largest_result(lambda: one.inner(other, None)) <= 2000 * 30  # one row of each pair's narrower side


def test_batches_that_are_held_in_different_ways_are_joined():
    model = Wide()
    posterior = wide_posterior(model)
    y = torch.arange(4) % 3
    test = [(wide_inputs(4), y), (wide_inputs(4, 2), y)]
    train = [(wide_inputs(6), torch.arange(6) % 3)]
    joined = influence_of(model, posterior, train, test)
    alone = [influence_of(model, posterior, train, [batch]).values for batch in test]
    assert relative_error(joined.values, torch.cat(alone, 1)) < 1e-12


def test_in_float32_the_terms_lose_no_more_than_rounding():
    model = Wide()
    exact = wide_posterior(model)
    single = Wide().float()
    factors = {
        layer: vlearn.posterior.KroneckerFactors(f.out_basis.float(), f.in_basis.float(), f.hessian.float())
        for layer, f in exact._factors.items()
    }
    mean = {name: p.detach().clone() for name, p in moving(single).items()}
    every = dict.fromkeys(mean, 1e-2)
    posterior = vlearn.posterior.Kronecker(mean, factors, every, dict.fromkeys(mean, 50.0), 50.0)
    assert len(Terms.of(posterior.block(("inner.weight", "inner.bias"))).out) < 20
    x, y = wide_inputs(9), torch.arange(9) % 3
    truth = influence_of(model, exact, [(x, y)], [(x, y)]).values
    found = influence_of(single, posterior, [(x.float(), y)], [(x.float(), y)]).values
    assert relative_error(found.double(), truth) < 1e-5


def test_eigenvalues_that_are_no_products_have_no_terms():
    model = Wide()
    posterior = wide_posterior(model)
    factors = posterior._factors["inner.weight", "inner.bias"]
    generator = torch.Generator().manual_seed(1)
    any_values = torch.rand(factors.hessian.shape, dtype=torch.float64, generator=generator)
    corrected = vlearn.posterior.KroneckerFactors(factors.out_basis, factors.in_basis, any_values)
    names = ("inner.weight", "inner.bias")
    mean = {name: posterior.mean[name] for name in names}
    every = dict.fromkeys(mean, 1e-2)
    block = vlearn.posterior.Kronecker(mean, {names: corrected}, every, dict.fromkeys(mean, 50.0), 50.0).block(names)
    assert Terms.of(block) is None
