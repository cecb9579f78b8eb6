"""The twelve tasks of the comparison by name, and one for its smoke run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.defaults import pictures, tables, texts
from benchmarks.defaults.control import Control
from benchmarks.defaults.task import Task, class_loss
from benchmarks.problems import images, networks


def tasks(root: Path, runs: Path) -> dict[str, Callable[[], Any]]:
    """Functions that make each task, by name: those that a choice of settings may look at, then those it may not.

    Args:
        root: the folder of the data.
        runs: the folder in which a network is kept that a task goes on from.
    """
    chosen_on = {
        "gpt": lambda: texts.gpt(root),
        "bert": lambda: texts.bert(root),
        "lenet": lambda: pictures.lenet(root),
        "mlp": lambda: tables.mlp(root),
        "vit": lambda: pictures.vit(root),
        "ppo": Control,
    }
    unseen = {
        "lora": lambda: texts.lora(root, runs),
        "ft-transformer": lambda: tables.ft_transformer(root),
        "unet": lambda: pictures.unet(root),
        "gru": lambda: texts.gru(root),
        "embedding": lambda: texts.embedding(root),
        "resnet": lambda: pictures.resnet(root),
    }
    return {**chosen_on, **unseen}


def smoke_task() -> Task:
    """The digits by a small network, for seconds."""
    data = images.load("digits")
    halves = data.x[:500], data.y[:500], data.x_test[:200], data.y_test[:200]
    return Task(networks.digits_cnn, *halves, class_loss, batch=50, epochs=2)
