"""Weights & Biases: what the training data says about the test loss, beside your own curves."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np

from vlearn._extras import require
from vlearn.plot import thumbnails

COLUMNS = ("loss", "loo_loss", "self_influence", "leverage", "prediction_error")
BINS = 64


class GeneralizationLogger:
    """Log sensitivities to a run: live ones as training goes, and a sweep with its most sensitive examples.

    All keys start with ``vlearn/`` and are drawn over ``vlearn/step``, the optimizer's own count. Values join
    the row of the run that is open, so they shift none of your own logging, with or without ``step=``.

    ======================================  ================================================================
    ``train_loss``, ``loo_loss``            means over the sweep; leave-one-out predicts the test loss
    ``test_loss``                           as given
    ``predicted_gap``, ``gap``              leave-one-out minus train loss, test minus train loss
    ``most_sensitive``                      table of the ``top`` examples by self-influence, with images
    ``live_prediction_error``               mean over the minibatch, at sampled weights
    ``live_self_influence``                 mean over the minibatch, at sampled weights
    ``live_self_influence_log10``           histogram over the minibatch
    ``hess_init_weight``, ``hessian_min``   and the other fields of ``optimizer.diagnostics()``
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
        self._run, self._every, self._images, self._labels = run, every, images, labels
        self._top, self._table_every = top, table_every
        self._calls = self._sweeps = 0
        self._warned = False
        self._open_row: int | None = None
        self._last_step: int | None = None
        self._scores: dict[str, Any] | None = None
        run.define_metric("vlearn/step", hidden=True)
        run.define_metric("vlearn/*", step_metric="vlearn/step")

    def log_step(self, optimizer: Any) -> None:
        """Log live sensitivities and the state of the Hessian; call after every ``optimizer.step()``.

        Args:
            optimizer: one of vlearn's. If it has no sensitivities for this step, a warning says why, once,
                and the Hessian alone is logged.
        """
        self._calls += 1
        if (self._calls - 1) % self._every:
            return
        step, values = _health(optimizer)
        try:
            s = optimizer.sensitivities()
        except RuntimeError as error:
            if not self._warned:
                warnings.warn(f"No sensitivities to log: {error}", stacklevel=2)
            self._warned = True
        else:
            step = s.step if step is None else step
            influence = _as_array(s.self_influence)
            values["vlearn/live_self_influence"] = _mean(influence)
            values["vlearn/live_prediction_error"] = _mean(_as_array(s.prediction_error))
            positive = influence[np.isfinite(influence) & (influence > 0)]
            if len(positive):
                counts = np.histogram(np.log10(positive), bins=BINS)
                values["vlearn/live_self_influence_log10"] = self._wandb.Histogram(np_histogram=counts)
        self._log(self._calls if step is None else int(step), values)

    def log_sweep(self, step: int, table: Any, test_loss: float | None = None) -> None:
        """Log the losses of a sweep and, on the table's schedule, its most sensitive examples.

        Args:
            step: training step, counted in optimizer steps.
            table: what ``vlearn.sweep`` returned: ``[N]`` arrays or tensors ``index``, ``loss``,
                ``loo_loss``, ``self_influence``, ``leverage``, ``prediction_error``, some perhaps None.
            test_loss: mean loss on test data at the same weights, if known.

        Raises:
            ValueError: if an index lies outside of ``images`` or ``labels``; nothing is logged.
        """
        index = _as_array(table.index).astype(np.int64)
        for name, values in {"images": self._images, "labels": self._labels}.items():
            if values is not None and len(index) and index.max() >= len(values):
                raise ValueError(
                    f"table.index reaches {index.max()}, but {name} has {len(values)} rows: give the {name} "
                    "of the whole training set."
                )
        scores = {"index": index}
        for name in COLUMNS:
            if getattr(table, name, None) is not None:
                scores[name] = _as_array(getattr(table, name))
        nan = float("nan")
        train = _mean(scores["loss"]) if "loss" in scores else nan
        loo = _mean(scores["loo_loss"]) if "loo_loss" in scores else nan
        test = nan if test_loss is None else float(test_loss)
        losses = {"train_loss": train, "loo_loss": loo, "test_loss": test}
        losses |= {"predicted_gap": loo - train, "gap": test - train}
        values: dict[str, Any] = {f"vlearn/{name}": v for name, v in losses.items() if not np.isnan(v)}
        if self._sweeps % self._table_every == 0 and "self_influence" in scores:
            values["vlearn/most_sensitive"] = self._table(scores)
        self._sweeps += 1
        self._scores = scores
        self._log(int(step), values)

    def log_scores(self) -> None:
        """Upload every example's scores of the last sweep, as artifact ``vlearn-scores-{run id}``.

        The file ``scores.npz`` holds ``index`` and the table's columns, ``[N]`` each, for ``numpy.load``.
        """
        if self._scores is None:
            return
        artifact = self._wandb.Artifact(
            f"vlearn-scores-{self._run.id}", type="vlearn-scores", metadata={"step": self._last_step}
        )
        with artifact.new_file("scores.npz", mode="wb") as file:
            np.savez(file, **self._scores)
        self._run.log_artifact(artifact)
        self._scores = None

    def close(self) -> None:
        """Log the scores of the last sweep and send what is still open. The run itself goes on."""
        self.log_scores()
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

    def _table(self, scores: dict[str, np.ndarray]) -> Any:
        strength = scores["self_influence"]
        order = np.argsort(np.where(np.isfinite(strength), -strength, np.inf), kind="stable")[: self._top]
        index = scores["index"][order]
        columns = {"rank": list(range(1, len(order) + 1)), "index": index.tolist()}
        if self._labels is not None:
            labels = [self._labels[i] for i in index.tolist()]
            columns["label"] = [str(label.item() if hasattr(label, "item") else label) for label in labels]
        columns |= {name: scores[name][order].tolist() for name in COLUMNS if name in scores}
        if self._images is not None:
            image = require("PIL.Image", extra="wandb", feature="vlearn.integrations.wandb")
            pictures = np.rint(255 * thumbnails(self._images, index)).astype(np.uint8)
            columns["image"] = [
                self._wandb.Image(image.fromarray(picture), caption=f"#{i}")
                for picture, i in zip(pictures, index, strict=True)
            ]
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        return self._wandb.Table(columns=list(columns), data=rows)


def _health(optimizer: Any) -> tuple[int | None, dict[str, Any]]:
    """Step and diagnostics of an optimizer that has them."""
    if not hasattr(optimizer, "diagnostics"):
        return None, {}
    found = asdict(optimizer.diagnostics())
    return found.pop("step"), {f"vlearn/{name}": value for name, value in found.items() if math.isfinite(value)}


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")


def _as_array(values: Any) -> np.ndarray:
    """Array of an array or tensor; half precision becomes float32, which numpy knows."""
    if hasattr(values, "detach"):
        values = values.detach()
        values = (values.float() if values.is_floating_point() else values).cpu()
    return np.asarray(values)
