"""How results that hold whole columns show themselves: by the shapes of these."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

MANY = 3  # entries of a list or dict that are shown


class ShortRepr:
    """A dataclass, made with repr=False, that shows columns by their shapes and leaves out what is None.

    Examples:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> @dataclass(repr=False)
        ... class Rows(ShortRepr):
        ...     index: torch.Tensor
        ...     leverage: torch.Tensor | None = None
        ...     step: int = 0
        >>> Rows(torch.arange(4))
        Rows(index=[4], step=0)
    """

    def __repr__(self) -> str:
        named: Any = {field.name: getattr(self, field.name) for field in fields(self) if field.repr}  # type: ignore[arg-type]
        shown = [f"{name}={_shown(value)}" for name, value in named.items() if value is not None]
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return str(list(value.shape))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | dict) and (len(value) > MANY or any(isinstance(each, Tensor) for each in value)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_shown(entry)}" for key, entry in value.items()) + "}"
    return repr(value)
