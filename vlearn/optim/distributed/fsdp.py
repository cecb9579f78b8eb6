"""The modules of `fully_shard` around an optimizer's parameters, which keep whole copies of the weights for a while.

A forward pass gathers the weights of a module from the shards. Those of the outermost module stay until the backward
pass, or the next forward pass if none comes. Where a draw or the mean has been written into the shards meanwhile, they
must be gathered anew.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import Tensor

from vlearn._torch_internals import let_go_of_gathered_weights, sharded_parameters
from vlearn.sharded.tensors import is_dtensor


class FSDPRegistry:
    """The modules of `fully_shard` that hold some parameters."""

    def __init__(self) -> None:
        self._modules: WeakSet[Any] = WeakSet()
        self._searched: set[Tensor] = set()

    def shards_changed(self, parameters: list[Tensor]) -> None:
        """The shards of these parameters have been written: no module may keep what it gathered before."""
        sharded = [p for p in parameters if is_dtensor(p)]
        if not self._searched.issuperset(sharded):
            self.search(sharded)
        for module in list(self._modules):
            let_go_of_gathered_weights(module)

    def search(self, parameters: Iterable[Tensor]) -> None:
        """Look for modules among all objects there are, once for each parameter."""
        self._searched.update(parameters)
        if "torch.distributed.fsdp" not in sys.modules:
            return
        from torch.distributed.fsdp import FSDPModule

        for each in gc.get_objects():
            # Not isinstance, which asks proxies for their __class__.
            if issubclass(type(each), FSDPModule) and any(p in self._searched for p in sharded_parameters(each)):
                self._modules.add(each)
