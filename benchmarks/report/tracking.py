"""A Weights & Biases run for a benchmark: online only for a user who is logged in, silent, optional."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report.terminal import relative


@contextmanager
def tracked(project: str, folder: Path, config: dict[str, Any]) -> Iterator[tuple[Any | None, str]]:
    """A run that is marked as failed if an exception leaves the context.

    Args:
        project: its name on W&B.
        folder: where the run's files go, unless WANDB_DIR names another.
        config: the benchmark's settings.

    Yields:
        The run, or None without wandb; and one sentence for the reader.
    """
    run, said = _start(project, folder, config)
    failed = True
    try:
        yield run, said
        failed = False
    finally:
        if run is not None:
            run.finish(exit_code=int(failed))


def log_results(script: str, config: dict[str, Any], table: Any, figures: Mapping[str, Path] | None = None) -> str:
    """One run of a script that is done: its settings, its table, its pictures.

    Returns:
        One sentence for the reader.
    """
    with tracked(f"vlearn-{script.replace('_', '-')}", Path("runs") / script, config) as (run, said):
        if run is not None:
            run.log({f"figures/{name}": image(path) for name, path in (figures or {}).items()})
            run.summary.update({"table": table})
    return said


def image(path: Path) -> Any:
    """A picture as W&B logs it."""
    import wandb

    return wandb.Image(str(path))


def _start(project: str, folder: Path, config: dict[str, Any]) -> tuple[Any | None, str]:
    try:
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=30)
        wandb.setup(settings)
    except (ImportError, AttributeError):  # AttributeError: ./wandb, left by another run, imports as a namespace
        return None, "Weights & Biases: not installed, nothing logged (pip install 'vlearn[wandb]')."
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {"project": project, "config": config, "settings": settings}
    if "WANDB_DIR" not in os.environ:
        arguments["dir"] = folder
    mode = os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    try:
        run = wandb.init(mode=mode, **arguments)
    except wandb.errors.CommError:
        mode, run = "offline", wandb.init(mode="offline", **arguments)
    if mode == "offline":
        where = Path(run.settings.sync_dir)
        return run, f"Weights & Biases: offline run, `wandb sync {relative(where)}` uploads it."
    return run, f"Weights & Biases: {run.url or mode}."
