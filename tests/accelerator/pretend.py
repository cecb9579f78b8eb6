"""A device that is none: its tensors hold a CPU tensor, and what a GPU would refuse or wait for is refused or counted.

It shows without a GPU whether code keeps to one device, how many kernels it would launch, and how often the host would
wait for the device. Training, sweeps and forward-mode AD run on it; autocast does not, and it does not show speed.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import vlearn

DEVICE = "pretend"
ROOM = str(Path(vlearn.__file__).parent)
aten = torch.ops.aten

# Operations whose result the host must know, beside copies to the CPU: a number, or the size of a tensor.
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
# Operations that launch nothing, beside views.
FREE = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # takes indices from the CPU
FACTORIES = (
    *(aten.empty.memory_format, aten.empty_strided.default, aten.eye.default, aten.eye.m, aten.randperm.default),
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.full.default),
    *(aten.randn.default, aten.randn.generator, aten.rand.default, aten.randint.default, aten.randint.generator),
    *(aten.randint.low, aten.randint.low_generator, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default),
)


class PretendTensor(Tensor):
    """A tensor on the device.

    Attributes:
        held: its entries, on the CPU.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        return Tensor._make_wrapper_subclass(  # pyright: ignore
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE, 0),
        )

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self) -> str:  # pyright: ignore
        return f"pretend({self.held})"

    @property
    def data(self) -> Tensor:  # pyright: ignore
        return Tensor.data.__get__(self)  # pyright: ignore

    @data.setter
    def data(self, value: PretendTensor) -> None:
        Tensor.data.__set__(self, value)  # pyright: ignore
        self.held = value.held

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = PretendTensor(self.held.clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            copied.grad = None if self.grad is None else PretendTensor(self.grad.held.clone())
            memo[id(self)] = copied
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Launches:
    """What happened on the device.

    Attributes:
        operations: kernels that would be launched, by name; a multi-tensor operation is one where CUDA makes it one.
        reads: operations for whose result the host would wait.
        uploads: copies from the CPU to the device.
        numbers: operations that took a number from a CPU tensor, which a CUDA graph would freeze.
        on_cpu: operations on CPU tensors alone.
    """

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()
        self.on_cpu: Counter[str] = Counter()


_open: list[Launches] = []


class _OnCpu(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_free(func) and func.namespace == "aten":
            on_device = any(isinstance(leaf, PretendTensor) for leaf in _leaves((args, kwargs)))
            if not on_device and torch.device(kwargs.get("device") or "cpu").type != DEVICE:
                _count("on_cpu", func)
        return func(*args, **kwargs)


@contextmanager
def counted() -> Iterator[Launches]:
    """Count what happens inside."""
    counts = Launches()
    _open.append(counts)
    try:
        with _OnCpu():
            yield counts
    finally:
        _open.remove(counts)


@cache
def _name(func: Any) -> str:
    return func.name().removeprefix("aten::").partition(".")[0]


@cache
def _is_free(func: Any) -> bool:
    return func.is_view or _name(func) in FREE


def _count(kind: str, func: Any, times: int = 1) -> None:
    for counts in _open:
        getattr(counts, kind)[_name(func)] += times


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, PretendTensor) else leaf


# In the place of torch's pytrees: an operation has no other containers, and it has many tensors.
def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for each in value for leaf in (_leaves(each) if isinstance(each, (list, tuple, dict)) else (each,))]


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, each) for each in value])
    if isinstance(value, dict):
        return {key: _mapped(change, each) for key, each in value.items()}
    return change(value)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = _name(func), _leaves((args, kwargs))
    on_cpu = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, PretendTensor)]
    _check_one_device(func, name, on_cpu, leaves)
    to_cpu = name == "_to_copy" and _is_cpu(kwargs.get("device"))
    from_device = name == "copy_" and not isinstance(args[0], PretendTensor)
    if to_cpu or from_device or name in READS or _has_mask(name, args):
        _count("reads", func)
    elif name == "copy_" and on_cpu:
        _count("uploads", func)
    elif on_cpu and name in INDEXING:
        _count("uploads", func)
    elif on_cpu:
        _count("numbers", func)
    if not _is_free(func) and name not in READS:
        _count("operations", func, _kernels(name, args))
    device = kwargs.get("device")
    kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    with _drawing(func, kwargs):
        held = func(*_mapped(_held, args), **_mapped(_held, kwargs))
    _note_float64(held, to_cpu)
    if to_cpu or (device is not None and _is_cpu(device)) or name in ("_local_scalar_dense", "equal", "is_nonzero"):
        return held
    mine = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, PretendTensor)}
    given = {id(leaf): leaf for leaf in on_cpu}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in given:
            return value
        # A conjugate is a flag, which only the tensor that is held would have.
        return mine.get(id(value)) if id(value) in mine else PretendTensor(value.resolve_conj().resolve_neg())

    return _mapped(wrapped, held)


@contextmanager
def _drawing(func: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """The operation draws from the device's own generator, if it has one."""
    module = registered()
    draws = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
    if module is None or not module.has_generator or not draws:
        yield
        return
    of_cpu = torch.get_rng_state()
    torch.set_rng_state(module.random_state)
    try:
        yield
    finally:
        module.random_state = torch.get_rng_state()
        torch.set_rng_state(of_cpu)


def _note_float64(held: Any, to_cpu: bool) -> None:
    """Note the line of vlearn that made a tensor of float64; an error would end the process in a backward pass."""
    module = registered()
    if module is None or module.float64_at is None or to_cpu:
        return
    if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in _leaves([held])):
        frames = [each for each in traceback.extract_stack() if each.filename.startswith(ROOM)]
        module.float64_at.add(f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "elsewhere")


def _check_one_device(func: Any, name: str, on_cpu: list[Tensor], leaves: list[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type != DEVICE:
            raise RuntimeError(f"Expected a {DEVICE!r} device type for generator but found {leaf.device.type!r}")
    if name in ("copy_", "_to_copy", "set_"):
        return
    several = [leaf for leaf in on_cpu if leaf.dim() > 0]
    if several and name not in INDEXING:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE}:0 and cpu! "
            f"({func.name()})"
        )


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _has_mask(name: str, args: Any) -> bool:
    """Whether a tensor is indexed by booleans, whose number decides the shape."""
    if name not in INDEXING:
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _kernels(name: str, args: Any) -> int:
    """How many kernels an operation is: a multi-tensor one is one for each tensor where CUDA's fast route is closed."""
    if not name.startswith("_foreach_"):
        return 1
    lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], Tensor)]
    copies = name == "_foreach_copy_"  # from one dtype to another, too
    for tensors in zip(*lists, strict=True):
        first = tensors[0]
        if any(t.shape != first.shape or t.stride() != first.stride() for t in tensors):
            return len(lists[0])
    for tensors in lists:
        if any(t.dtype != (tensors if copies else lists[0])[0].dtype or not _is_dense(t) for t in tensors):
            return len(lists[0])
    return 1


def _is_dense(tensor: Tensor) -> bool:
    held = _held(tensor)
    if held.is_contiguous():
        return True
    return held.permute(sorted(range(held.dim()), key=held.stride, reverse=True)).is_contiguous()


class _Module:
    """What torch asks of the module of a device; it is there only while a test has it."""

    available = False
    float64_at: set[str] | None = None  # lines that made tensors of float64 there, where they are noted
    has_generator = False  # else it draws from that of the CPU, and its numbers are those of the CPU
    random_state = torch.Generator().manual_seed(0).get_state()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.available

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.random_state = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any) -> Tensor:
        return self.random_state.clone() if self.has_generator else torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        if self.has_generator:
            self.random_state = state.clone()
        else:
            torch.set_rng_state(state)

    def device_count(self) -> int:
        return 1 if self.available else 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@cache
def registered() -> _Module | None:
    """Register the device with torch, once in a process and before its first backward pass; None where torch cannot.

    A backward pass begins threads for the devices that there are, and `fully_shard` uses any that there is: so the
    tests of this room have a process of their own, see `tests/test_accelerator.py`.
    """
    setup: Callable[..., None] | None = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        return None
    module = _Module()
    setup(DEVICE, backend_module=module)
    library = Library("aten", "IMPL")
    for overload in FACTORIES:
        library.impl(overload.name(), _factory(overload), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    setattr(module, "library", library)  # noqa: B010  its registrations end with it
    return module


def _factory(overload: Any) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        return _run(overload, args, {key: value for key, value in kwargs.items() if key != "pin_memory"})

    return make


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor(..., device=...)` ends in, which passes by tensor subclasses."""
    _run(aten.copy_.default, (to, source), {})
    return to


@contextmanager
def device() -> Iterator[torch.device]:
    """The device, while inside; the test is skipped where torch has no backends in Python."""
    module = registered()
    if module is None:
        pytest.skip(f"torch {torch.__version__} has no device that is written in Python")
    module.available = True
    try:
        yield torch.device(DEVICE)
    finally:
        module.available = module.has_generator = False
        module.float64_at = None
