"""Sequences: one row per sequence or one per token, with masks, and without ever forming Λ."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import Model
from tests.oracles.per_example import per_example, relative_error
from vlearn.losses import output_hessian

N, T, VOCABULARY = 4, 5, 7
VARIANCE = 1 / (30 * (1 + 1e-4))


def tokens(masked=True):
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(VOCABULARY, (N, T), generator=generator) for _ in "xy")
    if masked:
        y[0, 3:] = y[2, :2] = -100
    return x, y


def language_model(classes=VOCABULARY, classes_first=False):
    torch.manual_seed(0)
    model = Model(_forward, embedding=nn.Embedding(VOCABULARY, 4), fc=nn.Linear(4, 4))
    model.norm, model.out, model.classes_first = nn.LayerNorm(4), nn.Linear(4, classes), classes_first
    return model.double()


def _forward(model, x):
    logits = model.out(
        model.norm(torch.tanh(model.fc(model.embedding(x))).cumsum(1))
    )  # each position sees those before it
    return logits.mT if model.classes_first else logits


def rows_by_token(output, target):
    return F.cross_entropy(output.mT, target, reduction="none")


def swept(model, loss_fn, target_of=tokens, leverage=None, **arguments):
    posterior = vlearn.IVON(model, lr=0.1, ess=30).posterior()
    return vlearn.sweep(model, posterior, [target_of()], loss_fn, leverage, progress=False, **arguments)


def covariance_of(truth):
    return VARIANCE * torch.eye(truth.gradients.shape[1], dtype=torch.float64)


# -- a sequence is an example -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_a_masked_sequence_counts_by_the_callables_own_reduction(reduce):
    x, y = tokens()

    def loss(output, target):
        return reduce(rows_by_token(output, target), dim=1)

    truth = per_example(language_model().eval(), lambda m: m(x), lambda f: loss(f, y))
    table = swept(language_model(), loss, leverage="exact")
    covariance = covariance_of(truth)
    assert relative_error(table.loss, truth.loss) < 1e-10
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(table.deviation.flatten(1), truth.deviation(covariance)) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-10
    assert bool((table.deviation[0, 3:] != 0).any())  # a masked token's output moves with the others


def test_torchs_own_loss_averages_over_the_positions_ignored_ones_as_zeros():
    table = swept(language_model(classes_first=True), F.cross_entropy)
    other = swept(language_model(), lambda f, t: rows_by_token(f, t).sum(1) / T)
    assert relative_error(table.self_influence, other.self_influence) < 1e-12
    assert relative_error(table.deviation.mT, other.deviation) < 1e-12


@pytest.mark.parametrize("frozen", ["", "encoder.layers.0."], ids=["all", "without the first layer"])
def test_padded_sequences_in_torchs_own_encoder_equal_per_example_autograd(frozen):
    def encoder(**settings):
        def pooled(m, x, padding):
            return m.out(m.encoder(x, src_key_padding_mask=padding).masked_fill(padding.unsqueeze(2), 0).sum(1))

        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 3, 0.0, batch_first=True)
        model = Model(pooled, encoder=nn.TransformerEncoder(layer, 2, **settings), out=nn.Linear(4, 3)).double()
        for name, p in model.named_parameters():
            p.requires_grad_(not (frozen and name.startswith(frozen)))
        return model.eval()

    x = torch.randn(N, T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    padding, y = torch.arange(T) >= torch.tensor([5, 3, 2, 4]).unsqueeze(1), torch.arange(N) % 3
    truth = per_example(
        encoder(enable_nested_tensor=False),
        lambda m: m(x, padding),
        lambda f: F.cross_entropy(f, y, reduction="none"),
    )
    model, loader, precision = encoder(), [((x, padding), y)], 2 * torch.eye(truth.gradients.shape[1]).double()
    fitted = vlearn.posterior.fit(
        model, loader, F.cross_entropy, "full", curvature="ggn-exact", prior_precision=2.0, progress=False
    )
    table = vlearn.sweep(model, fitted, loader, F.cross_entropy, "exact", progress=False)
    covariance = torch.linalg.inv(truth.ggn() + precision)
    assert torch.backends.mha.get_fastpath_enabled()
    assert relative_error(table.loss, truth.loss) < 1e-10
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-8
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-8
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-8


# -- a token is an example --------------------------------------------------------------------------------------------


def token_truth(model, x, y, position, logits=lambda f: f):
    """The batch linearised with the loss of one position's tokens alone."""
    return per_example(model, lambda m: m(x), lambda f: rows_by_token(logits(f), y)[:, position])


@pytest.mark.parametrize("kind", ["callable", "torch", "module", "as many classes as tokens"])
def test_tokens_equal_explicit_gradients_of_each_tokens_loss(kind):
    classes = T if kind == "as many classes as tokens" else VOCABULARY
    classes_first = kind in ("torch", "module")
    x, y = tokens()
    y = torch.where(y < 0, y, y % classes)
    loss_fn = {"torch": F.cross_entropy, "module": nn.CrossEntropyLoss()}.get(kind, rows_by_token)
    model, twin = (language_model(classes, classes_first) for _ in "ab")
    table = swept(model, loss_fn, lambda: (x, y), per="token")
    n, t = (y != -100).nonzero().unbind(1)
    assert torch.equal(table.index, n) and torch.equal(table.position, t)
    for position in range(T):
        truth = token_truth(twin.eval(), x, y, position, (lambda f: f.mT) if classes_first else (lambda f: f))
        rows, own = table.position == position, y[:, position] != -100
        change = truth.deviation(covariance_of(truth)).reshape(truth.output.shape)
        deviation = change[..., position] if classes_first else change[:, position]
        moved = (truth.output + change).mT if classes_first else truth.output + change
        assert relative_error(table.loss[rows], truth.loss[own]) < 1e-10
        assert relative_error(table.self_influence[rows], truth.self_influence(covariance_of(truth))[own]) < 1e-10
        assert relative_error(table.deviation[rows], deviation[own]) < 1e-10
        assert relative_error(table.loo_loss[rows], rows_by_token(moved, y)[own, position]) < 1e-10


def test_the_probe_of_a_tokens_leverage_is_unbiased():
    x, y = tokens(masked=False)
    repeats, model = 50, language_model()
    posterior = vlearn.IVON(model, lr=0.1, ess=30).posterior()
    loader = [(x.repeat(repeats, 1), y.repeat(repeats, 1))]
    generator = torch.Generator().manual_seed(1)
    table = vlearn.sweep(
        model, posterior, loader, rows_by_token, "probe", per="token", progress=False, generator=generator
    )
    probes = table.leverage.reshape(repeats, N, T).permute(2, 0, 1)
    error = probes.std(1) / repeats**0.5
    for position in range(T):
        truth = token_truth(language_model().eval(), x, y, position)
        exact = truth.leverage(covariance_of(truth))
        assert bool(((probes[position].mean(0) - exact).abs() < 5 * error[position]).all())


def test_another_ignored_index_is_read_from_the_loss():
    x, y = tokens(masked=False)
    for loss_fn in (nn.CrossEntropyLoss(ignore_index=3), partial(F.cross_entropy, ignore_index=3)):
        table = swept(language_model(classes_first=True), loss_fn, lambda: (x, y), per="token")
        assert len(table) == int((y != 3).sum()) < N * T


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_probe_of_a_language_model_forms_no_curvature(monkeypatch):
    """T·V entries of output: Λ would have (T·V)² for each example."""
    monkeypatch.setattr(output_hessian, "output_hessian", lambda *_: pytest.fail("Λ was formed"))
    for loss_fn, classes_first in ((lambda f, t: rows_by_token(f, t).sum(1), False), (F.cross_entropy, True)):
        table = swept(language_model(classes_first=classes_first), loss_fn, leverage="probe")
        assert bool((table.leverage > 0).all())


def test_probabilities_below_the_smallest_float_form_no_curvature(monkeypatch):
    monkeypatch.setattr(output_hessian, "output_hessian", lambda *_: pytest.fail("Λ was formed"))
    x, y = tokens(masked=False)
    model = language_model().float()
    with torch.no_grad():
        model.out.weight *= 300
        smallest = model(x).softmax(-1).min()
    assert float(smallest) < torch.finfo(torch.float32).tiny
    posterior = vlearn.IVON(model, lr=0.1, ess=30).posterior()
    vlearn.sweep(model, posterior, [(x, y)], lambda f, t: rows_by_token(f, t).sum(1), progress=False)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_probe_of_confident_logits_in_float32_is_that_of_float64(size):
    x, y = tokens(masked=False)
    found = []
    for dtype in (torch.float64, torch.float32):
        model = language_model().to(dtype)
        with torch.no_grad():
            model.out.weight *= size
        posterior = vlearn.IVON(model, lr=0.1, ess=30).posterior()
        found.append(
            vlearn.sweep(
                model,
                posterior,
                [(x, y)],
                lambda f, t: rows_by_token(f, t).sum(1),
                progress=False,
                generator=torch.Generator().manual_seed(0),
            ).leverage
        )
    assert relative_error(found[1].double(), found[0]) < 1e-4


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "sequence"}, "per='sequence', but it must be 'example' or 'token': use 'example'."),
        ({"per": "token", "refined": True}, "which need V of a whole output: use per='example'"),
        ({"per": "token", "leverage": "exact"}, "which need V of a whole output: use per='example'"),
        (
            {"per": "token", "loss_fn": lambda f, t: rows_by_token(f, t).sum(1)},
            "per='token' needs one for each position",
        ),
        ({"per": "token", "loss_fn": lambda f, t: rows_by_token(f, t)[:, 1:4]}, "no axis of the output of shape"),
    ],
)
def test_what_is_not_defined_per_token_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        swept(language_model(), **{"loss_fn": rows_by_token, **arguments})
    assert message in str(error.value)
