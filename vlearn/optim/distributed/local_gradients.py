"""Several processes that train one model, each with its own draw.

DistributedDataParallel has averaged `p.grad` over the processes when backward() returns. The gradient of the
posterior's mean is that average, but the Hessian wants the average of each process's own noise times its own
gradient, and the product of averages is not that. So under a draw of its own, each process

    keeps its local gradient     a tensor hook sees it before the reducer does
    forms its statistic from it  at `step()`, as it would alone
    averages the statistic       over the wrapper's process group

which is what one process with all the draws does. How the wrapper is found, also if the optimizer has only seen its
parameters: `p.grad` that changes between its accumulation and the end of backward() has been reduced, by whatever
it is; then the living DistributedDataParallel modules say by whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlearn._torch_internals import after_backward, graph_task_id
from vlearn.optim.distributed.ddp import DDPRegistry
from vlearn.optim.kernels.nonfinite import is_low_precision

SHARED = "pass shared_noise=True, one draw for all processes"


class LocalGradients:
    """This process's own gradients under one draw, and whether they are all that `p.grad` holds.

    Args:
        parameters: those that are drawn.
        ddp: the wrappers that are known; one that is found in a backward pass is added.
        keep: whether the gradients themselves are wanted.
    """

    def __init__(self, parameters: list[Tensor], ddp: DDPRegistry, keep: bool):
        self.ddp = ddp
        self._parameters = parameters
        self._keep = keep
        self._reducer_unknown: Tensor | None = None  # a parameter that something else has reduced
        self._edited: Tensor | None = None  # a parameter whose gradient changed between two backward passes
        self._gradients: dict[Tensor, Tensor] = {}
        self._arriving: dict[Tensor, Tensor] = {}
        self._accumulated: dict[Tensor, Tensor] = {}  # norm of p.grad before a reducer may have it
        self._left: dict[Tensor, tuple[Tensor, int, Tensor]] = {}  # p.grad, its version, its norm after backward()
        self._seen = self._waiting = -1  # backward passes
        self._handles: list[Any] = []

    def listen(self) -> None:
        """Put the hooks on."""
        for p in self._parameters:
            # New hooks for every draw: they come after the user's, and see what is accumulated.
            self._handles.append(p.register_hook(partial(self._arrive, p)))
            self._handles.append(p.register_post_accumulate_grad_hook(self._accumulate))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- during backward ---------------------------------------------------------------------------------

    def _arrive(self, p: Tensor, gradient: Tensor) -> None:
        task = graph_task_id()
        if task != self._seen:
            self._seen = task
            self._look_at_accumulated()
        # The very tensor, not a view of it: one that nobody else holds would become p.grad, and be reduced.
        self._arriving[p] = gradient

    def _accumulate(self, p: Tensor) -> None:
        """After the local gradient was added to p.grad, which torch.autograd.grad does not do."""
        task = graph_task_id()
        if task != self._waiting:
            self._waiting = task
            after_backward(
                partial(after_backward, self._after_all_reduce)
            )  # twice: a reducer queues its own end meanwhile
        self._left.pop(p, None)
        gradient = self._arriving.pop(p, None)
        if self._keep and gradient is not None:
            before = self._gradients.get(p)
            self._gradients[p] = gradient if before is None else before + gradient
        if p.grad is not None and not p.grad.is_sparse and self.ddp.module_of(p) is None:
            self._accumulated[p] = _norms([p.grad])[0]

    @torch.no_grad()
    def _look_at_accumulated(self) -> None:
        """At the first gradient of a backward pass: what did the user do to those of earlier passes of this draw?"""
        self._arriving = {}
        edited = self._edited
        self._edited = edited if edited is not None and edited.grad is not None else None
        for p in self._parameters:
            left, version, norm = self._left.get(p, (p.grad, None, None))
            if p.grad is None:  # zero_grad() was called
                self._gradients.pop(p, None)
            elif norm is None or (left is p.grad and version == p.grad._version):
                continue
            elif not bool(p.grad.any()):  # zeroed in place
                self._gradients.pop(p, None)
            elif _any_differs([(norm, _norms([p.grad])[0])]):  # else a reducer has moved it
                self._edited = p

    @torch.no_grad()
    def _after_all_reduce(self) -> None:
        """After everything that belongs to this backward pass, the reducer's work too."""
        given = [(p, p.grad) for p in self._parameters if p.grad is not None and not p.grad.is_sparse]
        norms = _norms([gradient for _, gradient in given])
        self._left = {p: (g, g._version, norm) for (p, g), norm in zip(given, norms, strict=True)}
        accumulated, self._accumulated = self._accumulated, {}
        unknown = [p for p in accumulated if p in self._left]
        if _any_differs((accumulated[p], self._left[p][2]) for p in unknown):
            self.ddp.search(self._parameters)
            unknown = [p for p in unknown if self.ddp.module_of(p) is None]
            changed = (p for p in unknown if _any_differs([(accumulated[p], self._left[p][2])]))
            self._reducer_unknown = next(changed, None)

    # -- at step() ---------------------------------------------------------------------------------------

    def reduced(self, p: Tensor) -> bool:
        """Whether `p.grad` is the average over processes."""
        return self.ddp.module_of(p) is not None

    def of(self, p: Tensor, gradient: Tensor) -> Tensor:
        """The local gradient of p, for `gradient` in `p.grad`."""
        if not self.reduced(p):
            return gradient
        own = self._gradients.get(p)
        return torch.zeros_like(gradient) if own is None else own.detach()  # None: p is unused here, but not elsewhere

    def check(self, gradient_of: Callable[[Tensor], Tensor | None], names: Callable[[], dict[Tensor, str]]) -> None:
        """Raise RuntimeError if the local gradients do not explain those in `p.grad`."""
        if self._reducer_unknown is not None:
            raise RuntimeError(
                f"the gradient of {names()[self._reducer_unknown]!r} was changed inside backward(), as a reducer over "
                "processes does, but not by DistributedDataParallel, and each process has a draw of its own, which "
                f"averaged gradients do not match: {SHARED}, or use DistributedDataParallel."
            )
        gradients = {p: gradient for p in self._parameters if (gradient := gradient_of(p)) is not None}
        reduced = [p for p in gradients if self.reduced(p)]
        if reduced and not self._keep:
            raise RuntimeError(
                "sync=True averages gradients over processes at step(), but DistributedDataParallel has done so in "
                "backward(): drop sync=True, or the wrapper."
            )
        self.ddp.check_running(reduced)
        for p in [*([] if self._edited is None else [self._edited]), *self._changed(gradients)]:
            if self.reduced(p):
                raise RuntimeError(
                    f"the gradient of {names()[p]!r} was changed after backward() (clipped, unscaled by a GradScaler, "
                    "or written), but DistributedDataParallel had averaged it over processes whose draws differ, so "
                    f"their own products with the noise cannot follow: {SHARED}, which supports both."
                )
            own = self._gradients.get(p)
            if own is not None and p in gradients and not _only_shrunk(gradients[p], own):
                raise RuntimeError(
                    f"the gradient of {names()[p]!r} was changed after backward() by more than clipping or unscaling. "
                    "If it was averaged over processes, it does not match their draws, which differ: "
                    f"{SHARED}, or use DistributedDataParallel or sync=True."
                )

    def _changed(self, gradients: dict[Tensor, Tensor]) -> list[Tensor]:
        """The parameters whose gradient is not what the last backward pass has left."""
        same = [p for p, g in gradients.items() if p in self._left and self._left[p][0] is g]
        same = [p for p in same if self._left[p][1] == gradients[p]._version]
        changed = [p for p in gradients if p not in set(same)]
        # A scaler and a message between processes do not count the version up.
        norms = zip((self._left[p][2] for p in same), _norms([gradients[p] for p in same]), strict=True)
        pairs = dict(zip(same, norms, strict=True))
        return changed + ([p for p in same if _any_differs([pairs[p]])] if _any_differs(pairs.values()) else [])


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    if any(
        is_low_precision(gradient) for gradient in gradients
    ):  # 16 bits hold neither the norm nor a small change of it
        dtypes = [torch.float32 if is_low_precision(gradient) else gradient.dtype for gradient in gradients]
        return [torch.linalg.vector_norm(g, dtype=dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    return list(torch._foreach_norm(gradients)) if gradients else []


def _only_shrunk(gradient: Tensor, own: Tensor) -> bool:
    """Whether no entry has grown or changed its sign, as under clipping and unscaling."""
    if gradient.is_sparse or own.is_sparse:
        return True
    shrunk = (gradient * own >= 0) & (gradient.abs() <= own.abs() * (1 + 1e-6))
    return bool((shrunk | ~gradient.isfinite()).all())


def _any_differs(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether the numbers of any pair differ, by one look at each device; NaN differs from nothing."""
    alike: dict[torch.device, list[Tensor]] = {}
    for a, b in pairs:
        alike.setdefault(a.device, []).append((a != b) & (a == a))
    return any(bool(torch.stack(flags).any()) for flags in alike.values())
