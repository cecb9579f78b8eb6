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


def lenet5() -> nn.Sequential:
    """61,706 parameters, as in the memory-perturbation paper."""
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
    """For 8x8 images; 1,898 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(first, second, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * second, 10),
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


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "lenet5": lenet5,
    "digits_cnn": digits_cnn,
    "resnet20_frn": resnet20_frn,
    "mlp_500_300": lambda: mlp(784, 500, 300, 10),
    "mlp_32_16": lambda: mlp(784, 32, 16, 10),
}


def build(name: str) -> nn.Sequential:
    """A network by name; its weights come from torch's global generator."""
    return NETWORKS[name]()
