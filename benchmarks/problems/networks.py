"""The networks of the benchmarks, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def relu_mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them, on flat inputs."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet5() -> nn.Sequential:
    """LeNet-5 with 61,706 parameters, as in the memory-perturbation paper."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(16, 120, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


def digits_cnn(first: int = 8, second: int = 16) -> nn.Sequential:
    """A small CNN for 8x8 images, by default with 1,898 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(first, second, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * second, 10),
    )


def convnet(channels: int = 16) -> nn.Sequential:
    """Three convolutions for colour images of any size, averaged over their positions."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )


def cifar_cnn() -> nn.Sequential:
    """Three convolutions and a hidden layer for 32x32 colour images, with 357,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2048, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class FilterResponseNorm(nn.Module):
    """γ x/√(mean x² + ε) + β, then max(·, τ) (Singh, Krishnan, 2020, arXiv:1911.09737): no example sees another."""

    def __init__(self, channels: int, epsilon: float = 1e-6):
        super().__init__()
        self.epsilon = epsilon
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1))
        self.tau = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean((2, 3), keepdim=True) + self.epsilon).rsqrt()
        return torch.maximum(self.gamma * (x * scale) + self.beta, self.tau)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside the parameter-free shortcut of the CIFAR networks (He et al., 2016)."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.first_norm = FilterResponseNorm(out_channels)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.second_norm = FilterResponseNorm(out_channels)
        self.stride, self.wider = stride, out_channels - channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(self.first_norm(self.first(x))))
        # Subsampled, and the new channels zero.
        return y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.wider))


def resnet20_frn() -> nn.Sequential:
    """ResNet-20 for 32x32 colour images with filter response normalisation."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), FilterResponseNorm(16)]
    channels = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(3):
            layers.append(ResidualBlock(channels, width, stride if block == 0 else 1))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with group norms, beside a shortcut (He et al., 2016; Wu, He, 2018)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()

        def convolution(fan_in: int, fan_out: int, size: int, stride: int = 1) -> nn.Sequential:
            kernel = nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False)
            return nn.Sequential(kernel, nn.GroupNorm(min(32, fan_out), fan_out))

        self.first, self.second = convolution(channels, width, 1), convolution(width, width, 3, stride)
        self.third = convolution(width, 4 * width, 1)
        same = stride == 1 and channels == 4 * width
        self.shortcut = nn.Identity() if same else convolution(channels, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(F.relu(self.second(F.relu(self.first(x)))))
        return F.relu(y + self.shortcut(x))


def resnet50_group_norm(width: int = 64, classes: int = 1000) -> nn.Sequential:
    """ResNet-50 with group norm in the place of batch norm: no example sees another."""
    stem = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
    layers: list[nn.Module] = [stem, nn.GroupNorm(min(32, width), width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    channels = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width << stage, 2 if stage and not block else 1))
            channels = 4 * width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class CausalBlock(nn.Module):
    """Causal self-attention and two linear layers, each after a layer norm and beside a shortcut."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(features), nn.LayerNorm(features)
        self.attention_in = nn.Linear(features, 3 * features)
        self.attention_out = nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        parts = self.attention_in(self.attention_norm(x)).chunk(3, -1)
        q, k, v = (part.reshape(n, t, self.heads, -1).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(n, t, d))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """GPT-2's architecture, embedding and output layer tied: tokens ``[N, T]`` -> logits ``[N, T, vocabulary]``."""

    def __init__(self, vocabulary: int = 256, length: int = 64, features: int = 128, layers: int = 5, heads: int = 4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, features), nn.Embedding(length, features)
        self.blocks = nn.Sequential(*(CausalBlock(features, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(features)
        self.out = nn.Linear(features, vocabulary, bias=False)
        self.out.weight = self.tokens.weight
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        return self.out(self.norm(self.blocks(self.tokens(x) + self.positions(positions))))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "lenet5": lenet5,
    "digits_cnn": digits_cnn,
    "cifar_cnn": cifar_cnn,
    "resnet20_frn": resnet20_frn,
    "mlp_500_300": lambda: mlp(784, 500, 300, 10),
    "mlp_32_16": lambda: mlp(784, 32, 16, 10),
    "mlp_64_16": lambda: mlp(64, 16, 10),
}


def build(name: str) -> nn.Sequential:
    """A network by name; its weights come from torch's global generator."""
    return NETWORKS[name]()
