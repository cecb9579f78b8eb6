"""Two processes that run functions of the tests as the ranks of a gloo group.

They are started once, and from a process that has imported torch, which takes seconds; the group is new for every
function. A rank that fails
is named with its traceback, and one that hangs is killed.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT = 60.0  # seconds; a collective gives up earlier
LIMITS = ("'Stream' object has no attribute 'record_event'", "FSDP+TP sharding does not support uneven sharding")
IMPORTED = ["tests.distributed.ranks", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "vlearn"]


def skip_what_torch_cannot(told: str) -> None:
    """Skip a test whose processes failed where torch 2.6 does, which shards on accelerators, and evenly, alone."""
    if torch.__version__ < "2.7" and any(limit in told for limit in LIMITS):
        pytest.skip(f"fully_shard of torch {torch.__version__} does not do this on CPUs")


class Ranks:
    """Call it with a module-level function; it runs in both ranks, and their results come back in order."""

    def __init__(self, folder: Path, count: int = 2):
        self.folder, self.count, self.calls = folder, count, 0
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        self.start()
        self.calls += 1
        for rank, pipe in enumerate(self.pipes):
            pipe.send((function, args, rank, self.count, str(self.folder / f"store{self.calls}")))
        results, failures, waiting = [None] * self.count, [], dict(zip(self.pipes, range(self.count), strict=True))
        while waiting:
            ready = wait(list(waiting), TIMEOUT)
            if not ready:
                failures += [f"rank {rank} hangs" for rank in waiting.values()]
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # pyright: ignore
                try:
                    error, result = pipe.recv()  # pyright: ignore
                except EOFError:
                    error, result = "it died", b""
                if error:
                    failures.append(f"rank {rank}: {error}")
                else:
                    results[rank] = torch.load(io.BytesIO(result), weights_only=False)
        if failures:
            self.stop()
            told = "\n".join(failures)
            skip_what_torch_cannot(told)
            raise AssertionError(told)
        return results

    def start(self) -> None:
        if self.processes:
            return
        spawn: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
        spawn.set_forkserver_preload(IMPORTED)
        for _ in range(self.count):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported is no garbage, and the library looks for wrappers among all other objects
    while True:
        try:
            function, args, rank, count, store = pipe.recv()
        except EOFError:
            return
        if (
            torch.distributed.is_initialized()
        ):  # both ranks are done with the last function, so neither misses the other
            gc.collect()
            torch.distributed.destroy_process_group()
        try:
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=20)
            )
            torch.manual_seed(0)  # in all ranks alike, as seed_everything does
            result = io.BytesIO()
            torch.save(function(rank, *args), result)
            pipe.send(("", result.getvalue()))
        except BaseException:
            pipe.send((traceback.format_exc(), b""))
