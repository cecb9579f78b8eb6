"""Which processes train one model together, and what they average at `step()`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vlearn._torch_internals import lets_processes_stop_early
from vlearn.collectives import process_count
from vlearn.optim.distributed.ddp import DDPRegistry
from vlearn.optim.distributed.fsdp import FSDPRegistry
from vlearn.optim.parameters.parameters import Parameters
from vlearn.sharded.tensors import is_dtensor


class Processes:
    """The processes that train the parameters of one optimizer.

    Args:
        parameters: those of the optimizer.

    Attributes:
        ddp: the DistributedDataParallel modules around the parameters.
        average_passes: whether the update learns from the examples of each process's own passes.
    """

    def __init__(self, parameters: Parameters):
        self._parameters = parameters
        self.average_passes = False
        self.ddp = DDPRegistry()
        self._fsdp = FSDPRegistry()

    def several_with(self, setting: str) -> bool:
        """Whether there are several processes and any group has `sync` or `shared_noise`."""
        return self._parameters.any_group_has(setting) and process_count() > 1

    @property
    def mesh(self) -> Any:
        """The mesh of processes that hold shards of the parameters, the largest of several; None if none is sharded."""
        meshes = [p.device_mesh for p in self._parameters.every() if is_dtensor(p)]  # pyright: ignore
        return max(meshes, key=lambda mesh: mesh.size(), default=None)

    def weights_changed(self, parameters: list[Tensor]) -> None:
        """Weights were written: copies of them, cast by autocast or gathered by `fully_shard`, are old."""
        torch.clear_autocast_cache()
        if self.mesh is not None:
            self._fsdp.shards_changed(parameters)

    @property
    def share_draw(self) -> bool:
        """Whether a draw is that of all processes, or of the only one if there were several."""
        return self._parameters.any_group_has("shared_noise") or self.mesh is not None

    @property
    def own_draws(self) -> bool:
        """Whether there are several processes, each with a draw of its own."""
        return process_count() > 1 and not self.share_draw

    def agree_on(self, code: int, at_step: bool) -> int:
        """The greatest code of all processes whose step is one: none may wait for another that does not come."""
        if (mesh := self.mesh) is not None:
            return _greatest(code, at_step, torch.device(mesh.device_type), mesh.get_all_groups())
        parameters = self._parameters.trainable() if process_count() > 1 else []
        if not parameters or not self._averages(wrapper := self.ddp.first(parameters)):
            return code
        group = None if wrapper is None or self.several_with("sync") else wrapper.process_group
        return _greatest(code, at_step, parameters[0].device, [group])

    def group_over(self, parameters: Iterable[Tensor]) -> Any:
        """The processes over which `step()` averages what it learns from examples of parameters; None: it does not."""
        if process_count() == 1:
            return None
        everyone = torch.distributed.group.WORLD
        if self.several_with("sync"):
            return everyone
        if self.several_with("shared_noise"):
            return self.ddp.group_of(self._parameters.trainable()) or everyone
        return self.ddp.group_of(parameters)

    def _averages(self, wrapper: DistributedDataParallel | None) -> bool:
        """Whether `step()` averages anything over processes.

        Args:
            wrapper: around the parameters.
        """
        if wrapper is not None and lets_processes_stop_early(wrapper):
            return False  # it raises: others may have stopped
        shared = self.several_with("shared_noise")
        return self.several_with("sync") or (self.average_passes if shared else wrapper is not None)


def _greatest(code: int, at_step: bool, device: torch.device, groups: list[Any]) -> int:
    """The greatest code of all processes of a group, or of those of a mesh, for a decision that they must take alike.

    Args:
        groups: one, None for the default one; or one for each axis of the mesh.

    Raises:
        RuntimeError: if some processes are at `step()` and others begin another draw.
    """
    greatest = torch.tensor([code, at_step, not at_step], dtype=torch.float32, device=device)
    for group in groups:
        torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX, group=group)
    code, some_at_step, some_not = greatest.int().tolist()
    if some_at_step and some_not:
        raise RuntimeError(
            "some processes are at step() while others begin another draw for it: enter "
            "sampled_params(train=True) equally often in all of them."
        )
    return code
