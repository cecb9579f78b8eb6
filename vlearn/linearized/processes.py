"""The processes that go through one data set together, each through its own share of it.

Each goes through its own batches, however many it has, and then all say how it went: a process that has met an error
says so there, in the place of leaving the others waiting.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from vlearn._torch_internals import is_sharded
from vlearn.capture.names import named_parameters
from vlearn.collectives import Together, process_count
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.covariance_blocks import Block
from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.protocol import Posterior
from vlearn.per_example.replay import placed
from vlearn.sharded.whole_model import is_sharded_model, whole_model

Kind = tuple[torch.Size, torch.dtype]


class Processes(Together):
    """The processes that do one thing together.

    Args:
        model: the network, as it was given.
        sync: whether there may be others than this one.
        what: they do together, as "fit".

    Attributes:
        model: the network without DistributedDataParallel, which would talk to the others in every forward pass.
    """

    def __init__(self, model: nn.Module, sync: bool, what: str):
        wrapper = model if isinstance(model, DistributedDataParallel) else None
        self.model: nn.Module = model if wrapper is None else wrapper.module
        group = None
        if sync and process_count() > 1:
            group = distributed.group.WORLD if wrapper is None else wrapper.process_group
        super().__init__(group, what)
        self._shares_buffers = wrapper is not None and wrapper.broadcast_buffers

    def check_posterior(self, covariance: Covariance) -> None:
        """Raise ValueError in all if their posteriors differ in more than rounding."""
        networks = self.each(lambda: Fingerprint.of(self.model, covariance)) if self.group else []
        if any(networks[0].difference(network) for network in networks):
            raise ValueError(
                "the posteriors differ between the processes: load the same one in all, or fit it to the data of all "
                "by posterior.fit(..., sync=True)."
            )

    @contextmanager
    def alike(self, settings: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Nothing but the data differs between the processes inside.

        Buffers do where DistributedDataParallel has trained them: it gives all processes the first one's in every
        forward pass, and so they have them inside.

        Args:
            settings: checks the arguments, and gives those that must agree.
        Raises:
            ValueError: if something differs, in all processes.
        """
        if self.group is None:
            settings()
            yield
            return
        buffers = dict(self.model.named_buffers())

        def own() -> list[dict[str, Any]]:
            if any(isinstance(module, DistributedDataParallel) for module in self.model.modules()):
                raise ValueError(
                    "a DistributedDataParallel module inside the model would talk to the other processes in every "
                    "forward pass: pass that module itself, or the one inside it."
                )
            parameters = {name: (p.requires_grad, *_fingerprint(p)) for name, p in named_parameters(self.model)}
            return [parameters, {name: _fingerprint(buffer) for name, buffer in buffers.items()}, dict(settings())]

        told = self.each(own)
        for values, check in zip(zip(*told, strict=True), (_parameter, self._buffer, self._argument), strict=True):
            for name in dict.fromkeys(name for each in values for name in each):
                check(name, [each.get(name) for each in values])
        of_first = {buffer: buffer.detach().clone() for buffer in buffers.values() if self._shares_buffers}
        for copied in of_first.values():
            distributed.broadcast(copied, distributed.get_global_rank(self.group, 0), group=self.group)
        with placed(of_first):
            yield

    def _argument(self, name: str, values: list[Any]) -> None:
        if _differ(values):
            raise ValueError(
                f"{name} is {', '.join(map(repr, values))} in the processes: call {self.what} with the same arguments "
                "in all."
            )

    def _buffer(self, name: str, values: list[Any]) -> None:
        """Check the buffers of a name of all processes, None where there is none."""
        kinds = [None if value is None else value[0] for value in values]
        if _differ(kinds if self._shares_buffers else values):
            raise ValueError(
                f"the buffer {name!r} differs between the processes: load the same checkpoint in all, or pass the "
                "DistributedDataParallel module itself, which takes the first one's."
            )

    def own_generator(self, given: torch.Generator | None, device: torch.device) -> torch.Generator | None:
        """Of random numbers that no other process has, also where all are seeded alike."""
        if self.group is None:
            return given
        source = torch.device("cpu") if given is None else given.device
        seeds = torch.randint(2**62, (distributed.get_world_size(self.group),), generator=given, device=source)
        return torch.Generator(device).manual_seed(int(seeds[self.rank]))


def whole_network(model: nn.Module, posterior: Posterior | None = None) -> tuple[nn.Module, Any]:
    """The model and its posterior; where `fully_shard` has sharded the model, copies with whole weights and means.

    All processes that have shards must ask for them. After that no process waits for another. The weights are the mean
    also while an optimizer's draw is in the model.

    Raises:
        TypeError: if the model is none.
        RuntimeError: if tensor parallelism has sharded it.
    """
    _check_module(model)
    if not is_sharded_model(model):
        return model, posterior
    entries = model.state_dict()
    named = dict(model.named_parameters(remove_duplicate=False))
    whole = whole_model(model, {p: entries[name] for name, p in named.items() if name in entries})
    known = posterior.parameters if isinstance(posterior, Gaussian) else {}
    own = {name: p for name, p in known.items() if p in whole.parameter_of}
    if isinstance(posterior, Gaussian) and own:
        posterior = copy.copy(posterior)
        posterior.belong_to({name: whole.parameter_of[p] for name, p in own.items()})
    return whole.module_of[model], posterior


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, but it must be the nn.Module that was trained.")


def check_whole(model: nn.Module) -> None:
    """Raise RuntimeError if a model is sharded: its layers have their weights but for a moment.

    Raises:
        TypeError: if it is no model.
    """
    _check_module(model)
    if is_sharded_model(model):
        raise RuntimeError(
            "the model is sharded over processes (fully_shard, tensor parallelism), but the whole network is needed "
            "here: pass one that is not, with a copy of the posterior (Gaussian.belong_to)."
        )


@dataclass(frozen=True)
class Fingerprint:
    """What tells two networks and their posteriors apart.

    Attributes:
        weights: a hash of the values of all parameters and buffers.
        scales: 1ᵀΣ1 of each block of Σ, which rounding may change a little.
    """

    weights: str
    scales: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, covariance: Covariance) -> Fingerprint:
        """That of a model which is at the mean."""
        digest = hashlib.sha256()
        for _, tensor in (*named_parameters(model), *model.named_buffers()):
            digest.update(_fingerprint(tensor)[1].encode())

        def scale(block: Block) -> float:
            ones = [block.variances.new_ones(1, *shape) for shape in block.shapes]
            return float(block.quadratic(ones))

        scales = [scale(block) for _, block in covariance.blocks]
        return cls(digest.hexdigest(), tuple(scales))

    def difference(self, other: Fingerprint) -> str | None:
        """What differs, None if nothing does."""
        if self.weights != other.weights:
            return "their weights or buffers"
        alike = len(self.scales) == len(other.scales) and all(map(_is_close, self.scales, other.scales))
        return None if alike else "their posteriors' variances"


def same_network(told: list[Fingerprint | None], what: str) -> Fingerprint | None:
    """The network that all processes have; None where none is known.

    Args:
        told: by each, None where it does not know.
        what: they have done, as "swept".
    Raises:
        ValueError: if they differ.
    """
    known = [network for network in told if network is not None]
    different = [difference for network in known if (difference := known[0].difference(network))]
    if different:
        raise ValueError(
            f"the processes have {what} different networks ({different[0]} differ): load the same checkpoint and the "
            "same posterior in all (posterior.fit(..., sync=True)), or pass the DistributedDataParallel module with "
            "sync=True, by which all have the first one's buffers."
        )
    return known[0] if known else None


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4)


def _fingerprint(tensor: Tensor) -> tuple[Kind, str]:
    """What two tensors share if they are equal, bit for bit: shape and dtype, and a hash of the values.

    Raises:
        ValueError: of a part of a parameter.
    """
    if is_sharded(tensor):
        raise ValueError(
            "the parameters are sharded over processes (FSDP, tensor parallelism), but each needs the whole network: "
            "pass one that is not."
        )
    values = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    return (tensor.shape, tensor.dtype), hashlib.sha256(values.data).hexdigest()


def _parameter(name: str, values: list[Any]) -> None:
    if _differ(values):
        raise ValueError(
            f"the parameter {name!r} differs between the processes, which would look at different networks: load the "
            "same checkpoint in all, and freeze the same parameters."
        )


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)
