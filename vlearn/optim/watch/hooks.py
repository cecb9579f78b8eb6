"""The hooks that a watch puts on every submodule of the user's model.

They go through a `Link`, which survives copying: (model, optimizer) copied together stay watched, a model copied
alone is at the mean and inert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlearn.optim.kernels.entries import is_same_memory
from vlearn.optim.sampling.draw import Draw


class Watcher(Protocol):
    """What the hooks of a model call."""

    @property
    def draw(self) -> Draw | None:
        """The draw that waits for step()."""
        ...

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is about to run."""
        ...

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module has run, or an exception left it."""
        ...

    def put_mean(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """A module's entries of a state_dict are there."""
        ...

    def weights_loaded(self) -> None:
        """A module's weights are about to be loaded."""
        ...

    def at_mean(self) -> AbstractContextManager[None]:
        """A context in which the weights are the mean."""
        ...


class Link:
    """What a module's hooks hold: the watch, if there is one.

    Args:
        module: the module; None in a copy, which is inert until a watch binds it.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.watch: Watcher | None = None
        self._module = ref(module) if module is not None else lambda: None

    # A compiled model calls the hooks between its graphs; traced into them they would change weights at every call
    # but flags only once.
    @torch.compiler.disable
    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of a module."""
        if self.watch is not None:
            self.watch.before(module, args, kwargs)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of a module."""
        if self.watch is not None:
            self.watch.after(module, args, kwargs, output)

    def weights_at_mean(self) -> AbstractContextManager[None]:
        """See `vlearn.capture.hooks.weights_at_mean`."""
        return nullcontext() if self.watch is None else self.watch.at_mean()

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        # The module's parameters are copied before its hooks: put the mean into the copies.
        draw = self.watch.draw if self.watch is not None else None
        for piece in draw.slices if draw is not None else ():
            copied = memo.get(id(piece.parameter))
            if copied is not None and not piece.mean_in_weights:
                piece.of(copied.data).copy_(piece.mean)
        memo[id(self)] = link = Link()
        return link

    def __reduce__(self) -> tuple[Callable[..., Link], tuple[Any, ...]]:
        # A pickled module has the parameters as they are: put the mean into them where they are loaded.
        draw, module = self.watch.draw if self.watch is not None else None, self._module()
        if draw is None or module is None:
            return Link, ()
        means = draw.means()
        own = {p: means[p] for p in module._parameters.values() if p is not None and p in means}
        return _link_at_mean, ([(p, mean) for p, mean in own.items() if not is_same_memory(p, mean)],)


def _link_at_mean(means: list[tuple[Tensor, Tensor]]) -> Link:
    """A new link in a module that is being loaded, whose parameters were pickled with a draw in them."""
    for p, mean in means:
        p.data.copy_(mean)
    return Link()


class StateDictMean:
    """State-dict hook of one module: its entries hold the mean."""

    def __init__(self, link: Link):
        self.link = link

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        """The entries of a module are in the state_dict."""
        if self.link.watch is not None:
            self.link.watch.put_mean(module, state_dict, prefix)


class DiscardDraw:
    """Hook of load_state_dict: loaded weights are the mean, so a draw that waits is void."""

    def __init__(self, link: Link):
        self.link = link

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """The weights of a module are about to be loaded."""
        if self.link.watch is not None:
            self.link.watch.weights_loaded()


def hook(modules: Iterable[nn.Module]) -> tuple[list[Link], list[Any]]:
    """Put the hooks on modules: (their links, their handles).

    On every submodule of a model: the user may call any of them first, as the network inside a LightningModule.
    """
    links, handles = [], []
    for module in modules:
        # The wrapper's own part of a pass talks to other processes, which a replay or a probe must not repeat.
        if isinstance(module, DistributedDataParallel):
            continue
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; the module around it is seen
            continue
        link: Any = Link(module)  # the type of what torch.compiler.disable makes of its methods is lost
        links.append(link)
        handles += [
            # First of all hooks: others may compute weights from the parameters, or change inputs and outputs.
            module.register_forward_pre_hook(link.before, with_kwargs=True, prepend=True),
            module.register_forward_hook(link.after, with_kwargs=True, always_call=True, prepend=True),
            module.register_state_dict_post_hook(StateDictMean(link)),
            module.register_load_state_dict_pre_hook(DiscardDraw(link)),
        ]
    return links, handles


class MeanCopies:
    """Copies of the mean for the entries of one state_dict after another, in which tied entries share one tensor."""

    def __init__(self) -> None:
        self._of: tuple[Callable[[], Any], dict[Tensor, Tensor]] = (lambda: None, {})

    def put(self, draw: Draw, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace a module's entries by copies of the mean while a draw is in the weights."""
        if self._of[0]() is not state_dict:
            self._of = (_weak(state_dict), {})
        copies = self._of[1]
        for name, p in module._parameters.items():
            slices = draw.slices_of.get(p, []) if p is not None else []
            entry = state_dict.get(prefix + name)
            if p is None or entry is None or not is_same_memory(p, entry):
                continue
            if all(piece.mean_in_weights for piece in slices):
                continue
            if p not in copies:
                copies[p] = p.detach().clone()
                for piece in slices:
                    piece.of(copies[p]).copy_(piece.mean)
            state_dict[prefix + name] = copies[p]


def _weak(state_dict: dict[str, Any]) -> Callable[[], Any]:
    try:
        return ref(state_dict)
    except TypeError:  # a plain dict as destination: tied entries are copied one by one
        return lambda: None
