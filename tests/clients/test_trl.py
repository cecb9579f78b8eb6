"""TRL's SFTTrainer: its own collator, its own loss of log-probabilities, and adapters that it makes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vlearn
from tests.clients.problem import EXTRA, SeenWeights, self_influence
from tests.optim.table import equal, states, weights
from tests.oracles.per_example import relative_error

trl = pytest.importorskip("trl", reason=EXTRA)
datasets = pytest.importorskip("datasets", reason=EXTRA)
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated"),
]
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()

WORDS = [f"w{i}" for i in range(12)]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
# Each word is followed by the next; texts of different lengths.
TEXTS = [" ".join(WORDS[(start + k) % 12] for k in range(4 + start % 4)) for start in range(24)]
SETTINGS = {"lr": 0.1, "ess": 1e4, "hess_init": 0.1}
LORA = {"target_modules": "all-linear", "r": 8, "task_type": "CAUSAL_LM"}


def language_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def trainer(model: Any, folder: Any, optimizer: Any = None, kind: Any = trl.SFTTrainer, **settings: Any) -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own = {name: settings.pop(name) for name in ("peft_config",) if name in settings}
    line = settings.pop("line", (vlearn.IVON, SETTINGS))
    arguments = trl.SFTConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=6,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="epoch",
        lr_scheduler_type="constant",
        learning_rate=line[1]["lr"],
        **{"num_train_epochs": 1, "save_strategy": "no", **settings},
    )
    made = {"optimizer_cls_and_kwargs": line} if optimizer is None else {"optimizers": (optimizer, None)}
    return kind(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
        **made,
        **own,
    )


def history(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


LINES = [(vlearn.IVON, SETTINGS), (vlearn.VAdamW, {"lr": 0.01, "num_data": 24})]
LINES += [(vlearn.EVON, {"lr": 10.0, "ess": 1e4, "num_data": 24})]


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0].__name__)
def test_a_class_and_its_keyword_arguments_train(line: Any, adapters: bool, tmp_path: Any) -> None:
    own = {"peft_config": LoraConfig(**LORA)} if adapters else {}
    run = trainer(language_model(), tmp_path, num_train_epochs=20, line=line, **own)
    run.train()
    loss = history(run)
    assert loss[0] > 2 and loss[-1] < (0.8 if adapters else 0.4) * loss[0]
    moved = [name for name, p in run.model.named_parameters() if p in run.optimizer.optimizer.state]
    assert all("lora" in name for name in moved) == adapters


class Reading(trl.SFTTrainer):
    """Reads the rows of every micro-batch, and notes what they are to be compared with."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.items = int(num_items_in_batch)
        given = {name: value.clone() for name, value in inputs.items()}
        loss = super().training_step(model, inputs, num_items_in_batch)
        own = self.optimizer.optimizer
        self.at = dict(self.seen.by_name), own.posterior().clone().variance, given
        self.rows = own.sensitivities()
        return loss


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_rows_are_those_of_each_text_s_summed_loss(adapters: bool, parts: int, tmp_path: Any) -> None:
    """The trainer divides by the tokens of a step outside the model, so its user has to tell."""
    model = language_model()
    if adapters:
        model = get_peft_model(model, LoraConfig(**LORA))
    optimizer = vlearn.IVON(model, **SETTINGS)
    run = trainer(model, tmp_path, optimizer, Reading, max_steps=2, gradient_accumulation_steps=parts)
    optimizer.watch(model, loss_reduction=lambda: run.items)
    run.seen = SeenWeights(model)
    run.train()
    weights_then, variance, given = run.at
    truth = of_texts(run.model, weights_then, variance, given, lambda losses, counted: losses.sum(1))
    assert run.rows.step == 2 and len(truth) == 6
    assert relative_error(run.rows.self_influence.double(), truth) < 1e-4


def of_texts(model: Any, seen: Any, variance: Any, given: Any, own: Any) -> Tensor:
    """`self_influence` of what `own` makes of the tokens' losses ``[N, T]`` and of which of them count."""
    plain, labels = language_model(), given["labels"][:, 1:]
    if hasattr(model, "peft_config"):
        plain = get_peft_model(plain, LoraConfig(**LORA))
    counted = labels != -100

    def losses(logits: Tensor) -> Tensor:
        return own(-log_probabilities(logits, labels.clamp(min=0)) * counted, counted)

    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    return self_influence(plain, seen, variance, lambda twin: twin(**inputs, use_cache=False).logits[:, :-1], losses)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def test_untold_it_is_the_mean_over_the_tokens_that_count_and_accumulation_is_warned_of(tmp_path: Any) -> None:
    model = language_model()
    run = trainer(model, tmp_path, vlearn.IVON(model, **SETTINGS), Reading, max_steps=1)
    run.seen = SeenWeights(model)
    run.train()
    truth = of_texts(run.model, *run.at, lambda losses, counted: losses.mean(1))
    assert relative_error(run.rows.self_influence.double(), truth) < 1e-4
    model = language_model()
    run = trainer(model, tmp_path, vlearn.IVON(model, **SETTINGS), Reading, max_steps=1, gradient_accumulation_steps=2)
    run.seen = SeenWeights(model)
    with pytest.warns(UserWarning, match="the loss is .* times the mean of the output of the batch"):
        run.train()


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Any) -> None:
    def run(resume: Any = None) -> Any:
        run = trainer(language_model(), tmp_path, num_train_epochs=2, save_strategy="epoch")
        run.train(resume_from_checkpoint=resume)
        return run

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-4"))
    assert equal(weights(resumed.model), weights(whole.model))
    assert equal(states(resumed.optimizer.optimizer), states(whole.optimizer.optimizer))
