"""Nested structures of tensors: what modules are called with and what they return, of which a selector names one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Selector = str | int | Callable[[Any], Tensor] | None


MAKES_ITS_OWN = (
    "makes a tensor of its own, but it must return one of the tensors in the model's output as it is: do the rest in "
    "the loss, or in a module around the model."
)


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors of a nested structure of tuples, lists, dicts and registered dataclasses."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in (tuple, list):  # what calls are made of; the general walk costs ten times as much
        return [leaf for item in tree for leaf in tensor_leaves(item)]
    if not tree:
        return []
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def plain(leaf: Any) -> Any:
    """A tensor without its subclass, as MONAI's MetaTensor; all else as it is.

    Such a class has its own way with every operation, and per-example algebra is not to depend on it. One that holds
    its entries in another way (`__torch_dispatch__`) is nothing without it and stays.
    """
    if type(leaf) is Tensor or not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
        return leaf
    holds_entries = leaf.__torch_dispatch__ is Tensor.__torch_dispatch__  # pyright: ignore
    return Tensor.as_subclass(leaf, Tensor) if holds_entries else leaf


def detached(tree: Any) -> Any:
    """The same structure with its tensors detached and plain."""
    if isinstance(tree, Tensor):
        return plain(tree).detach()
    if type(tree) in (tuple, list):
        return type(tree)(map(detached, tree))
    if not tree:
        return tree
    return tree_map(lambda leaf: plain(leaf).detach() if isinstance(leaf, Tensor) else leaf, tree)


def rows_of(tree: Any, axes: Sequence[int | None], examples: slice | list[int] | Tensor) -> Any:
    """The same structure with some of the examples of each leaf that has them along an axis.

    Args:
        axes: that axis of each leaf, None where there is none.
    """
    leaves, structure = tree_flatten(tree)
    return tree_unflatten(
        [rows_along(leaf, axis, examples) for leaf, axis in zip(leaves, axes, strict=True)], structure
    )


def rows_along(leaf: Any, axis: int | None, examples: slice | list[int] | Tensor) -> Any:
    """A leaf with some of its examples, if it has any: they lie along the given axis."""
    return leaf if axis is None else leaf[(slice(None),) * axis + (examples,)]


def shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of each tensor."""
    return tuple(tuple(leaf.shape) for leaf in tensor_leaves(tree))


def versions(tree: Any) -> list[int]:
    """How often each tensor has been written in place."""
    return [leaf._version for leaf in tensor_leaves(tree)]


def with_leaves(tree: Any, tensors: Mapping[int, Any], others: bool = True) -> Any:
    """The same structure with some of its tensors replaced.

    Args:
        tensors: what stands in for a tensor, by its place among the structure's tensors.
        others: whether all other leaves stay; else they become None.
    """
    leaves, structure = tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    replaced = leaves if others else [None] * len(leaves)
    for place, tensor in tensors.items():
        replaced[places[place]] = tensor
    return tree_unflatten(replaced, structure)


def _is_among(tensor: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a tensor is one of others, or a view of one."""
    if any(tensor is leaf for leaf in leaves):
        return True
    return any(tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr() for leaf in leaves)


def select(tree: Any, output: Selector, may_compute: bool = False) -> Tensor:
    """The tensor that `output` names in a model's output; None: the only one with rows, a loss beside it has none.

    Args:
        may_compute: a callable may make a tensor of its own, where nothing is differentiated.

    Raises:
        ValueError: if it names none, or several are there and it is None, or a callable makes a tensor of its own.
    """
    if output is None:
        leaves = tensor_leaves(tree)
        with_rows = [leaf for leaf in leaves if leaf.dim() > 0]
        if leaves and not with_rows:
            raise ValueError(
                "the model gives the loss alone, and no output with a row for each example: where each has a loss of "
                "its own, watch the module inside that gives the output, or return it beside the loss."
            )
        if not with_rows:
            raise ValueError(
                "the loss depends on no tensor in the model's output: return tensors, or tuples or dicts of them, and "
                "do not write them in place."
            )
        if len(with_rows) > 1:
            raise ValueError(
                f"the model gives {len(with_rows)} outputs that the loss depends on: select the one that residual and "
                "deviation speak of with output=<key, index or callable>."
            )
        return with_rows[0]
    if callable(output):
        chosen = output(tree)
        if isinstance(chosen, Tensor) and not may_compute and not _is_among(chosen, tensor_leaves(tree)):
            raise ValueError(f"output= {MAKES_ITS_OWN}")
    elif isinstance(tree, Tensor):  # an index would name an example
        chosen = None
    elif isinstance(output, str) and not isinstance(tree, dict):
        chosen = getattr(tree, output, None)
    else:
        try:
            chosen = tree[output]
        except (LookupError, TypeError):
            chosen = None
    if not isinstance(chosen, Tensor):
        raise ValueError(f"output={output!r} selects no tensor that the loss depends on.")
    return chosen
