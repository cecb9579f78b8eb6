"""The callback in Lightning's own loops: what it records, and that training is bitwise what it is without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import vlearn
from vlearn.integrations.lightning import SensitivityCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

N, C = 22, 3
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(2))
DATA = TensorDataset(X, Y)


class Classifier(lightning.LightningModule):
    """Keeps what it saw, to be compared."""

    def __init__(self, optimizer: str = "AdamW", whole: bool = False, manual: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(5, C)
        self.loss = nn.CrossEntropyLoss()
        self.optimizer, self.whole, self.automatic_optimization = optimizer, whole, not manual
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = (batch["x"], batch["label"]) if isinstance(batch, dict) else batch[:2]
        logits = self(x) if self.whole else self.head(self.encoder(x))
        self.seen.append((x, y, logits.detach()))
        loss = self.loss(logits, y)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss}

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=0.05)
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer = vlearn.IVON(self, lr=0.1, ess=N)
        optimizer.watch(self, loss_scale=1 / self.trainer.accumulate_grad_batches)
        return optimizer


def loader(data: Any = DATA, **settings: Any) -> DataLoader:
    return DataLoader(data, 5, shuffle=True, **settings)


def trainer(**settings: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False) | {
        "accelerator": "cpu",
        "max_epochs": 3,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(**{**quiet, **settings})


def assert_recorded(record: vlearn.TrainingRecord, seen: Any, epochs: int = 3) -> None:
    """The record has the average loss of what each example's outputs were."""
    losses: list[list[float]] = [[] for _ in range(N)]
    for x, y, logits in seen:
        for row, loss in zip(x, F.cross_entropy(logits, y, reduction="none").tolist(), strict=True):
            losses[int((X == row).all(1).nonzero()[0, 0])].append(loss)
    expected = [np.mean(values) if values else np.nan for values in losses]
    np.testing.assert_allclose(record.column("loss"), expected, rtol=1e-5)
    assert record.column("count").tolist() == [len(values) for values in losses]
    assert len(record.memory) >= epochs


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "IVON"])
@pytest.mark.parametrize("whole", [False, True], ids=["parts are called", "the module is called"])
@pytest.mark.parametrize("workers", [0, 2])
def test_it_records_what_the_training_step_saw(tmp_path: Any, optimizer: str, whole: bool, workers: int) -> None:
    module, callback = Classifier(optimizer, whole), SensitivityCallback(tmp_path)
    batches = loader(num_workers=workers, persistent_workers=workers > 0)
    trainer(callbacks=[callback]).fit(module, batches, DataLoader(DATA, 11))
    record = callback.recorder.record
    assert_recorded(record, module.seen)
    assert record.memory.steps.tolist() == [5, 10, 15]
    np.testing.assert_array_equal(record.labels, Y)
    assert not module._forward_hooks or optimizer == "IVON"


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "IVON"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["parts are called", "the module is called"])
def test_training_with_it_is_bitwise_training_without(
    tmp_path: Any, optimizer: str, settings: Any, whole: bool
) -> None:
    def weights(callbacks: Any) -> list[Tensor]:
        module = Classifier(optimizer, whole)
        made = trainer(callbacks=callbacks, **settings)
        made.fit(module, loader(num_workers=1), DataLoader(DATA, 11))
        return [*module.state_dict().values(), torch.get_rng_state()]

    live = {"self_influence_every": 1} if optimizer == "IVON" and whole else {}
    callback = SensitivityCallback(tmp_path, test_loss="val_loss", sweeps=vlearn.audit.Sweeps(2, part=0.5), **live)
    for with_it, without in zip(weights([callback]), weights([]), strict=True):
        assert torch.equal(with_it, without)
    memory = callback.recorder.record.memory
    assert memory.kinds.tolist() == ["live", "live", "sweep", "live"]
    assert np.isfinite(memory.test_loss[2]) and np.isfinite(memory.column("leverage")[2]).sum() == N // 2


@pytest.mark.parametrize("whole", [False, True], ids=["parts are called", "the module is called"])
def test_a_loss_of_another_kind_leaves_the_output_to_be_named(tmp_path: Any, whole: bool) -> None:
    module = Classifier(whole=whole)
    module.loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    with pytest.raises(ValueError, match="'encoder', 'head'.* name it by module="):
        trainer(callbacks=[SensitivityCallback(tmp_path / "unnamed")]).fit(module, loader())
    for name, options in {"module": {"module": "head"}, "loss": {"loss_fn": module.loss}}.items():
        module = Classifier(whole=whole)
        module.loss = nn.CrossEntropyLoss(label_smoothing=0.2)
        callback = SensitivityCallback(tmp_path / name, **options)
        trainer(callbacks=[callback]).fit(module, loader())
        if name == "module":
            assert_recorded(callback.recorder.record, module.seen)
        assert callback.recorder.record.column("count").tolist() == [3] * N


class Handing(Classifier):
    """A module whose forward hands on what its network gives."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Identity(), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, C))
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def training_step(self, batch: Any, index: int) -> Any:
        logits = self(batch[0])
        self.seen.append((*batch, logits.detach()))
        return self.loss(logits, batch[1])


def test_a_network_and_the_module_that_hands_on_its_output_are_one(tmp_path: Any) -> None:
    module, callback = Handing(), SensitivityCallback(tmp_path, sweeps=3)
    trainer(callbacks=[callback]).fit(module, loader())
    assert_recorded(callback.recorder.record, module.seen)
    assert callback.recorder.record.memory.kinds[-1] == "sweep"


def test_manual_optimization_is_recorded(tmp_path: Any) -> None:
    module, callback = Classifier(manual=True), SensitivityCallback(tmp_path)
    trainer(callbacks=[callback]).fit(module, loader())
    assert_recorded(callback.recorder.record, module.seen)


@pytest.mark.parametrize(
    "every", [{"every_n_train_steps": 7}, {"every_n_train_steps": 5}, {"every_n_epochs": 2}], ids=str
)
def test_a_run_that_resumes_records_what_the_uninterrupted_one_does(tmp_path: Any, every: Any) -> None:
    """In an order that does not depend on the random state, which Lightning does not save."""

    def fit(path: Any, module: Any, checkpoint: Any = None, **settings: Any) -> Any:
        callback = SensitivityCallback(path)
        save = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, **every)
        made = trainer(callbacks=[callback, save], enable_checkpointing=True, **settings)
        made.fit(module, DataLoader(DATA, 5), ckpt_path=checkpoint, weights_only=True)
        return callback.recorder.record

    def no_dropout() -> Classifier:
        module = Classifier("SGD")
        module.encoder[2] = nn.Identity()
        return module

    fit(tmp_path / "run", no_dropout())  # killed at its end, say
    saved = sorted((tmp_path / "checkpoints").iterdir(), key=os.path.getmtime)
    record = fit(tmp_path / "run", no_dropout(), saved[0])
    whole = fit(tmp_path / "whole", no_dropout())
    if every != {"every_n_train_steps": 7}:
        np.testing.assert_allclose(record.column("loss"), whole.column("loss"), rtol=1e-6)
        assert record.column("count").tolist() == [3] * N
    else:  # Lightning begins the epoch's batches anew, here for three of five: so that is what was seen
        assert record.column("count").tolist() == [4] * 10 + [3] * 5 + [2] * 7
    np.testing.assert_array_equal(record.memory.steps, whole.memory.steps)


def test_a_subset_keeps_the_numbers_of_the_whole(tmp_path: Any) -> None:
    module, callback = Classifier(), SensitivityCallback(tmp_path, dataset=DATA)
    trainer(callbacks=[callback]).fit(module, loader(Subset(DATA, range(15, 3, -1))))
    assert_recorded(callback.recorder.record, module.seen)
    module, callback = Classifier(), SensitivityCallback(tmp_path / "both", dataset=DATA)
    both = ConcatDataset([Subset(DATA, range(5)), Subset(DATA, range(3, 22))])
    trainer(callbacks=[callback]).fit(module, loader(both))
    assert_recorded(callback.recorder.record, module.seen)


class Rows(IterableDataset):
    def __iter__(self) -> Any:
        for n in torch.randperm(N).tolist():
            yield {"x": X[n], "label": Y[n], "row": n}


class Dicts(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, n: int) -> Any:
        return {"x": X[n], "label": Y[n]}


def test_dicts_and_streams_are_recorded(tmp_path: Any) -> None:
    module, callback = Classifier(), SensitivityCallback(tmp_path / "dicts")
    trainer(callbacks=[callback]).fit(module, loader(Dicts()))
    assert_recorded(callback.recorder.record, module.seen)
    module, callback = Classifier(), SensitivityCallback(tmp_path / "stream", key="row", num_data=N)
    trainer(callbacks=[callback]).fit(module, DataLoader(Rows(), 5))
    assert_recorded(callback.recorder.record, module.seen)


def test_an_epoch_of_fewer_batches_is_recorded(tmp_path: Any) -> None:
    module, callback = Classifier(), SensitivityCallback(tmp_path)
    trainer(callbacks=[callback], limit_train_batches=2).fit(module, loader(num_workers=2))
    assert_recorded(callback.recorder.record, module.seen)
    assert callback.recorder.record.column("count").sum() == 30


def test_the_summary_goes_to_lightnings_own_logger(tmp_path: Any) -> None:
    callback, logger = SensitivityCallback(tmp_path / "run", sweeps=2), CSVLogger(tmp_path)
    made = trainer(callbacks=[callback], logger=logger)
    made.fit(Classifier("IVON"), loader())
    logged = float(made.callback_metrics["vlearn/loss"])
    assert logged == pytest.approx(callback.recorder.record.column("loss").mean(), rel=1e-5)
    text = next(tmp_path.glob("lightning_logs/*/metrics.csv")).read_text()
    assert "vlearn/agreement" in text and "vlearn/sweep_loo_loss" in text


def test_a_test_loss_that_is_not_logged_is_warned_of_once(tmp_path: Any) -> None:
    callback = SensitivityCallback(tmp_path, test_loss="val_los", sweeps=1)
    with pytest.warns(UserWarning, match=r"test_loss='val_los', but no metric .*there are: 'val_loss'") as warned:
        trainer(callbacks=[callback]).fit(Classifier(), loader(), DataLoader(DATA, 5))
    assert len([each for each in warned if "val_los" in str(each.message)]) == 1
    assert np.isnan(callback.recorder.record.memory.test_loss).all()


class Failing(Classifier):
    def training_step(self, batch: Any, index: int) -> Any:
        if len(self.seen) == 7:
            raise KeyError("data are broken")
        return super().training_step(batch, index)


def test_an_exception_leaves_the_record_of_what_was_seen(tmp_path: Any) -> None:
    module, callback = Failing(), SensitivityCallback(tmp_path)
    with pytest.raises(KeyError, match="data are broken"):
        trainer(callbacks=[callback]).fit(module, loader())
    assert_recorded(vlearn.TrainingRecord.open(tmp_path), module.seen, epochs=1)


def test_several_loaders_at_once_are_refused(tmp_path: Any) -> None:
    callback = SensitivityCallback(tmp_path)
    with pytest.raises(ValueError, match="several loaders at once"):
        trainer(callbacks=[callback]).fit(Classifier(), {"a": loader(), "b": loader()})


def test_bad_options_are_refused_before_training(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sweep'"):
        SensitivityCallback(tmp_path, sweep=2)
    with pytest.raises(ValueError, match="every=0"):
        SensitivityCallback(tmp_path, sweeps=0)


def test_two_fits_in_a_row_go_on_with_one_record(tmp_path: Any) -> None:
    callback, module = SensitivityCallback(tmp_path), Classifier()
    for _ in range(2):
        trainer(callbacks=[callback], max_epochs=1).fit(module, loader())
    assert callback.recorder.record.column("count").tolist() == [2] * N


def test_a_checkpoint_without_a_record_is_refused_where_the_record_goes_further(tmp_path: Any) -> None:
    made = trainer(max_epochs=1)
    made.fit(Classifier(), loader())
    made.save_checkpoint(tmp_path / "old.ckpt")
    trainer(callbacks=[SensitivityCallback(tmp_path / "run")]).fit(Classifier(), loader())
    with pytest.raises(ValueError, match="has a record up to step 15, but training goes on at step 5"):
        again = trainer(callbacks=[SensitivityCallback(tmp_path / "run")])
        again.fit(Classifier(), loader(), ckpt_path=tmp_path / "old.ckpt", weights_only=True)


def test_it_is_imported_only_when_it_is_asked_for() -> None:
    code = "import sys, vlearn.integrations.lightning; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert issubclass(SensitivityCallback, lightning.Callback)
