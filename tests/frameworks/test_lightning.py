"""Lightning's own loops, automatic and manual, against the same training written by hand, bit for bit."""

from __future__ import annotations

import gc
import logging
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.frameworks.lines import LINES
from tests.optim.table import LOOPS, equal, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))
BATCHES = list(zip(X.split(4), Y.split(4), strict=True))


class Classifier(lightning.LightningModule):
    """A small network, a loss that is a submodule as well, and an optimizer from outside."""

    def __init__(
        self, settings: dict[str, Any] | None = None, whole: bool = False, cycle: bool = False, make: Any = None
    ):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.loss = nn.CrossEntropyLoss()
        self.settings, self.whole, self.cycle, self.make = settings or {}, whole, cycle, make or ivon
        self.logits: list[Tensor] = []
        self.predictions: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        logits = self.net(batch[0])
        self.logits.append(logits.detach())
        return self.loss(logits, batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.predictions.append(self.net(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self if self.whole else self.net, **self.settings)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizer.watch(
            self if self.whole else self.net,
            loss_scale=lambda: (scaler.get_scale() if scaler else 1) / self.trainer.accumulate_grad_batches,
        )
        return {"optimizer": optimizer, "lr_scheduler": one_cycle(optimizer)} if self.cycle else optimizer


def ivon(model: nn.Module, **settings: Any) -> vlearn.IVON:
    generator = torch.Generator().manual_seed(7)
    return vlearn.IVON(model, **{"lr": 0.1, "ess": 24, "hess_init": 0.5, "generator": generator, **settings})


def one_cycle(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20), "interval": "step"}


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=4, generator=torch.Generator())  # not the noise's generator


def trainer(**settings: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False) | {
        "accelerator": "cpu",
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(**{**quiet, **settings})


def by_hand(
    epochs: int = 2,
    parts: int = 1,
    norm: float | None = None,
    value: float | None = None,
    cycle: bool = False,
    make: Any = None,
    **settings: Any,
) -> tuple[nn.Module, list[Any]]:
    """The same training without Lightning: the network, and the sensitivities of every micro-batch."""
    model = Classifier().net
    optimizer = (make or ivon)(model, **settings)
    optimizer.watch(model, loss_scale=1 / parts)
    scheduler = one_cycle(optimizer)["scheduler"] if cycle else None
    rows = []
    for i, (x, y) in enumerate(BATCHES * epochs):
        if i % parts == 0:
            optimizer.zero_grad()
        (F.cross_entropy(model(x), y) / parts).backward()
        if i % parts == parts - 1:
            if norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), norm)
            if value is not None:
                nn.utils.clip_grad_value_(model.parameters(), value)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        rows.append(optimizer.sensitivities())
    return model, rows


class Rows(lightning.Callback):
    """Reads the sensitivities of every micro-batch."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rows.append(trainer.optimizers[0].sensitivities())


@pytest.mark.parametrize("line", list(LINES))
def test_every_line_makes_the_steps_of_the_loop_by_hand(line: str) -> None:
    module, rows = Classifier(make=LINES[line]), Rows()
    trainer(gradient_clip_val=0.2, accumulate_grad_batches=3, callbacks=[rows]).fit(module, loader())
    model, expected = by_hand(parts=3, norm=0.2, make=LINES[line])
    assert equal(weights(module.net), weights(model))
    assert all(torch.equal(a.self_influence, b.self_influence) for a, b in zip(rows.rows, expected, strict=True))


@pytest.mark.parametrize(
    ("of_trainer", "of_hand"),
    [
        ({}, {}),
        ({"gradient_clip_val": 0.2}, {"norm": 0.2}),
        ({"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}, {"value": 0.02}),
        ({"accumulate_grad_batches": 3}, {"parts": 3}),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}, {"parts": 2, "norm": 0.2}),
    ],
    ids=["plain", "clip norm", "clip value", "accumulate", "accumulate and clip"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["network", "whole module"])
def test_automatic_optimization_is_the_loop_by_hand(of_trainer: dict, of_hand: dict, whole: bool) -> None:
    module, read = Classifier(whole=whole, cycle=True), Rows()
    trainer(callbacks=[read], **of_trainer).fit(module, loader())
    model, rows = by_hand(cycle=True, **of_hand)
    assert equal(weights(module.net), weights(model))
    for (x, y), logits, row, expected in zip(BATCHES * 2, module.logits, read.rows, rows, strict=True):
        assert row.step == expected.step and len(row.self_influence) == len(x)
        assert torch.equal(row.self_influence, expected.self_influence)
        torch.testing.assert_close(row.residual, logits.softmax(1) - F.one_hot(y, 3))


def test_several_draws_per_step_are_those_of_the_closure_each_clipped() -> None:
    module = Classifier({"mc_samples": 3})
    trainer(gradient_clip_val=0.2).fit(module, loader())
    model = Classifier().net
    optimizer = ivon(model)
    for x, y in BATCHES * 2:
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
    assert equal(weights(module.net), weights(model))


def test_several_draws_per_step_with_accumulation_are_refused() -> None:
    module = Classifier({"mc_samples": 3})
    with pytest.raises(RuntimeError, match="mc_samples=3, but gradients were accumulated"):
        trainer(accumulate_grad_batches=2).fit(module, loader())
    assert equal(weights(module.net), weights(Classifier().net))


class Skipping(Classifier):
    """Leaves every second minibatch out, as a training step may by returning nothing."""

    def training_step(self, batch: Any, index: int) -> Any:
        return super().training_step(batch, index) if index % 2 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_minibatch_that_is_left_out_makes_no_step() -> None:
    module = Skipping()
    trainer(max_epochs=1).fit(module, loader())
    model = Classifier().net
    optimizer = ivon(model)
    for i, (x, y) in enumerate(BATCHES):
        optimizer.zero_grad()
        optimizer.step((lambda x=x, y=y: F.cross_entropy(model(x), y).backward()) if i % 2 else lambda: None)
    assert equal(weights(module.net), weights(model))
    assert module.trainer.optimizers[0].state[module.net[0].weight]["step"] == 3


class Checks(lightning.Callback):
    """At every validation and after every micro-batch: what is seen and what is saved is the mean."""

    def __init__(self, folder: Any):
        self.folder = folder
        self.active = 0

    def mean(self, trainer: Any) -> list[Tensor]:
        posterior = trainer.optimizers[0].posterior().clone()
        return [posterior.mean[name] for name, _ in trainer.model.net.named_parameters()]

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        reference = Classifier().net
        with torch.no_grad():
            for p, m in zip(reference.parameters(), self.mean(trainer), strict=True):
                p.copy_(m)
            for (x, _), seen in zip(BATCHES, module.predictions, strict=True):
                assert torch.equal(seen, reference(x))
        module.predictions.clear()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        path = self.folder / "now.ckpt"
        trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)["state_dict"]
        mean = self.mean(trainer)
        assert equal([saved[f"net.{name}"] for name, _ in module.net.named_parameters()], mean)
        self.active += not equal(weights(module.net), mean)


@pytest.mark.parametrize("parts", [1, 2])
def test_validation_and_checkpoints_see_the_mean_and_change_nothing(parts: int, tmp_path: Any) -> None:
    module, checks = Classifier(), Checks(tmp_path)
    trainer(callbacks=[checks], val_check_interval=1, accumulate_grad_batches=parts).fit(module, loader(), loader())
    assert checks.active == (0 if parts == 1 else 6)  # every second micro-batch leaves its draw in the weights
    model, _ = by_hand(parts=parts)
    assert equal(weights(module.net), weights(model))


class ResumableLoader:
    """The same minibatches in order, going on inside an epoch where it was saved."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> Any:
        for i in range(self.given % len(BATCHES), len(BATCHES)):
            self.given = i + 1
            yield BATCHES[i]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.given = state_dict["given"]


class RandomState(lightning.Callback):
    """Puts the random state into checkpoints, which Lightning does not, and takes it up at the next batch."""

    def __init__(self) -> None:
        self.loaded: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict["torch"]

    def on_train_batch_start(self, *args: Any) -> None:
        if self.loaded is not None:
            torch.set_rng_state(self.loaded)
            self.loaded = None


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("after", [6, 8], ids=["an epoch", "the middle of an epoch"])
def test_a_resumed_run_is_the_uninterrupted_one(parts: int, after: int, tmp_path: Any) -> None:
    def run(seed: int, resume: Any = None) -> Classifier:
        torch.manual_seed(seed)
        module = Classifier({"generator": None}, cycle=True)
        keep = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, "{step}", save_top_k=-1, every_n_train_steps=after // parts
        )
        run = trainer(
            max_epochs=3, callbacks=[RandomState(), keep], enable_checkpointing=True, accumulate_grad_batches=parts
        )
        run.fit(module, ResumableLoader(), ckpt_path=resume)
        return module

    whole = run(3)
    resumed = run(4, tmp_path / f"step={after // parts}.ckpt")
    assert equal(weights(resumed.net), weights(whole.net))
    states = [m.trainer.optimizers[0].state_dict()["state"][0] for m in (whole, resumed)]
    assert states[0]["step"] == 18 // parts and equal([*states[0].values()], [*states[1].values()])


class Manual(Classifier):
    """Every loop as a manual training step, on the optimizer as Lightning wraps it."""

    def __init__(self, loop: str):
        super().__init__()
        self.automatic_optimization = False
        self.loop = loop
        self.rows: list[Any] = []

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        getattr(self, self.loop)(optimizer, batch)
        self.rows.append(optimizer.sensitivities())

    def backward_of(self, optimizer: Any, batch: Any) -> Tensor:
        optimizer.zero_grad()
        loss = self.loss(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        return loss

    def plain(self, optimizer: Any, batch: Any) -> None:
        self.backward_of(optimizer, batch)
        optimizer.step()

    def context(self, optimizer: Any, batch: Any) -> None:
        with optimizer.sampled_params(train=True):
            self.backward_of(optimizer, batch)
        optimizer.step()

    def closure(self, optimizer: Any, batch: Any) -> None:
        optimizer.step(lambda: self.backward_of(optimizer, batch))

    def modes(self, optimizer: Any, batch: Any) -> None:
        optimizer.train()
        self.backward_of(optimizer, batch)
        optimizer.step()
        optimizer.eval()


@pytest.mark.parametrize("loop", LOOPS)
def test_manual_optimization_is_the_loop_by_hand_in_every_loop(loop: str) -> None:
    module = Manual(loop)
    trainer().fit(module, loader())
    model, rows = by_hand()
    assert equal(weights(module.net), weights(model))
    for row, expected in zip(module.rows, rows, strict=True):
        assert torch.equal(row.self_influence, expected.self_influence)


class Outside(Classifier):
    """Trains with an optimizer made before, and wraps it once more in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.own = ivon(self.net)

    def configure_optimizers(self) -> Any:
        return self.own

    def on_train_batch_start(self, *args: Any) -> None:
        wrapped: Any = self.optimizers()
        wrapped.unwatch()
        wrapped.watch(self.net)  # as on the optimizer itself
        assert self.own._watch is wrapped._watch and self.own._watch.sampler is self.own._sampler


def test_the_optimizer_outlives_trainers_and_their_wrappers_of_it() -> None:
    module = Outside()
    for _ in range(2):
        trainer(max_epochs=1).fit(module, loader())
        gc.collect()
    assert equal(weights(module.net), weights(by_hand()[0]))


class Adversaries(lightning.LightningModule):
    """Two optimizers that take turns; toggling freezes the parameters of the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            with optimizer.toggle_model():
                optimizer.zero_grad()
                self.manual_backward(sign * F.cross_entropy(self.second(self.first(batch[0])), batch[1]))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [ivon(self.first), ivon(self.second)]


def test_two_toggled_optimizers_take_turns() -> None:
    module = Adversaries()
    before = weights(module)
    trainer().fit(module, loader())
    assert not any(torch.equal(old, new) for old, new in zip(before, weights(module), strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_clips_unscaled_gradients(precision: str) -> None:
    plugin = lightning.pytorch.plugins.MixedPrecision(precision, "cpu")
    module, read = Classifier(), Rows()
    trainer(plugins=plugin, gradient_clip_val=0.2, callbacks=[read]).fit(module, loader())
    model, rows = by_hand(norm=0.2)
    for row, expected in zip(read.rows, rows, strict=True):
        torch.testing.assert_close(row.residual.float(), expected.residual, rtol=0.1, atol=0.05)
    for p, q in zip(weights(module.net), weights(model), strict=True):
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_run_that_breaks_off_leaves_the_mean(error: BaseException) -> None:
    module, breaks = Classifier(), lightning.Callback()

    def fail(*args: Any) -> None:
        raise error

    breaks.on_before_optimizer_step = fail  # type: ignore[method-assign]
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(callbacks=[breaks]).fit(module, loader())
    assert equal(weights(module.net), weights(Classifier().net))
