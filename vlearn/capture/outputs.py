"""The outputs of a model: tensors, or nested structures of them, of which a selector names one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlearn.capture.pytrees import tensor_leaves

Selector = str | int | Callable[[Any], Tensor] | None


def select(tree: Any, output: Selector) -> Tensor:
    """The tensor that `output` names in a model's output; None: the only one with rows, a loss beside it has none.

    Raises:
        ValueError: if it names none, or several are there and it is None.
    """
    if output is None:
        with_rows = [leaf for leaf in tensor_leaves(tree) if leaf.dim() > 0]
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
