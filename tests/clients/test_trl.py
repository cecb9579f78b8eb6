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
LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "task_type": "CAUSAL_LM"}


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
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def trainer(model: Any, folder: Any, optimizer: Any = None, kind: Any = trl.SFTTrainer, **settings: Any) -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own = {name: settings.pop(name) for name in ("peft_config",) if name in settings}
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
        learning_rate=SETTINGS["lr"],
        **{"num_train_epochs": 1, "save_strategy": "no", **settings},
    )
    made = {"optimizer_cls_and_kwargs": (vlearn.IVON, SETTINGS)} if optimizer is None else {"optimizers": (optimizer, None)}
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


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "LoRA"])
def test_a_class_and_its_keyword_arguments_train(adapters: bool, tmp_path: Any) -> None:
    model = language_model()
    own = {"peft_config": LoraConfig(**LORA)} if adapters else {}
    run = trainer(model, tmp_path, num_train_epochs=20, **own)
    run.train()
    loss = history(run)
    print(loss)
    assert loss[0] > 2 and loss[-1] < (2.4 if adapters else 1)
    assert run.optimizer.optimizer.num_data == 1e4
