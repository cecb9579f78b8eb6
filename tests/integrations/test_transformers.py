"""The callback in Hugging Face's Trainer: what it records, and that training is bitwise what it is without."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

import vlearn
from vlearn.integrations.transformers import SensitivityCallback

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
transformers.logging.set_verbosity_error()

N, C, T, V = 22, 3, 6, 32
GENERATOR = torch.Generator().manual_seed(1)
TOKENS = torch.randint(3, V, (N, T), generator=GENERATOR)
LABELS = torch.randint(0, C, (N,), generator=GENERATOR)


class Items(Dataset):
    """Items with a column that no model takes."""

    def __init__(self, labels: Any = LABELS, name: str = "labels"):
        self.labels, self.name = labels, name

    def __len__(self) -> int:
        return N

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {"input_ids": TOKENS[n], self.name: self.labels[n], "row": n}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        for n in torch.randperm(N).tolist():
            yield {"input_ids": TOKENS[n], "labels": LABELS[n], "row": n}


class Noting(transformers.Trainer):
    """Notes the tokens and logits of every training forward pass, and counts those that are called with numbers."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.seen.append((inputs["input_ids"], outputs["logits"].detach().clone()))
        return (loss, outputs) if return_outputs else loss


def classifier(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=V, dim=8, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=T, num_labels=C, **settings
    )
    return transformers.DistilBertForSequenceClassification(config)


def language_model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def trainer(
    model: Any, folder: Any, data: Any = None, callbacks: Any = (), optimizer: Any = None, **settings: Any
) -> Any:
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=5,
        **{"num_train_epochs": 3, "learning_rate": 0.01, **quiet, **settings},
    )
    data = Items() if data is None else data
    return Noting(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks), optimizers=(optimizer, None)
    )


def by_example(seen: Any, loss_of: Any) -> list[list[float]]:
    """Of every example the losses that its logits had."""
    losses: list[list[float]] = [[] for _ in range(N)]
    for tokens, logits in seen:
        for row, z in zip(tokens, logits, strict=True):
            n = int((TOKENS == row).all(1).nonzero()[0, 0])
            losses[n].append(float(loss_of(z, n)))
    return losses


def cross_entropy(z: Tensor, n: int) -> Tensor:
    return F.cross_entropy(z, LABELS[n])


def assert_recorded(record: Any, seen: Any, loss_of: Any = cross_entropy) -> None:
    losses = by_example(seen, loss_of)
    expected = [np.mean(values) if values else np.nan for values in losses]
    np.testing.assert_allclose(record.column("loss"), expected, rtol=1e-4)
    assert record.column("count").tolist() == [len(values) for values in losses]


@pytest.mark.parametrize("unused", [True, False], ids=["columns removed", "columns kept"])
@pytest.mark.parametrize("workers", [0, 2])
def test_it_records_what_the_model_saw(tmp_path: Any, unused: bool, workers: int) -> None:
    if not unused:
        pytest.importorskip("datasets")
    callback = SensitivityCallback(tmp_path / "run")
    data: Any = Items() if unused else [{"input_ids": t, "labels": y} for t, y in zip(TOKENS, LABELS, strict=True)]
    settings = {"remove_unused_columns": unused, "dataloader_num_workers": workers, "eval_strategy": "epoch"}
    made = trainer(classifier(), tmp_path, data, [callback], gradient_accumulation_steps=2, **settings)
    made.train()
    record = callback.recorder.record
    assert_recorded(record, made.seen)
    assert record.memory.steps.tolist() == [3, 6, 9] and record.column("count").tolist() == [3] * N
    np.testing.assert_array_equal(record.labels, LABELS)
    assert not made.model._forward_hooks and not made.model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["AdamW", "IVON"])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}], ids=str)
def test_training_with_it_is_bitwise_training_without(tmp_path: Any, kind: str, settings: Any) -> None:
    def weights(callbacks: Any) -> list[Tensor]:
        model = classifier()
        optimizer = vlearn.IVON(model, lr=0.1, ess=N) if kind == "IVON" else None
        trainer(model, tmp_path, None, callbacks, optimizer, **settings).train()
        return [*model.state_dict().values(), torch.get_rng_state()]

    live = {"self_influence_every": 1} if kind == "IVON" else {}
    callback = SensitivityCallback(tmp_path / "run", sweeps=vlearn.audit.Sweeps(2, part=0.5), **live)
    for with_it, without in zip(weights([callback]), weights([]), strict=True):
        assert torch.equal(with_it, without)
    record = callback.recorder.record
    assert record.memory.kinds.tolist() == ["live", "live", "sweep", "live"]
    assert np.isfinite(record.memory.column("leverage")[2]).sum() == N // 2
    assert np.isfinite(record.column("self_influence")).all() == (kind == "IVON")


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_run_that_resumes_records_what_the_uninterrupted_one_does(tmp_path: Any, step: int) -> None:
    def run(path: Any, folder: Any, checkpoint: Any = None) -> Any:
        callback = SensitivityCallback(path)
        saving = {"save_strategy": "steps", "save_steps": 1}
        trainer(classifier(), folder, None, [callback], **saving).train(resume_from_checkpoint=checkpoint)
        return callback.recorder.record

    whole = run(tmp_path / "whole", tmp_path / "one")
    run(tmp_path / "part", tmp_path / "two")
    part = run(tmp_path / "part", tmp_path / "two", str(tmp_path / "two" / f"checkpoint-{step}"))
    for name in ("loss", "margin", "count"):
        np.testing.assert_allclose(part.column(name), whole.column(name), rtol=1e-6)
        np.testing.assert_allclose(part.memory.column(name), whole.memory.column(name), rtol=1e-6)
    np.testing.assert_array_equal(part.memory.steps, whole.memory.steps)


def test_a_language_models_labels_are_shifted_as_its_loss_does(tmp_path: Any) -> None:
    labels = TOKENS.clone()
    labels[:, :2] = -100
    labels[3, :4] = -100
    callback = SensitivityCallback(tmp_path / "run", sweeps=3)
    made = trainer(language_model(), tmp_path, Items(labels), [callback])
    made.train()

    def loss_of(z: Tensor, n: int) -> Tensor:
        return F.cross_entropy(z[:-1], labels[n, 1:])

    record = callback.recorder.record
    assert_recorded(record, made.seen, loss_of)
    assert record.memory.kinds.tolist() == ["live", "live", "live", "sweep"]
    model = made.model.eval()
    with torch.no_grad():
        expected = [float(loss_of(model(TOKENS[n : n + 1]).logits[0], n)) for n in range(N)]
    np.testing.assert_allclose(record.memory.column("loss")[-1], expected, rtol=1e-4)


def test_the_labels_of_tokens_are_not_shifted_where_the_loss_does_not(tmp_path: Any) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, C, (N, T))
    config = classifier().config
    model = transformers.DistilBertForTokenClassification(config)
    callback = SensitivityCallback(tmp_path / "run")
    made = trainer(model, tmp_path, Items(labels), [callback])
    made.train()
    assert_recorded(callback.recorder.record, made.seen, lambda z, n: F.cross_entropy(z, labels[n]))


def test_tokens_as_many_as_there_are_classes_are_recorded_and_swept(tmp_path: Any) -> None:
    labels = torch.randint(0, T, (N, T), generator=GENERATOR)
    labels[:, -1] = -100
    config = classifier().config
    config.num_labels = T
    model = transformers.DistilBertForTokenClassification(config)
    callback = SensitivityCallback(tmp_path / "run", sweeps=3)
    made = trainer(model, tmp_path, Items(labels), [callback])
    made.train()
    record = callback.recorder.record
    assert_recorded(record, made.seen, lambda z, n: F.cross_entropy(z, labels[n]))
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(TOKENS).logits.movedim(2, 1), labels, reduction="none").sum(1)
    np.testing.assert_allclose(record.memory.column("loss")[-1], expected / (T - 1), rtol=1e-4)


def test_several_labels_and_regressions_have_their_own_loss(tmp_path: Any) -> None:
    many = (torch.rand(N, C, generator=GENERATOR) > 0.5).float()
    callback = SensitivityCallback(tmp_path / "many", sweeps=3)
    made = trainer(classifier(), tmp_path, Items(many), [callback])
    made.train()
    assert_recorded(callback.recorder.record, made.seen, lambda z, n: F.binary_cross_entropy_with_logits(z, many[n]))
    numbers = torch.randn(N, generator=GENERATOR)
    config = classifier().config
    config.num_labels = 1
    callback = SensitivityCallback(tmp_path / "one", sweeps=3)
    made = trainer(transformers.DistilBertForSequenceClassification(config), tmp_path, Items(numbers), [callback])
    made.train()
    assert_recorded(callback.recorder.record, made.seen, lambda z, n: (z[0] - numbers[n]) ** 2)
    assert callback.recorder.record.memory.kinds[-1] == "sweep"


def test_labels_that_the_loop_takes_out_are_recorded_all_the_same(tmp_path: Any) -> None:
    callback = SensitivityCallback(tmp_path / "run")
    made = trainer(classifier(), tmp_path, None, [callback], label_smoothing_factor=0.1)
    made.train()
    assert_recorded(callback.recorder.record, made.seen)


def test_a_stream_is_recorded_by_its_key(tmp_path: Any) -> None:
    callback = SensitivityCallback(tmp_path / "run", key="row", num_data=N)
    made = trainer(classifier(), tmp_path, Stream(), [callback], max_steps=15)
    made.train()
    assert_recorded(callback.recorder.record, made.seen)


class TestDatasets:
    """Of the `datasets` library, whose unused columns the Trainer removes before it makes its loader."""

    @pytest.fixture
    def data(self) -> Any:
        datasets = pytest.importorskip("datasets")
        rows = {"input_ids": TOKENS.tolist(), "label": LABELS.tolist(), "idx": list(range(N)), "text": ["a"] * N}
        return datasets.Dataset.from_dict(rows)

    def test_places_are_the_numbers(self, data: Any, tmp_path: Any) -> None:
        callback = SensitivityCallback(tmp_path / "run")
        made = trainer(classifier(), tmp_path, data, [callback])
        made.train()
        assert_recorded(callback.recorder.record, made.seen)

    def test_a_column_that_is_removed_still_numbers_the_examples(self, data: Any, tmp_path: Any) -> None:
        part = data.shuffle(seed=3).select(range(9))
        callback = SensitivityCallback(tmp_path / "run", dataset=part, key="idx", num_data=N, sweeps=3)
        made = trainer(classifier(), tmp_path, part, [callback])
        made.train()
        record = callback.recorder.record
        assert_recorded(record, made.seen)
        assert set(np.flatnonzero(np.isfinite(record.memory.column("loss")[-1]))) == set(part["idx"])

    def test_the_whole_dataset_may_be_named(self, data: Any, tmp_path: Any) -> None:
        callback = SensitivityCallback(tmp_path / "run", dataset=data)
        made = trainer(classifier(), tmp_path, data, [callback])
        made.train()
        assert_recorded(callback.recorder.record, made.seen)


def test_the_summary_goes_to_the_trainers_own_logs(tmp_path: Any) -> None:
    callback = SensitivityCallback(tmp_path / "run", sweeps=2)
    made = trainer(classifier(), tmp_path, None, [callback])
    made.train()
    entries = [entry for entry in made.state.log_history if "vlearn/loss" in entry]
    assert [entry["step"] for entry in entries] == [5, 10, 15]
    assert entries[-1]["vlearn/loss"] == pytest.approx(callback.recorder.record.column("loss").mean())
    assert "vlearn/sweep_loo_loss" in entries[1]

    class Reporter(transformers.TrainerCallback):
        logged: list[Any] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            self.logged.append(dict(logs))

    made = trainer(classifier(), tmp_path, None, [Reporter()])
    made.add_callback(SensitivityCallback(tmp_path / "other", logger=made))
    made.train()
    assert len([entry for entry in Reporter.logged if "vlearn/loss" in entry]) == 3


def test_batches_without_labels_are_refused(tmp_path: Any) -> None:
    callback = SensitivityCallback(tmp_path / "run")
    made = trainer(classifier(), tmp_path, Items(name="attention_mask"), [callback])
    with pytest.raises(ValueError, match="without 'labels': give targets="):
        made.train()


def test_a_checkpoint_without_a_record_is_refused_where_the_record_goes_further(tmp_path: Any) -> None:
    trainer(classifier(), tmp_path, save_strategy="epoch").train()
    trainer(classifier(), tmp_path / "other", None, [SensitivityCallback(tmp_path / "run")]).train()
    made = trainer(classifier(), tmp_path, None, [SensitivityCallback(tmp_path / "run")])
    with pytest.raises(ValueError, match="has a record up to step 15, but training goes on at step 5"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_it_is_imported_only_when_it_is_asked_for() -> None:
    code = "import sys, vlearn.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert issubclass(SensitivityCallback, transformers.TrainerCallback)
