"""Weights & Biases: summaries over the optimizer's own step, tables with images, and scores as an artifact."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from vlearn._extras import require
from vlearn._warnings import warn_user
from vlearn.plot import thumbnails
from vlearn.sensitivity import SensitivityTable

COLUMNS = ("loss", "loo_loss", "self_influence", "leverage", "prediction_error")


class GeneralizationLogger:
    """Log sensitivities to a run: live ones as training goes, and sweeps with their most sensitive examples.

    All keys start with ``vlearn/`` and are drawn over ``vlearn/step``, the optimizer's own count. Values join
    the row of the run that is open, so they shift none of your own logging, with or without ``step=``. Other loggers
    take the same floats from ``optimizer.sensitivities().summary()`` and ``table.summary()``.

    ======================================  ================================================================
    ``loss``, ``loo_loss``, ...             ``SensitivityTable.summary()`` of a sweep
    ``test_loss``, ``gap``                  as given, and test_loss - loss
    ``most_sensitive``                      table of the ``top`` examples by self-influence, with images
    ``live_self_influence_mean``, ...       ``Sensitivities.summary()`` of a minibatch, at sampled weights
    ``hess_init_weight``, ...               the finite numbers of ``optimizer.diagnostics()``
    ======================================  ================================================================

    Args:
        run: what ``wandb.init`` returned; default the run that is active, ``wandb.run``.
        every: :meth:`log_step` logs at its first call and then at every ``every``-th; the rest cost nothing.
        images: ``[N, H, W]``, ``[N, 1, H, W]``, ``[N, 3, H, W]`` or ``[N, H, W, 3]`` training images, for the
            table.
        labels: ``[N]`` numbers or names, for the table.
        top: rows of the table.
        table_every: a table for the first sweep and then for every ``table_every``-th.

    Raises:
        ImportError: if wandb is not installed.
        ValueError: if ``every``, ``top`` or ``table_every`` is not positive.
        RuntimeError: if no run is given and none is active.

    Example::

        logger = vlearn.integrations.wandb.GeneralizationLogger(wandb.init(), every=100)
        ...
        logger.log_step(optimizer)                                  # after optimizer.step()
        logger.log_sweep(step, table, test_loss=test_loss)          # at the end of an epoch
        logger.close()
    """

    def __init__(
        self,
        run: Any = None,
        every: int = 100,
        images: Any = None,
        labels: Any = None,
        top: int = 16,
        table_every: int = 1,
    ) -> None:
        for name, value in {"every": every, "top": top, "table_every": table_every}.items():
            if value < 1:
                raise ValueError(f"{name}={value}, but it must be positive: 1 logs the most often.")
        self._wandb = require("wandb", extra="wandb", feature="vlearn.integrations.wandb")
        run = self._wandb.run if run is None else run
        if run is None:
            raise RuntimeError("GeneralizationLogger() without a run, but no run is active: call wandb.init() first.")
        labels = labels.tolist() if hasattr(labels, "iloc") else labels  # of pandas, by place and not by index
        self._run, self._every, self._images, self._labels = run, every, images, labels
        self._top, self._table_every = top, table_every
        self._calls = self._sweeps = 0
        self._warned = False
        self._open_row: int | None = None
        self._last_step: int | None = None
        self._last_table: SensitivityTable | None = None
        run.define_metric("vlearn/step", hidden=True)
        run.define_metric("vlearn/*", step_metric="vlearn/step")

    def log_step(self, optimizer: Any) -> None:
        """Log live sensitivities and the state of the Hessian; call it after every ``optimizer.step()``.

        Args:
            optimizer: one of vlearn's. If it has no sensitivities for this step, a warning says why, once,
                and the Hessian alone is logged.
        """
        self._calls += 1
        if (self._calls - 1) % self._every:
            return
        diagnostics = asdict(optimizer.diagnostics())
        step = diagnostics.pop("step")
        numbers = {name: value for name, value in diagnostics.items() if isinstance(value, int | float)}
        values = {f"vlearn/{name}": value for name, value in numbers.items() if math.isfinite(value)}
        try:
            values |= optimizer.sensitivities().summary("vlearn/live_")
        except RuntimeError as error:
            if not self._warned:
                warn_user(f"No sensitivities to log: {error}")
            self._warned = True
        self._log(step, values)

    def log_sweep(self, step: int, table: SensitivityTable, test_loss: float | None = None) -> None:
        """Log the summary of a sweep and, on the table's schedule, its most sensitive examples.

        Args:
            step: training step, counted in optimizer steps.
            table: what ``vlearn.sweep`` returned.
            test_loss: mean loss on test data at the same weights, if known.

        Raises:
            ValueError: if an index lies outside of ``images`` or ``labels``; nothing is logged.
        """
        for name, values in {"images": self._images, "labels": self._labels}.items():
            if values is not None and len(table) and int(table.index.max()) >= len(values):
                raise ValueError(
                    f"table.index reaches {int(table.index.max())}, but {name} has {len(values)} rows: give the "
                    f"{name} of the whole training set."
                )
        row: dict[str, Any] = table.summary("vlearn/")
        if test_loss is not None:
            row |= {"vlearn/test_loss": float(test_loss), "vlearn/gap": float(test_loss) - row["vlearn/loss"]}
        if self._sweeps % self._table_every == 0:
            row["vlearn/most_sensitive"] = self._most_sensitive(table)
        self._sweeps += 1
        self._last_table = table
        self._log(int(step), row)

    def close(self) -> None:
        """Upload the scores of the last sweep and send what is still open. The run itself goes on.

        The artifact ``vlearn-scores-{run id}`` holds ``scores.npz`` with ``index`` and the columns of the table,
        ``[N]`` each, for ``numpy.load``.
        """
        if self._last_table is not None:
            name, metadata = f"vlearn-scores-{self._run.id}", {"step": self._last_step}
            artifact = self._wandb.Artifact(name, type="vlearn-scores", metadata=metadata)
            with artifact.new_file("scores.npz", mode="wb") as file:
                np.savez(file, **_scores(self._last_table))
            self._run.log_artifact(artifact)
            self._last_table = None
        self._close_row()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step != self._last_step:
            self._close_row()
        # With commit=False the row stays open for the user's next log call, whatever step that names.
        self._run.log({"vlearn/step": step, **values}, commit=False)
        self._open_row, self._last_step = self._run.step, step

    def _close_row(self) -> None:
        """Send this logger's last values if no log call of the user has sent them along since."""
        if self._open_row is not None and self._open_row == self._run.step:
            self._run.log({}, commit=True)
        self._open_row = None

    def _most_sensitive(self, table: SensitivityTable) -> Any:
        """``wandb.Table`` of the ``top`` examples by self-influence, examples without a finite one last."""
        strength = table.self_influence.where(table.self_influence.isfinite(), -math.inf)
        order = strength.argsort(descending=True, stable=True)
        scores = {name: column[order[: self._top]] for name, column in _scores(table).items()}
        index = scores["index"].tolist()
        columns = {"rank": range(1, len(index) + 1), "index": index}
        if self._labels is not None:
            labels = [self._labels[i] for i in index]
            columns["label"] = [str(label.item() if hasattr(label, "item") else label) for label in labels]
        columns |= {name: scores[name].tolist() for name in COLUMNS if name in scores}
        if self._images is not None:
            image = require("PIL.Image", extra="wandb", feature="vlearn.integrations.wandb")
            pictures = np.rint(255 * thumbnails(self._images, index)).astype(np.uint8)
            columns["image"] = [
                self._wandb.Image(image.fromarray(picture), caption=f"#{i}")
                for picture, i in zip(pictures, index, strict=True)
            ]
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        return self._wandb.Table(columns=list(columns), data=rows)


def _scores(table: SensitivityTable) -> dict[str, Any]:
    """``index`` and the columns that the sweep was asked for, ``[N]`` each; numpy has no bfloat16."""
    columns = {name: getattr(table, name) for name in ("index", *COLUMNS) if getattr(table, name) is not None}
    return {
        name: np.asarray(column.float() if column.dtype == torch.bfloat16 else column)
        for name, column in columns.items()
    }
