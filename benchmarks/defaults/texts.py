"""Tasks on the text of tinyshakespeare."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defaults.task import IGNORED, Task, class_loss
from benchmarks.problems.networks import LanguageModel
from benchmarks.training.checkpoint import kept

LENGTH = 64  # characters of a sequence
PRETRAINING = 1_500  # steps
WORDS = 2_000  # of the vocabulary; all others are one
TENTHS = 10  # parts of the text, nearly its plays


def gpt(root: Path) -> Task:
    """GPT-2's architecture with two blocks of width 64, on characters."""
    vocabulary, halves = characters(root)
    return _language_task(lambda: LanguageModel(vocabulary, LENGTH, 64, 2), halves)


def gru(root: Path) -> Task:
    """One GRU of width 128 on characters."""
    vocabulary, halves = characters(root)
    return _language_task(lambda: Recurrent(vocabulary, 128), halves)


def bert(root: Path) -> Task:
    """BERT's classifier with two layers of width 64, from scratch: which tenth of the text 32 words are from."""

    def build() -> nn.Module:
        import transformers

        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=WORDS,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=256,
                max_position_embeddings=32,
                num_labels=TENTHS,
            )
        )

    x = words(root).unfold(0, 32, 16).contiguous()
    y = torch.arange(len(x)) * TENTHS // len(x)
    # Whole stretches are held out, so that no word of a validation passage was trained on.
    held_out = torch.arange(len(x)) // 20 % 8 == 7
    trained_on = ~held_out & ~held_out.roll(1) & ~held_out.roll(-1)
    halves = x[trained_on], y[trained_on], x[held_out], y[held_out]
    return Task(build, *halves, class_loss, batch=32, epochs=4, outputs=lambda output: output.logits)


def embedding(root: Path) -> Task:
    """Embeddings of 16 words that know another 16, eight of them the same, among those of the batch (InfoNCE)."""
    passages = words(root).unfold(0, 24, 24)
    pairs = torch.stack([passages[:, :16], passages[:, 8:]], 1)
    cut = len(pairs) * 9 // 10
    halves = pairs[:cut], torch.zeros(cut), pairs[cut:], torch.zeros(len(pairs) - cut)
    return Task(lambda: Encoder(WORDS, 64), *halves, contrastive_loss, batch=64, epochs=5, classifies=False)


def lora(root: Path, runs: Path) -> Task:
    """Low-rank adapters of a GPT-2 that was trained on the text: to repeat a line in capitals."""
    vocabulary, halves = characters(root)

    def build() -> nn.Module:
        import peft

        model = _pretrained(vocabulary, halves[0], runs / "pretrained.pt")
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        return peft.get_peft_model(model, config)

    x, y = _capitals(root)
    cut = len(x) * 9 // 10
    return Task(
        build, x[:cut], y[:cut], x[cut:], y[cut:], class_loss, batch=16, epochs=2, outputs=lambda output: output.logits
    )


def text(root: Path) -> str:
    """All of it."""
    return (root / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")


def characters(root: Path) -> tuple[int, tuple[Tensor, Tensor]]:
    """The number of characters, and the first nine tenths of the text and the last as their numbers."""
    known = sorted(set(text(root)))
    numbers = {character: i for i, character in enumerate(known)}
    encoded = torch.tensor([numbers[character] for character in text(root)])
    cut = len(encoded) * 9 // 10
    return len(known), (encoded[:cut], encoded[cut:])


def words(root: Path) -> Tensor:
    """The text as the numbers of its words and marks; 0 is every rare one."""
    found = re.findall(r"[a-z']+|[^\sa-z']", text(root).lower())
    known = {word: i for i, (word, _) in enumerate(Counter(found).most_common(WORDS - 1), 1)}
    return torch.tensor([known.get(word, 0) for word in found])


def _language_task(build: Callable[[], nn.Module], halves: tuple[Tensor, Tensor]) -> Task:
    """To predict the next character, in an epoch."""
    return Task(build, *_windows(halves), class_loss, batch=16, epochs=1, other_source=True)


def _windows(halves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences and their next characters, one after another without overlap; 512 of the second half."""
    (x, y), (x_val, y_val) = (
        (half[: len(half) // LENGTH * LENGTH - LENGTH], half[1 : len(half) // LENGTH * LENGTH - LENGTH + 1])
        for half in halves
    )
    x, y, x_val, y_val = (each.unflatten(0, (-1, LENGTH)) for each in (x, y, x_val, y_val))
    return x, y, x_val[:512], y_val[:512]


def _capitals(root: Path) -> tuple[Tensor, Tensor]:
    """Sequences "line, line break, LINE, line break" and the targets of what comes after the first line break."""
    numbers = {character: i for i, character in enumerate(sorted(set(text(root))))}
    lines = [line for line in dict.fromkeys(text(root).split("\n")) if 8 <= len(line) <= 28][:4_000]
    x = torch.full((len(lines), LENGTH), numbers["\n"])
    y = torch.full((len(lines), LENGTH), IGNORED)
    for i, line in enumerate(lines):
        encoded = torch.tensor([numbers[character] for character in f"{line}\n{line.upper()}\n"])
        x[i, : len(encoded)] = encoded
        y[i, len(line) : len(encoded) - 1] = encoded[len(line) + 1 :]
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[shuffled], y[shuffled]


def _pretrained(vocabulary: int, encoded: Tensor, file: Path) -> nn.Module:
    """A GPT-2 of four layers of width 128 after 1,500 steps of AdamW on the characters, kept in a file."""
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocabulary, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4)
    )

    def train() -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            fresh = transformers.GPT2LMHeadModel(model.config)
            optimizer = torch.optim.AdamW(fresh.parameters(), lr=2e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING)
            for _ in range(PRETRAINING):
                at = torch.randint(len(encoded) - LENGTH - 1, (24, 1)) + torch.arange(LENGTH + 1)
                window = encoded[at]
                optimizer.zero_grad()
                class_loss(fresh(window[:, :-1]).logits, window[:, 1:]).backward()
                optimizer.step()
                schedule.step()
        return fresh.state_dict()

    model.load_state_dict(kept(file, {"steps": PRETRAINING}, train))
    return model


def contrastive_loss(output: Tensor, _: Tensor) -> Tensor:
    """InfoNCE at a temperature of .1: ``[N, 2, D]`` embeddings, each first against all second ones."""
    first, second = F.normalize(output, dim=-1).unbind(1)
    return F.cross_entropy(first @ second.mT / 0.1, torch.arange(len(output)))


class Recurrent(nn.Module):
    """Characters ``[N, T]`` -> logits ``[N, T, vocabulary]``."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 64)
        self.gru = nn.GRU(64, width, batch_first=True)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(self.tokens(x))[0])


class Encoder(nn.Module):
    """Pairs of passages ``[N, 2, T]`` -> embeddings ``[N, 2, width]``, by one transformer layer and a mean."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.out = nn.Linear(width, width)

    def forward(self, pairs: Tensor) -> Tensor:
        encoded = self.layer(self.tokens(pairs.flatten(0, 1)))
        return self.out(encoded.mean(1)).unflatten(0, (-1, 2))
