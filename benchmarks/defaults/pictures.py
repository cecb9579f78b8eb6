"""Tasks on images."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.defaults.task import Task, class_loss
from benchmarks.problems import images
from benchmarks.problems.networks import lenet5

CANVAS = 48  # side of the images that are segmented
THINGS = 3  # garments on each


def lenet(root: Path) -> Task:
    """LeNet-5 on 10,000 images of Fashion-MNIST."""
    return Task(lenet5, *_first(root, "fashion-mnist", 10_000), class_loss, batch=64, epochs=10)


def vit(root: Path) -> Task:
    """timm's vision transformer, narrow, on 10,000 images of Fashion-MNIST."""

    def build() -> nn.Module:
        import timm

        shape = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
        return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **shape)

    return Task(build, *_first(root, "fashion-mnist", 10_000), class_loss, batch=64, epochs=6)


def resnet(root: Path) -> Task:
    """A residual network with GroupNorm on the 10,000 first images of CIFAR-10, unaugmented."""
    return Task(lambda: ResNet(16), *_first(root, "cifar-10", 10_000), class_loss, batch=64, epochs=6)


def unet(root: Path) -> Task:
    """Which garment each pixel shows, on canvases of three from Fashion-MNIST, by a U-Net with BatchNorm."""
    data = images.load("fashion-mnist", root)
    x, y = canvases(data.pictures, data.y, 3_000, seed=0)
    test_pictures = data.x_test * images.FASHION[1][0] + images.FASHION[0][0]
    x_val, y_val = canvases(test_pictures, data.y_test, 500, seed=1)
    return Task(lambda: UNet(8, 11), x, y, x_val, y_val, class_loss, batch=32, epochs=6)


def _first(root: Path, name: str, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = images.load(name, root).first(count, 2_000)
    return data.x, data.y, data.x_test, data.y_test


def canvases(pictures: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[count, 1, 48, 48]`` with a few pictures at random places in noise, and each pixel's class.

    The classes are 0 where nothing is and a label + 1 where a picture is not black; later pictures cover earlier ones.
    """
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.rand(count, 1, CANVAS, CANVAS, generator=generator)
    y = torch.zeros(count, CANVAS, CANVAS, dtype=torch.long)
    for i in range(count):
        for which in torch.randint(len(pictures), (THINGS,), generator=generator).tolist():
            top, left = torch.randint(CANVAS - 28 + 1, (2,), generator=generator).tolist()
            picture, place = pictures[which, 0], (slice(top, top + 28), slice(left, left + 28))
            seen = picture > 0.1
            x[i, 0][place] = torch.where(seen, picture, x[i, 0][place])
            y[i][place] = torch.where(seen, labels[which] + 1, y[i][place])
    return (x - 0.15) / 0.25, y


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm beside a shortcut, which a 1x1 convolution widens."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(8, out)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Three residual blocks of growing width."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width]
        self.blocks = nn.Sequential(
            *(ResidualBlock(a, b, 1 if a == b else 2) for a, b in zip(widths[:-1], widths[1:], strict=True))
        )
        self.out = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Two levels down and up again: images ``[N, 1, H, W]`` -> logits ``[N, H, W, classes]``."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.enter, self.down, self.bottom = _twice(1, width), _twice(width, 2 * width), _twice(2 * width, 4 * width)
        self.widen = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up = _twice(4 * width, 2 * width)
        self.widen_last = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.last = _twice(2 * width, width)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enter(x)
        middle = self.down(F.max_pool2d(fine, 2))
        up = self.up(torch.cat([middle, self.widen(self.bottom(F.max_pool2d(middle, 2)))], 1))
        return self.out(self.last(torch.cat([fine, self.widen_last(up)], 1))).movedim(1, -1)


def _twice(channels: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (channels, out):
        layers += [nn.Conv2d(inputs, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers)
