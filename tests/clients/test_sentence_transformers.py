"""sentence-transformers: a trainer around a loss module that calls the encoder once for each column of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.clients.problem import EXTRA, SeenWeights, self_influence
from tests.optim.table import equal, states, weights
from tests.oracles.per_example import relative_error

pytest.importorskip("sentence_transformers", reason=EXTRA)
datasets = pytest.importorskip("datasets", reason=EXTRA)
import transformers  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()

COLORS, ANIMALS = ["red", "blue", "green", "black"], ["cat", "dog", "bird", "horse"]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLORS, *ANIMALS]
PAIRS = [(a, b) for a in COLORS + ANIMALS for b in COLORS + ANIMALS if a != b]
ALIKE = [float((a in COLORS) == (b in COLORS)) for a, b in PAIRS]  # 1 if both are colours or both animals
SETTINGS = {"lr": 0.1, "ess": 1e4, "hess_init": 0.1}


def encoder(folder: Any) -> SentenceTransformer:
    """An untrained BERT of one layer over the words, with the mean of its tokens."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizer(vocab={token: i for i, token in enumerate(TOKENS)}).save_pretrained(folder)
    word = modules.Transformer(str(folder))
    return SentenceTransformer(modules=[word, modules.Pooling(word.get_embedding_dimension())], device="cpu")


class Similarity(nn.Module):
    """The cosine of the two sentences of each pair ``[N]``."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model

    def forward(self, left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
        return torch.cosine_similarity(*(self.model(each)["sentence_embedding"] for each in (left, right)))


class SquaredError(nn.Module):
    """`losses.CosineSimilarityLoss`, with the output of each example in a module of its own."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.similarity = Similarity(model)
        self.given: list[Any] = []

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        self.given = [*([{**each} for each in features]), labels]
        return F.mse_loss(self.similarity(*features), labels)


def trainer(
    model: Any,
    loss: nn.Module,
    folder: Any,
    labels: bool = True,
    optimizer: Any = None,
    line: Any = (vlearn.IVON, SETTINGS),
    **settings: Any,
) -> Any:
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=14,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="epoch",
        lr_scheduler_type="constant",
        **{"num_train_epochs": 1, "save_strategy": "no", **settings},
    )
    columns: dict[str, Any] = {"left": [a for a, _ in PAIRS], "right": [b for _, b in PAIRS]}
    if labels:
        columns["score"] = ALIKE
    made = {"optimizer_cls_and_kwargs": line} if optimizer is None else {"optimizers": (optimizer, None)}
    data = datasets.Dataset.from_dict(columns)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss, **made)


def history(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


LINES = [(vlearn.IVON, SETTINGS), (vlearn.VAdamW, {"lr": 0.003, "num_data": len(PAIRS)})]
LINES += [(vlearn.EVON, {"lr": 3.0, "ess": 1e4, "num_data": len(PAIRS)})]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0].__name__)
def test_a_class_and_its_keyword_arguments_train(line: Any, tmp_path: Any) -> None:
    model = encoder(tmp_path / "encoder")
    run = trainer(
        model,
        losses.CosineSimilarityLoss(model),
        tmp_path / "run",
        num_train_epochs=20,
        line=line,
        learning_rate=line[1]["lr"],
    )
    run.train()
    loss = history(run)
    assert loss[0] > 0.3 and loss[-1] < 0.1
    red, blue, cat = (model.encode(word, convert_to_tensor=True) for word in ("red", "blue", "cat"))
    assert torch.cosine_similarity(red, blue, 0) > torch.cosine_similarity(red, cat, 0) + 0.5
    with pytest.raises(RuntimeError, match="needs a watched model"):
        run.optimizer.optimizer.sensitivities()


def test_the_rows_of_pairs_are_the_oracle_s(tmp_path: Any) -> None:
    """Both columns go through the encoder in one forward pass of a module, which is the one to watch."""
    model = encoder(tmp_path / "encoder")
    loss = SquaredError(model)
    seen = SeenWeights(loss.similarity)
    optimizer = vlearn.IVON(loss.similarity, **SETTINGS)
    trainer(model, loss, tmp_path / "run", optimizer=optimizer, max_steps=2).train()
    left, right, labels = loss.given
    truth = self_influence(
        loss.similarity,
        seen.by_name,
        optimizer.posterior().variance,
        lambda twin: twin(dict(left), dict(right)),
        lambda output: (output - labels.double()).square(),
    )
    rows = optimizer.sensitivities()
    assert rows.step == 2 and len(truth) == 14
    assert relative_error(rows.self_influence.double(), truth) < 1e-4


def test_two_forward_passes_of_the_encoder_are_refused(tmp_path: Any) -> None:
    model = encoder(tmp_path / "encoder")
    optimizer = vlearn.IVON(model, **SETTINGS)
    trainer(model, losses.CosineSimilarityLoss(model), tmp_path / "run", optimizer=optimizer, max_steps=1).train()
    with pytest.raises(RuntimeError, match="two training forward passes came before one backward pass"):
        optimizer.sensitivities()


def test_a_loss_over_the_batch_trains_and_its_rows_are_refused(tmp_path: Any) -> None:
    model = encoder(tmp_path / "encoder")
    loss = losses.MultipleNegativesRankingLoss(model)
    optimizer = vlearn.IVON(loss, **SETTINGS)
    run = trainer(model, loss, tmp_path / "run", labels=False, optimizer=optimizer, num_train_epochs=10)
    run.train()
    assert history(run)[-1] < history(run)[0]
    with pytest.raises(ValueError, match="the model gives the loss alone, and no output with a row for each example"):
        optimizer.sensitivities()


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Any) -> None:
    def run(resume: Any = None) -> Any:
        model = encoder(tmp_path / "encoder")
        settings = {"num_train_epochs": 2, "save_strategy": "epoch"}
        run = trainer(model, losses.CosineSimilarityLoss(model), tmp_path / "run", **settings)
        run.train(resume_from_checkpoint=resume)
        return run

    whole = run()
    resumed = run(str(tmp_path / "run" / "checkpoint-4"))
    assert equal(weights(resumed.model), weights(whole.model))
    assert equal(states(resumed.optimizer.optimizer), states(whole.optimizer.optimizer))
    saved = SentenceTransformer(str(tmp_path / "run" / "checkpoint-8"), device="cpu")
    assert equal(weights(saved), weights(whole.model))
