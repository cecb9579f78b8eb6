"""Lightning: a callback that records what a training run sees of every example.

`SensitivityCallback` is a subclass of Lightning's own `Callback`, made when it is first asked for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlearn._extras import require
from vlearn._warnings import warn_user
from vlearn.audit.recorder import Recorder


class _ForModule(Recorder):
    """A recorder whose summaries go to Lightning's own logging too."""

    module: Any = None

    def logged(self, metrics: dict[str, float], step: int) -> None:
        self.module.log_dict(metrics, rank_zero_only=True, on_epoch=True, on_step=False, batch_size=1)


class SensitivityHooks:
    """Record what a training run sees of every example, as `vlearn.Recorder`, and change nothing of it.

    Batches and training step stay what they are: the examples are numbered by what the training loader's sampler draws,
    and the output is that of the module or of the submodule whose output the training step's loss is made of, as the
    first batch shows; name it by ``module=`` where several fit. At the end of an epoch the record gets a snapshot, the
    data are swept if that is due, and the summary goes to ``log_dict``. Checkpoints have the record's state.

    Args:
        path: folder of the record.
        test_loss: name of the logged metric that is the mean loss on test data, kept with a sweep, as "val_loss"; of
            several loaders Lightning appends which, as "val_loss/dataloader_idx_0".
        **options: of `vlearn.Recorder`.

    Attributes:
        recorder: None before training.

    Example::

        Trainer(callbacks=[vlearn.integrations.lightning.SensitivityCallback("runs/fmnist")]).fit(module, loader)
    """

    def __init__(self, path: str | os.PathLike[str], test_loss: str | None = None, **options: Any):
        super().__init__()
        Recorder(path, **options)  # what it refuses is refused here
        self._path, self._test_loss, self._options = path, test_loss, options
        self.recorder: _ForModule | None = None
        self._state: Mapping[str, Any] | None = None
        self._undo: Any = None
        self._warned = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Follow the training loader's sampler, before anything is drawn from it."""
        if stage != "fit":
            return
        self.recorder = recorder = _ForModule(self._path, **self._options)
        strategy, process = trainer.strategy, trainer.strategy.process_dataloader

        def followed(loader: Any) -> Any:
            loader = process(loader)
            if not trainer.training:
                return loader
            recorder.loader = loader
            return recorder.numbers.follow(loader)

        strategy.process_dataloader = followed
        self._undo = functools.partial(delattr, strategy, "process_dataloader")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the module, and go on where a checkpoint is."""
        recorder = self._recorder()
        recorder.module = pl_module
        if recorder.numbers.key is None and isinstance(trainer.train_dataloader, list | tuple | dict):
            raise ValueError(
                "training goes through several loaders at once, whose examples have no common number: give key=, a "
                "callable from the batch to the numbers, and num_data."
            )
        optimizers = trainer.optimizers
        recorder.watch(pl_module, optimizers[0] if len(optimizers) == 1 else None, with_children=True)
        if self._state is not None:
            recorder.load_state_dict(self._state)
        recorder.go_on(trainer.global_step, is_resumed=self._state is None and trainer.global_step > 0)
        if self._state is not None and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            recorder.end_open_epoch(trainer.global_step)  # saved before the epoch's end
        self._state = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A training batch begins."""
        self._recorder().begin_batch(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A training batch is over."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None and pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches
        self._recorder().end_batch(loss, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch is over."""
        test_loss = None if self._test_loss is None else trainer.callback_metrics.get(self._test_loss)
        has_validated = trainer.current_epoch + 1 >= (trainer.check_val_every_n_epoch or 1)
        if self._test_loss is not None and test_loss is None and has_validated and not self._warned:
            self._warned = True
            logged = ", ".join(map(repr, trainer.callback_metrics)) or "none"
            warn_user(
                f"test_loss={self._test_loss!r}, but no metric of that name is logged (there are: {logged}): no test "
                "loss is kept."
            )
        self._recorder().end_epoch(trainer.global_step, None if test_loss is None else float(test_loss))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save what there is."""
        self._unfollow()
        if self.recorder is not None:
            self.recorder.break_off()

    def _unfollow(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save the record and remove all hooks."""
        self._unfollow()
        if stage == "fit" and self.recorder is not None:
            self.recorder.close()

    def state_dict(self) -> dict[str, Any]:
        """The record's state, for a checkpoint; all processes must make it."""
        if self.recorder is None or not self.recorder.has_started:
            return {}
        return self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go back to it when training starts."""
        self._state = state_dict or None

    def _recorder(self) -> _ForModule:
        if self.recorder is None:
            raise RuntimeError("SensitivityCallback is called outside of Trainer.fit: let the trainer call it.")
        return self.recorder


@functools.cache
def _callback() -> type:
    base = require("lightning.pytorch", extra="lightning", feature="vlearn.integrations.lightning").Callback
    content = {"__doc__": SensitivityHooks.__doc__, "__module__": __name__}
    return type("SensitivityCallback", (SensitivityHooks, base), content)


if TYPE_CHECKING:
    SensitivityCallback = SensitivityHooks


def __getattr__(name: str) -> Any:
    if name == "SensitivityCallback":
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
