"""Sums, averages and results over the processes of a group, each by one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
MESSAGE_BYTES = 2**26


def process_count() -> int:
    """The number of processes in the default group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_rank() -> int:
    """This process's place in the default group; 0 without one."""
    return distributed.get_rank() if process_count() > 1 else 0


def default_group() -> Any:
    """The group of all processes; None where there is one alone."""
    return distributed.group.WORLD if process_count() > 1 else None


def averaged(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Averages over the processes of a group.

    Args:
        tensors: of one dtype and device.
        group: None for the default one.
    """
    return [total.div_(distributed.get_world_size(group)) for total in summed(tensors, group)]


def summed(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Sums over the processes of a group, as `averaged`."""
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(message, group=group)
    parts = message.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def gathered(row: Tensor, group: Any = None) -> Tensor:
    """The rows of all processes of a group, ``[process, *shape]``, on the CPU."""
    rows = [torch.empty_like(row) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(rows, row, group=group)
    return torch.stack(rows).cpu()


def told_by_all(told: Any, group: Any = None) -> list[Any]:
    """What each process of a group tells, in their order; it is pickled."""
    everything: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everything, told, group=group)
    return everything


def joined_rows(rows: Tensor, counts: Sequence[int], group: Any = None) -> Tensor:
    """The rows of all processes of a group one after the other, ``[sum(counts), *shape]``, on the CPU.

    Beside the result no more than `MESSAGE_BYTES` are held.

    Args:
        rows: ``[n, *shape]`` of one shape and dtype in all processes.
        counts: of each process's rows.
    """
    whole = torch.empty(sum(counts), *rows.shape[1:], dtype=rows.dtype, device="cpu")
    device = _message_device(group)
    for rank, part in enumerate(whole.split(list(counts))):
        if rank == distributed.get_rank(group):
            part.copy_(rows)
        for piece in part.reshape(-1).view(torch.uint8).split(MESSAGE_BYTES):
            if piece.numel():
                message = piece.to(device)
                distributed.broadcast(message, distributed.get_global_rank(group, rank) if group else rank, group=group)
                piece.copy_(message)
    return whole


def _message_device(group: Any) -> torch.device:
    """Where a group's messages live; those of its objects go there by themselves."""
    if distributed.get_backend(group) not in ("nccl", "xccl"):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def compute_on_one_rank(
    tasks: list[Callable[[], list[Tensor] | None]], likes: list[list[Tensor]], group: Any
) -> list[list[Tensor] | None]:
    """Results that one process computes for all, where the processes share the tasks.

    Each computing its own would not do: eigenvectors of repeated eigenvalues are arbitrary, and others differ between
    processes that round differently, by the number of their threads alone.

    Args:
        tasks: the same in all processes; each gives tensors, or None.
        likes: tensors of the results' shapes, dtype and device.
        group: the processes; None for this one alone.
    """
    if group is None:
        return [task() for task in tasks]
    count, rank = distributed.get_world_size(group), distributed.get_rank(group)
    own = {i: task() for i, task in enumerate(tasks) if i % count == rank}
    results: list[list[Tensor] | None] = []
    for i, like in enumerate(likes):
        message = as_message(own.get(i), like)
        distributed.broadcast(message, distributed.get_global_rank(group, i % count), group=group)
        results.append(from_message(message, like))
    return results


def as_message(result: list[Tensor] | None, likes: list[Tensor]) -> Tensor:
    """A result, or None, as one tensor ``[1 + entries]``, which begins with 1 where there is a result.

    Args:
        likes: tensors of the result's shapes, dtype and device.
    """
    size = 1 + sum(like.numel() for like in likes)
    message = torch.zeros(size, dtype=likes[0].dtype, device=likes[0].device)
    if result is not None:
        torch.cat([message.new_ones(1), *(tensor.reshape(-1) for tensor in result)], out=message)
    return message


def from_message(message: Tensor, likes: list[Tensor]) -> list[Tensor] | None:
    """Undo of `as_message`."""
    has_result, *parts = message.split([1, *(like.numel() for like in likes)])
    if not bool(has_result):
        return None
    return [part.view(like.shape).clone() for part, like in zip(parts, likes, strict=True)]


class Together:
    """Processes that do one thing together, each its own part of it, and tell one another how it went.

    A process that has met an error says so where all meet, in the place of leaving the others waiting.

    Args:
        group: the processes; None for this one alone.
        what: they do together, as "fit".

    Attributes:
        group: the same.
        what: the same.
    """

    def __init__(self, group: Any, what: str):
        self.group, self.what = group, what
        self._known_error: BaseException | None = None  # of which all have been told
        self._depth = 0  # of pieces of work inside one another

    @property
    def rank(self) -> int:
        """This one's place among them."""
        return 0 if self.group is None else distributed.get_rank(self.group)

    def each(self, work: Callable[[], T]) -> list[T]:
        """What a piece of work gives in each process, in their order; it is pickled.

        Raises:
            RuntimeError: if it fails in another process; where it fails, its own error.
        """
        if self.group is None:
            return [work()]
        return self._told(work, lambda result: result)[1]

    def agreed(self, work: Callable[[], T]) -> T:
        """What a piece of work gives in this process, once it has been done in all; raises as `each`.

        It may itself contain such pieces, as many in each process.
        """
        return work() if self.group is None else self._told(work, lambda result: None)[0]

    def _told(self, work: Callable[[], T], share: Callable[[T], Any]) -> tuple[T, list[Any]]:
        """(this process's result, what each has shared of its own)."""
        error, result, depth = None, None, self._depth
        self._depth += 1
        try:
            result = work()
        except Exception as raised:
            if raised is self._known_error:  # told from inside the work
                raise
            error = raised
        finally:
            self._depth = depth
        message = None if error is None else f"{type(error).__name__}: {error}"
        told = told_by_all((depth, message, None if error is not None else share(result)), self.group)  # pyright: ignore
        failed = [(rank, message) for rank, (_, message, _) in enumerate(told) if message is not None]
        if failed and error is None:
            rank, message = failed[0]
            error = RuntimeError(f"the {self.what} ends here because it failed in process {rank}, by {message}")
        elif error is None and any(other != depth for other, _, _ in told):
            error = RuntimeError(
                f"the {self.what} ends here because the processes have gone through the data in different ways: give "
                "all of them the same arguments."
            )
        if error is not None:
            self._known_error = error
            raise error
        return result, [result for _, _, result in told]  # pyright: ignore

    def total(self, own: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The sums over all processes of what each has of every parameter, on the parameters' devices."""
        if self.group is None:
            return dict(own)
        return {p: summed([value], self.group)[0] for p, value in own.items()}

    def of_first(self, own: Tensor) -> Tensor:
        """The first process's values, by which all decide alike, whatever their rounding."""
        if self.group is None:
            return own
        values = own.clone()
        distributed.broadcast(values, distributed.get_global_rank(self.group, 0), group=self.group)
        return values
