"""BatchNorm in train mode with the batch's statistics as constants, against gradients of a twin that holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import vlearn
from tests.optim.table import FAMILY, Entry, family
from tests.oracles.per_example import relative_error

N, C = 8, 3


class Normalised(nn.Module):
    """Convolutions and a layer, each with a BatchNorm: tracked, untracked, without scale and shift; dropout between."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(inplace=True))
        self.second = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(), nn.Dropout(dropout)
        )
        self.third = nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh())
        self.head = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.first(x)).flatten(1)))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 1, 6, 6, dtype=torch.float64), torch.arange(N) % C


def network(dropout: float = 0.0) -> Normalised:
    torch.manual_seed(0)
    return Normalised(dropout).double()


class Mask(nn.Module):
    """What dropout did to a batch, or to some of its rows."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask, self.rows = mask, slice(None)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask[self.rows]


def twin_of(model: nn.Module) -> Normalised:
    """A network that nobody watches, with the weights that this one has now: the draw."""
    twin = network()
    with torch.no_grad():
        for theirs, p in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.copy_(p)
    return twin


def holding(twin: nn.Module, x: Tensor) -> nn.Module:
    """The network in eval mode, with this batch's statistics for its running ones."""
    held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def hold(module: Any, args: Any) -> None:
        axes = [axis for axis in range(args[0].dim()) if axis != 1]
        held[module] = args[0].mean(axes).detach(), args[0].var(axes, correction=0).detach()

    norms = [module for module in twin.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [module.register_forward_pre_hook(hold) for module in norms]
    twin.train()(x)
    for module, handle in zip(norms, handles, strict=True):
        handle.remove()
        module.running_mean, module.running_var = held[module]
    return twin.eval()


Rows = list[dict[str, Tensor]]


def self_influence(losses: Rows, variance: Any) -> Tensor:
    return torch.stack(
        [torch.stack([(variance[k] * g.square()).sum() for k, g in row.items()]).sum() for row in losses]
    )


def rows_of(twin: nn.Module, x: Tensor, y: Tensor, before: Callable[[int], None] = lambda n: None) -> tuple[Rows, Rows]:
    """(gradient of each example's loss, of each of its outputs), by name."""
    weights = {name: p.detach().requires_grad_() for name, p in twin.named_parameters()}

    def gradient(value: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(value, list(weights.values()), retain_graph=True)
        return dict(zip(weights, found, strict=True))

    losses, outputs = [], []
    for n in range(len(x)):
        before(n)
        output = functional_call(twin, weights, x[n : n + 1])
        losses.append(gradient(F.cross_entropy(output, y[n : n + 1])))
        outputs += [gradient(value) for value in output[0]]
    return losses, outputs


@pytest.mark.parametrize("told", ["optimizer", "watch"])
def test_rows_are_those_of_the_network_that_holds_the_batchs_statistics(told: str) -> None:
    model, (x, y) = network(), batch()
    if told == "optimizer":
        optimizer = vlearn.IVON(model, lr=0.1, ess=50, hess_init=0.5, batch_norm="constant")
    else:
        optimizer = vlearn.IVON(model, lr=0.1, ess=50, hess_init=0.5)
        optimizer.watch(model, batch_norm="constant")
    F.cross_entropy(model(x), y).backward()
    twin = holding(twin_of(model), x)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses, outputs = rows_of(twin, x, y)
    before = optimizer.sensitivities(deviation=True)
    variance = {name: value.clone() for name, value in optimizer.posterior().variance.items()}
    for name, p in model.named_parameters():  # nothing of the user's has changed
        assert p.grad is not None and torch.equal(p.grad, gradients[name])
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    optimizer.step()
    after = optimizer.sensitivities(deviation=True)
    for found, sigma in ((before, variance), (after, optimizer.posterior().variance)):
        products = [
            torch.stack([(sigma[k] * g * outputs[C * n + c][k]).sum() for k, g in losses[n].items()]).sum()
            for n in range(N)
            for c in range(C)
        ]
        change = torch.stack(products).reshape(N, C)
        assert relative_error(found.self_influence, self_influence(losses, sigma)) < 1e-10
        assert found.deviation is not None and relative_error(found.deviation, change) < 1e-10
        some = optimizer.sensitivities(examples=[5, 2])
        assert some.self_influence.shape == (2,)


def test_dropout_between_the_normalisations_has_the_masks_of_the_step() -> None:
    model, (x, y) = network(dropout=0.4), batch()
    generator = torch.Generator().manual_seed(1)  # so that the masks alone take torch's own numbers
    optimizer = vlearn.IVON(model, lr=0.1, ess=50, hess_init=0.5, batch_norm="constant", generator=generator)
    torch.manual_seed(7)
    F.cross_entropy(model(x), y).backward()
    found = optimizer.sensitivities()
    twin, masks = twin_of(model), []
    twin.second[3] = nn.Dropout(0.4)
    twin.second[3].register_forward_hook(lambda module, args, out: masks.append((out / args[0]).detach()))
    torch.manual_seed(7)
    twin(x)
    twin.second[3] = mask = Mask(masks[0])
    losses, _ = rows_of(holding(twin, x), x, y, lambda n: setattr(mask, "rows", slice(n, n + 1)))
    assert relative_error(found.self_influence, self_influence(losses, optimizer.posterior().variance)) < 1e-10


@pytest.mark.parametrize("entry", [e for e in FAMILY if e.captures], ids=str)
def test_rules_that_need_rows_train(entry: Entry) -> None:
    model, (x, y) = network(), batch()
    x = x + 2 * (y - 1).reshape(-1, 1, 1, 1)
    if entry.dense:
        model.first.requires_grad_(False)
    optimizer = entry.make(model, lr=entry.rate, ess=1000, batch_norm="constant")
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_vogns_curvature_is_that_of_the_rows() -> None:
    model, (x, y) = network(), batch()
    optimizer = vlearn.VOGN(model, lr=0.0, ess=50, hess_init=0.5, beta2=0.9, batch_norm="constant")
    F.cross_entropy(model(x), y).backward()
    losses, _ = rows_of(holding(twin_of(model), x), x, y)
    optimizer.step()
    for name, p in model.named_parameters():
        squares = torch.stack([row[name].square() for row in losses]).mean(0)
        assert relative_error(optimizer.state[p]["hessian"], 0.9 * 0.5 + 0.1 * squares) < 1e-10


def test_vons_curvature_is_that_of_the_probe() -> None:
    """Over many probes the mean of their squares is the Gauss-Newton diagonal."""
    model, (x, y) = network(), batch()
    optimizer = vlearn.VON(model, lr=0.0, ess=1e12, hess_init=0.5, beta2=0.0, batch_norm="constant")
    total: dict[str, Tensor] = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 400
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            total[name] += optimizer.state[p]["hessian"] / count
    twin = holding(twin_of(model), x)
    _, outputs = rows_of(twin, x, y)
    p = twin(x).softmax(-1).detach()
    for name in ("first.0.weight", "second.1.weight", "head.weight"):
        rows = torch.stack([g[name] for g in outputs]).reshape(N, C, -1)
        hessian = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
        expected = torch.einsum("ncp,ncd,ndp->p", rows, hessian, rows) / N
        assert relative_error(total[name].flatten(), expected) < 0.1


@family
def test_without_it_rows_are_refused_and_the_message_names_it(entry: Entry) -> None:
    model, (x, y) = network(), batch()
    if entry.dense:
        model.first.requires_grad_(False)
    optimizer = entry.make(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"BatchNorm.*batch_norm='constant'"):
        optimizer.sensitivities()


def test_a_module_that_normalises_two_batches_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.norm(x) + 1))

    model = Twice()
    optimizer = vlearn.IVON(model, lr=0.1, ess=50, batch_norm="constant")
    F.cross_entropy(model(torch.randn(N, 4)), torch.arange(N) % C).backward()
    with pytest.raises(RuntimeError, match="norm .BatchNorm1d. normalises two batches"):
        optimizer.sensitivities()
    optimizer.step()


def test_other_ways_to_meet_stay_refused() -> None:
    class Centred(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    torch.manual_seed(0)
    model, (x, y) = Centred().double(), batch()
    optimizer = vlearn.IVON(model, lr=0.1, ess=50, batch_norm="constant")
    x = nn.Parameter(x)
    F.cross_entropy(model(x * 1.0), y).backward()
    with pytest.raises(RuntimeError, match="depends on the other examples"):
        optimizer.sensitivities()


def test_another_word_is_refused_before_anything_changes() -> None:
    model = network()
    for make in (
        lambda: vlearn.IVON(model, lr=0.1, ess=50, batch_norm="constants"),
        lambda: vlearn.VOGN(model, lr=0.1, ess=50, batch_norm="constants"),
        lambda: vlearn.IVON(model.parameters(), lr=0.1, ess=50).watch(model, batch_norm="eval"),
    ):
        with pytest.raises(ValueError, match="batch_norm='(constants|eval)', but it must be 'refuse' or 'constant'"):
            make()
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_copy_and_an_optimizer_that_finds_its_model_have_the_option() -> None:
    model, (x, y) = network(), batch()
    optimizer = vlearn.IVON(model.parameters(), lr=0.1, ess=50, batch_norm="constant")
    F.cross_entropy(model(x), y).backward()
    assert optimizer.sensitivities().self_influence.shape == (N,)
    optimizer.step()
    twin, copied = copy.deepcopy((model, optimizer))
    F.cross_entropy(twin(x), y).backward()
    assert copied.sensitivities().self_influence.shape == (N,)


def test_running_statistics_are_estimated_again_at_the_mean() -> None:
    """torch.optim.swa_utils.update_bn on the watched model: training updates them at the draws."""
    model, (x, y) = network(), batch()
    optimizer = vlearn.IVON(model, lr=0.1, ess=5, hess_init=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    mean = [p.detach().clone() for p in model.parameters()]
    update_bn([(x[:4], y[:4]), (x[4:], y[4:])], model)
    assert all(map(torch.equal, mean, model.parameters()))
    plain = network()
    plain.load_state_dict(model.state_dict())
    norm, convolution = model.first[1], plain.first[0]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    parts = [convolution(part).detach().mean((0, 2, 3)) for part in (x[:4], x[4:])]
    assert relative_error(norm.running_mean, (parts[0] + parts[1]) / 2) < 1e-12
    F.cross_entropy(model(x), y).backward()  # and training goes on
    optimizer.step()


class Checkpointed(Normalised):
    def forward(self, x: Tensor) -> Tensor:
        h: Any = checkpoint(lambda h: self.second(self.first(h)), x, use_reentrant=False)
        return self.head(self.third(h.flatten(1)))


class ActivatedNorm(nn.BatchNorm2d):
    """A subclass, which no rule covers."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def with_a_subclass(model: Normalised) -> Normalised:
    norm = ActivatedNorm(3, momentum=0.3).to(model.head.weight.dtype)
    norm.load_state_dict(model.first[1].state_dict())
    model.first[1], model.first[2] = norm, nn.Identity()
    return model


def rows_by(model: nn.Module, x: Tensor, y: Tensor, autocast: bool = False, every: int = 1) -> Tensor:
    """Self-influences of a second step, at draws that are the same for all models."""
    generator = torch.Generator().manual_seed(1)
    optimizer = vlearn.IVON(model, lr=0.1, ess=50, hess_init=0.5, batch_norm="constant", generator=generator)
    optimizer.watch(model, every=every)
    for _ in range(every + 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    return optimizer.sensitivities().self_influence.float()


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("checkpointed", 1e-5),
        ("a subclass", 1e-5),
        ("channels last", 1e-5),
        ("compiled", 1e-5),
        ("autocast", 0.1),
        ("bfloat16", 0.1),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch.compile itself
def test_it_is_the_same_however_the_network_runs(name: str, tolerance: float) -> None:
    x, y = batch()
    expected = rows_by(network().float(), x.float(), y)
    if name == "checkpointed":
        torch.manual_seed(0)
        found = rows_by(Checkpointed().double().float(), x.float(), y)
    elif name == "a subclass":
        found = rows_by(with_a_subclass(network()).float(), x.float(), y)
    elif name == "channels last":
        found = rows_by(network().float().to(memory_format=torch.channels_last), x.float(), y)  # type: ignore
    elif name == "compiled":
        found = rows_by(torch.compile(network().float(), backend="eager"), x.float(), y)  # type: ignore
    elif name == "autocast":
        found = rows_by(network().float(), x.float(), y, autocast=True)
    else:
        found = rows_by(network().bfloat16(), x.bfloat16(), y)
    assert relative_error(found, expected) < tolerance


def test_frozen_normalisations_of_bfloat16_have_rows() -> None:
    x, y = batch()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = network().to(dtype)
        for part in (model.first, model.second, model.third):
            part[1].eval()
        model.second[1] = nn.Identity()  # which has no statistics to freeze
        rows.append(rows_by(model, x.to(dtype), y))
    assert relative_error(rows[1], rows[0]) < 0.1


class OverNodes(nn.Module):
    """Of concatenated graphs, whose nodes are normalised together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        return self.head(h.new_zeros(int(index.max()) + 1, 6).index_add(0, index, h))


def test_nodes_of_concatenated_graphs_are_normalised_together() -> None:
    torch.manual_seed(0)
    model, x, index = OverNodes().double(), torch.randn(11, 3).double(), torch.tensor([0, 0, 1, 0, 1, 1, 2, 2, 2, 2, 2])
    y = torch.tensor([0, 1, 1])
    optimizer = vlearn.IVON(model, lr=0.1, ess=5, hess_init=0.5, batch_norm="constant")
    optimizer.watch(model, example_index="index")
    F.cross_entropy(model(x, index), y).backward()
    found, sigma = optimizer.sensitivities().self_influence, optimizer.posterior().variance
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    h = F.linear(x, weights["first.weight"], weights["first.bias"])
    mean, variance = h.mean(0).detach(), h.var(0, correction=0).detach()
    h = (h - mean) * (variance + model.norm.eps).rsqrt() * weights["norm.weight"] + weights["norm.bias"]
    for n in range(3):
        output = F.linear(h.relu()[index == n].sum(0), weights["head.weight"], weights["head.bias"])
        loss = F.cross_entropy(output.unsqueeze(0), y[n : n + 1])
        gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        truth = sum(float((sigma[k] * g.square()).sum()) for k, g in zip(weights, gradients, strict=True))
        assert abs(float(found[n]) - truth) < 1e-10 * truth
