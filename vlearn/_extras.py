"""Optional packages, imported only when something that needs them is called."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str, feature: str | None = None) -> ModuleType:
    """Import an optional module, or say how to install it.

    Args:
        module: dotted name of the module, for example ``"matplotlib.pyplot"``.
        extra: the extra of vlearn that brings it, for example ``"plot"``.
        feature: what needs it, as the error names it; default ``vlearn.{extra}``.

    Returns:
        The imported module.

    Raises:
        ImportError: if the package is not installed.
    """
    package = module.partition(".")[0]
    missing = f"{feature or f'vlearn.{extra}'} needs {package}: pip install 'vlearn[{extra}]'"
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(missing) from error
    # A folder of that name in the working directory (./wandb after a run) imports as an empty namespace.
    if imported.__file__ is None:
        raise ImportError(missing)
    return imported
