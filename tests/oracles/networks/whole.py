"""Whole models as people train them, small: a table of kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.networks.case import EXAMPLES, Case, Model, case, labels, rows

WHOLE: list[str] = []


def whole(build: Callable[[], Case]) -> Callable[[], Case]:
    WHOLE.append(build.__name__)
    return case(build)


@whole
def classifier_of_features() -> Case:
    return Case(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), rows(5), labels()
    )


@whole
def regression_with_two_targets() -> Case:
    return Case(nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 2)), rows(5), rows(2), F.mse_loss)


@whole
def several_labels_at_once() -> Case:
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4))
    return Case(model, rows(5), (rows(4) > 0).double(), F.binary_cross_entropy_with_logits)


@whole
def lenet5() -> Case:
    """As LeCun et al. draw it, with fewer channels."""
    layers = [nn.Conv2d(1, 2, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 5), nn.Tanh(), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(3, 4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    return Case(nn.Sequential(*layers), rows(1, 28, 28), labels())


class FilterResponseNorm(nn.Module):
    """Filter response normalisation with its threshold (Singh and Krishnan, 2020, arXiv:1911.09737)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(1 + 0.3 * torch.randn(channels, 1, 1))
        self.shift = nn.Parameter(0.3 * torch.randn(channels, 1, 1))
        self.threshold = nn.Parameter(0.3 * torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        normalised = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-6)
        return torch.maximum(self.gain * normalised + self.shift, self.threshold)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters, which strides and pads channels."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            FilterResponseNorm(outputs),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            FilterResponseNorm(outputs),
        )
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return shortcut + self.body(x)


@whole
def resnet20_with_filter_response_norm() -> Case:
    channels, layers = 1, [nn.Conv2d(2, 1, 3, 1, 1, bias=False), FilterResponseNorm(1)]
    for width, stride in ((1, 1), (2, 2), (4, 2)):
        for first in (True, False, False):
            layers.append(Residual(channels, width, stride if first else 1))
            channels = width
    return Case(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), rows(2, 8, 8), labels())


@whole
def convolutions_with_group_norm() -> Case:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(inplace=True)]
    return Case(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), rows(2, 6, 6), labels())


@whole
def depthwise_separable_convolutions() -> Case:
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.SiLU()]
    layers += [nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.SiLU(), nn.Conv2d(4, 6, 1), nn.SiLU()]
    return Case(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), rows(2, 8, 8), labels())


@whole
def convolutions_along_time() -> Case:
    layers = [nn.Conv1d(2, 4, 5, stride=2, padding=2), nn.LayerNorm(6), nn.GELU(), nn.Conv1d(4, 4, 3, dilation=2)]
    return Case(nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)), rows(2, 12), labels())


class CausalBlock(nn.Module):
    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(features), nn.LayerNorm(features)
        self.queries_keys_values, self.mix = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        parts = self.queries_keys_values(self.before_attention(x)).chunk(3, -1)
        q, k, v = (part.reshape(n, t, self.heads, -1).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d)
        x = x + self.mix(attended)
        return x + self.mlp(self.before_mlp(x))


def _next_token(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction=reduction)


def _language_model(words: int = 5, length: int = 3, features: int = 4) -> nn.Module:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        x = m.words(tokens) + m.places(torch.arange(tokens.shape[1]))
        return m.out(m.norm(m.blocks(m.dropout(x))))

    parts = {
        "words": nn.Embedding(words, features),
        "places": nn.Embedding(length, features),
        "dropout": nn.Dropout(0.0),
        "blocks": nn.Sequential(CausalBlock(features, 2), CausalBlock(features, 1)),
        "norm": nn.LayerNorm(features),
        "out": nn.Linear(features, words, bias=False),
    }
    model = Model(forward, **parts)
    model.out.weight = model.words.weight
    return model


@whole
def language_model_with_tied_embeddings() -> Case:
    return Case(_language_model(), torch.randint(5, (EXAMPLES, 3)), torch.randint(5, (EXAMPLES, 3)), _next_token)


@whole
def encoder_of_torch_nn() -> Case:
    """As BERT's: tokens with padding, segments, a first token that is read."""

    def forward(m: Any, *, tokens: Tensor, segments: Tensor) -> Tensor:
        x = m.norm(m.words(tokens) + m.places + m.segments(segments))
        return m.out(m.encoder(x, src_key_padding_mask=tokens == 0)[:, 0])

    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, activation="gelu", batch_first=True)
    parts = {
        "words": nn.Embedding(6, 4, padding_idx=0),
        "segments": nn.Embedding(2, 4),
        "norm": nn.LayerNorm(4),
        "encoder": nn.TransformerEncoder(layer, 2),
        "out": nn.Linear(4, 3),
    }
    model = Model(forward, **parts)
    model.places = nn.Parameter(torch.randn(5, 4))
    tokens = torch.tensor([[1, 2, 3, 0, 0], [1, 5, 5, 4, 3], [1, 0, 0, 0, 0], [1, 4, 2, 3, 0]])
    return Case(model, {"tokens": tokens, "segments": torch.randint(2, tokens.shape)}, labels())


@whole
def classifier_of_sequences_by_gated_recurrence() -> Case:
    def forward(m: Any, tokens: Tensor) -> Tensor:
        states, _ = m.gru(m.words(tokens))
        return m.out(states[:, -1])

    parts = {"words": nn.Embedding(6, 3), "gru": nn.GRU(3, 4, batch_first=True), "out": nn.Linear(4, 3)}
    return Case(Model(forward, **parts), torch.randint(6, (EXAMPLES, 5)), labels())


@whole
def transformer_with_low_rank_adapters() -> Case:
    peft = pytest.importorskip("peft")
    names = ["queries_keys_values", "mlp.0"]
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names), _language_model())
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)  # else the second factor is zero, and so is the gradient of the first
    return Case(model, torch.randint(5, (EXAMPLES, 3)), torch.randint(5, (EXAMPLES, 3)), _next_token)
