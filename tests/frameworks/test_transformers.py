"""Hugging Face's Trainer and PEFT: a small language model, trained, evaluated, saved and resumed by their own loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import vlearn
from tests.frameworks.lines import LINES
from tests.optim.table import equal, weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
transformers.logging.set_verbosity_error()

TOKENS = torch.randint(0, 32, (12, 8), generator=torch.Generator().manual_seed(1))


class Texts(torch.utils.data.Dataset):
    """Sequences of different numbers of predicted tokens."""

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = TOKENS[i].clone()
        labels[: i % 5] = -100
        return {"input_ids": TOKENS[i], "labels": labels}


def language_model(**settings: Any) -> Any:
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2, use_cache=False, **{**dropouts, **settings}
    )
    return transformers.GPT2LMHeadModel(config)


def adapted(**settings: Any) -> Any:
    lora = LoraConfig(target_modules=["c_attn"], r=2, task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)
    return get_peft_model(language_model(), lora)


def ivon(params: Any, **settings: Any) -> vlearn.IVON:
    generator = torch.Generator().manual_seed(7)
    return vlearn.IVON(params, **{"lr": 0.1, "ess": 12, "hess_init": 0.5, "generator": generator, **settings})


class Trainer(transformers.Trainer):
    """Reads the sensitivities after every backward pass, and notes what they are to be compared with."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rows: list[Any] = []
        self.at: list[tuple[dict[str, Tensor], Any]] = []

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        optimizer: Any = self.optimizer
        if optimizer.optimizer._watch is not None:
            self.rows.append(optimizer.optimizer.sensitivities())
            values = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.at.append((values, optimizer.optimizer.posterior().clone().variance))
        return loss


def trainer(model: Any, optimizer: Any, folder: Any, kind: type = Trainer, **settings: Any) -> Any:
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        **{"num_train_epochs": 1, "max_grad_norm": 0.0, **quiet, **settings},
    )
    return kind(model, arguments, train_dataset=Texts(), eval_dataset=Texts(), optimizers=(optimizer, None))


def by_hand(
    model: Any,
    batches: list[list[list[int]]],
    parameters: bool = False,
    norm: float | None = None,
    make: Callable[[Any], Any] = ivon,
) -> None:
    """The Trainer's steps without it: the summed loss over the number of tokens of the whole step, its schedule."""
    optimizer = make(model.parameters() if parameters else model)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / len(batches))
    model.train()
    for step in batches:
        optimizer.zero_grad()
        parts = [torch.utils.data.default_collate([Texts()[i] for i in part]) for part in step]
        tokens = sum((part["labels"] != -100).sum() for part in parts)
        for part in parts:
            if parameters:
                optimizer.train()
            model(**part, num_items_in_batch=tokens).loss.backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        decay.step()


def in_order(parts: int) -> list[list[list[int]]]:
    """Indices of two examples per micro-batch, so many micro-batches per step."""
    pairs = [[i, i + 1] for i in range(0, len(TOKENS), 2)]
    return [pairs[i : i + parts] for i in range(0, len(pairs), parts)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("norm", [None, 0.05])
@pytest.mark.parametrize("what", ["watched", "parameters", "LoRA"])
def test_the_trainer_makes_the_steps_of_the_loop_by_hand(
    what: str, parts: int, norm: float | None, tmp_path: Any
) -> None:
    model, other = (adapted() if what == "LoRA" else language_model() for _ in range(2))
    optimizer = ivon(model.parameters() if what == "parameters" else model)
    settings = {"gradient_accumulation_steps": parts, "max_grad_norm": norm or 0.0}
    trainer(model, optimizer, tmp_path, train_sampling_strategy="sequential", **settings).train()
    by_hand(other, in_order(parts), what == "parameters", norm)
    assert equal(weights(model), weights(other))
    moved = [not torch.equal(p, q) for p, q in zip(weights(model), weights(adapted()), strict=False)]
    assert what != "LoRA" or sum(moved) == 4  # two adapters of two matrices


@pytest.mark.parametrize("line", list(LINES))
def test_every_line_makes_the_steps_of_the_loop_by_hand(line: str, tmp_path: Any) -> None:
    model, other = language_model(), language_model()
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    run = trainer(model, LINES[line](model), tmp_path, train_sampling_strategy="sequential", **settings)
    run.train()
    by_hand(other, in_order(2), norm=0.05, make=LINES[line])
    assert equal(weights(model), weights(other))
    assert all(bool((rows.self_influence > 0).all()) for rows in run.rows)


def test_the_trainer_may_make_the_optimizer_itself(tmp_path: Any) -> None:
    """It then has groups with and without weight decay, and is not watched: the Trainer calls train() and eval()."""
    model = language_model()
    chosen = (vlearn.IVON, {"lr": 0.1, "ess": 12})
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", num_train_epochs=1
    )
    run = transformers.Trainer(model, arguments, train_dataset=Texts(), optimizer_cls_and_kwargs=chosen)
    run.train()
    optimizer: Any = run.optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    assert not any(torch.equal(p, q) for p, q in zip(weights(model), weights(language_model()), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "scale", "callable", "bf16"])
@pytest.mark.parametrize("make", [language_model, adapted])
def test_sensitivities_are_of_each_text_s_summed_loss(make: Any, reduction: str, tmp_path: Any) -> None:
    """The Trainer divides by the tokens of all micro-batches of a step, not by the number of texts."""
    model = make()
    optimizer = ivon(model)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2, "train_sampling_strategy": "sequential"}
    run = trainer(model, optimizer, tmp_path, bf16=reduction == "bf16", **settings)
    if reduction == "callable":
        optimizer.watch(model, loss_reduction=lambda: sum(int((Texts()[i]["labels"] != -100).sum()) for i in step()))
    if reduction == "scale":
        optimizer.watch(model, loss_scale=1.0)
    step = lambda: range(4 * run.state.global_step, 4 * run.state.global_step + 4)  # noqa: E731
    run.train()
    own = make()
    own.train()
    for k, (row, (values, variance)) in enumerate(zip(run.rows, run.at, strict=True)):
        own.load_state_dict(values, strict=False)
        for i, influence in zip((2 * k, 2 * k + 1), row.self_influence, strict=True):
            own.zero_grad()
            text = {name: tensor[None] for name, tensor in Texts()[i].items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=reduction == "bf16"):
                loss = own(**text, num_items_in_batch=1).loss
            loss.backward()
            expected = sum((variance[n] * p.grad**2).sum() for n, p in own.named_parameters() if p.requires_grad)
            torch.testing.assert_close(influence, expected, rtol=0.05 if reduction == "bf16" else 1e-4, atol=0)
            own.zero_grad()
            logits = own(text["input_ids"]).logits
            logits.retain_grad()
            own.loss_function(logits, text["labels"], 32, num_items_in_batch=1).backward()
            close = {"rtol": 0.02, "atol": 0.02} if reduction == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(row.residual[i % 2], logits.grad[0], **close)


class Checks(transformers.TrainerCallback):
    """While a draw is in the weights, between the micro-batches of a step: what is saved or predicted is the mean."""

    def __init__(self, run: Any, folder: Any, load: Any):
        self.run, self.folder, self.load = run, folder, load
        self.active = 0

    def on_substep_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        mean = self.run.optimizer.optimizer.posterior().clone().mean
        drawn = [not torch.equal(p, mean[name]) for name, p in model.named_parameters() if name in mean]
        self.active += all(drawn)
        model.save_pretrained(self.folder)
        saved = self.load(self.folder)
        assert all(torch.equal(p, mean[name]) for name, p in saved.named_parameters() if name in mean)
        self.run.evaluate()


class Evaluating(Trainer):
    """Compares what evaluation predicts with a copy of the model at the mean."""

    reference: Any = None
    seen = 0

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        optimizer: Any = self.optimizer
        self.reference.load_state_dict({**optimizer.optimizer.posterior().mean}, strict=False)
        with torch.no_grad():
            assert torch.equal(logits, self.reference.eval()(inputs["input_ids"]).logits)
        self.seen += 1
        return loss, logits, labels


def loaded_adapter(folder: Any) -> Any:
    return PeftModel.from_pretrained(language_model(), folder)


@pytest.mark.parametrize("what", ["watched", "parameters", "LoRA"])
def test_evaluation_and_saved_weights_are_the_mean(what: str, tmp_path: Any) -> None:
    model, other, reference = (adapted() if what == "LoRA" else language_model() for _ in range(3))
    optimizer = ivon(model.named_parameters() if what == "parameters" else model)
    run = trainer(
        model,
        optimizer,
        tmp_path / "run",
        Evaluating,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=1,
    )
    run.reference = reference
    checks = Checks(run, tmp_path / "saved", loaded_adapter if what == "LoRA" else type(model).from_pretrained)
    if what != "parameters":
        run.add_callback(checks)
    run.train()
    assert (checks.active, run.seen) == ((0, 6) if what == "parameters" else (3, 12))
    by_hand(other, in_order(2), what == "parameters")
    assert equal(weights(model), weights(other))


@pytest.mark.parametrize("what", ["watched", "parameters", "LoRA", "checkpointed"])
def test_a_resumed_run_is_the_uninterrupted_one(what: str, tmp_path: Any) -> None:
    def run(resume: Any = None) -> tuple[Any, vlearn.IVON]:
        model = adapted() if what == "LoRA" else language_model(attn_pdrop=0.1)
        optimizer = ivon(model.parameters() if what == "parameters" else model, generator=None)
        settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        if what == "checkpointed":
            settings["activation_checkpointing"] = True
        trainer(model, optimizer, tmp_path, transformers.Trainer, **settings).train(resume_from_checkpoint=resume)
        return model, optimizer

    model, optimizer = run()
    other, again = run(str(tmp_path / "checkpoint-2"))
    assert equal(weights(model), weights(other))
    for p, q in zip(optimizer._parameters.trainable(), again._parameters.trainable(), strict=True):
        assert equal([*optimizer.state[p].values()], [*again.state[q].values()])
        assert optimizer.state[p]["step"] == 6


class Labelled(Texts):
    """Texts of one class each."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[i], "labels": torch.tensor(i % 3)}


class WithoutKeywords(nn.Module):
    """A model that the Trainer cannot tell what to divide by, so that it divides the loss itself."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.model(input_ids=input_ids, labels=labels)


def classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


@pytest.mark.parametrize("told", [False, True], ids=["ignores num_items_in_batch", "is not told it"])
def test_a_model_may_ignore_what_the_trainer_tells_it_to_divide_by(told: bool, tmp_path: Any) -> None:
    """Its loss is then the mean over its own texts, or that divided by the number of micro-batches."""
    model: Any = WithoutKeywords(classifier()) if told else classifier()
    optimizer = ivon(model)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 2, "train_sampling_strategy": "sequential"}
    run = trainer(model, optimizer, tmp_path, **settings)
    run.train_dataset = Labelled()
    if told:
        with pytest.warns(UserWarning, match=r"tell watch\(model, loss_scale=0.5\)"):
            run.train()
        optimizer.unwatch()
        optimizer = ivon(model)
        optimizer.watch(model, loss_scale=0.5)
        run = trainer(model, optimizer, tmp_path, **settings)
        run.train_dataset = Labelled()
    run.train()
    own: Any = WithoutKeywords(classifier()) if told else classifier()
    assert len(run.rows) == 4
    for k, (row, (values, variance)) in enumerate(zip(run.rows, run.at, strict=True)):
        own.load_state_dict(values)
        for i, influence in zip((2 * k, 2 * k + 1), row.self_influence, strict=True):
            own.zero_grad()
            text = {name: tensor[None] for name, tensor in Labelled()[i].items()}
            own(**text).loss.backward()
            expected = sum((variance[n] * p.grad**2).sum() for n, p in own.named_parameters())
            torch.testing.assert_close(influence, expected, rtol=1e-4, atol=0)
