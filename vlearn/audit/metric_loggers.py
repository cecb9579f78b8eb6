"""Numbers to whatever logger there is."""

from __future__ import annotations

import csv
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_logger(logger: Any) -> None:
    """Raise TypeError where `log_metrics` would not know what to do with a logger."""
    for each in _each(logger):
        ways = any(hasattr(each, way) for way in ("log_metrics", "add_scalar")) or _takes_one(
            getattr(each, "log", None)
        )
        if not (isinstance(each, str | os.PathLike) or callable(each) or ways):
            raise TypeError(
                f"logger is a {type(each).__name__}, but it must have log_metrics, log or add_scalar, be a callable "
                "(metrics, step), the path of a CSV file, or a list of these."
            )


def log_metrics(logger: Any, metrics: Mapping[str, float], step: int) -> None:
    """Give numbers to a logger in its own way.

    ==========================================  ====================================================
    ``log_metrics(metrics, step=)``             Lightning's loggers, ``mlflow``, Comet
    ``add_scalar(name, value, step)``           TensorBoard's ``SummaryWriter``
    ``log(metrics, step=)`` or ``log(metrics)``  ``trackio``, Accelerate; W&B and Hugging Face's Trainer
    a callable                                  ``logger(metrics, step)``
    a path                                      a CSV file with the columns step, name, value
    ==========================================  ====================================================

    Args:
        logger: one, a list of them, or None.
        metrics: numbers by name.
        step: of the training.
    """
    for each in _each(logger):
        if isinstance(each, str | os.PathLike):
            _append(Path(each), metrics, step)
        elif _takes_step(getattr(each, "log_metrics", None)):  # a Trainer's own is something else
            each.log_metrics(dict(metrics), step=step)
        elif hasattr(each, "add_scalar"):
            for name, value in metrics.items():
                each.add_scalar(name, value, step)
        elif hasattr(each, "log"):
            # W&B counts its own rows, and drops what is logged to an earlier one.
            is_wandb = type(each).__module__.partition(".")[0] == "wandb" or getattr(each, "__name__", "") == "wandb"
            if not is_wandb and _takes_step(each.log):
                each.log(dict(metrics), step=step)
            else:
                each.log({**metrics, "vlearn/step": step} if is_wandb else dict(metrics))
        else:
            each(dict(metrics), step)


def active_loggers() -> list[Any]:
    """Runs of W&B and MLflow that the program has begun; neither is imported for it."""
    wandb, mlflow = sys.modules.get("wandb"), sys.modules.get("mlflow")
    loggers = [] if wandb is None or getattr(wandb, "run", None) is None else [wandb.run]
    return loggers if mlflow is None or mlflow.active_run() is None else [*loggers, mlflow]


def _each(logger: Any) -> list[Any]:
    if logger is None:
        return []
    return list(logger) if isinstance(logger, list | tuple) else [logger]


def _takes_step(log: Any) -> bool:
    try:
        parameters = inspect.signature(log).parameters
    except (TypeError, ValueError):
        return False
    return "step" in parameters


def _takes_one(log: Any) -> bool:
    """Whether it can be called with metrics alone, as the log of Python's loggers, which wants a level, cannot."""
    try:
        inspect.signature(log).bind({})
    except TypeError:
        return False
    except ValueError:  # it does not tell
        return True
    return True


def _append(path: Path, metrics: Mapping[str, float], step: int) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("step", "name", "value")] if is_new else [])
        writer.writerows((step, name, value) for name, value in metrics.items())
