"""All methods, by the packages that implement them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from benchmarks.attribution import ours
from benchmarks.reference.attribution import by_captum, by_dattri, by_kronfluence
from benchmarks.reference.attribution.method import Method
from vlearn._extras import require

METHODS: dict[str, Sequence[Method]] = {
    "vlearn": ours.METHODS,
    "kronfluence": by_kronfluence.METHODS,
    "dattri": by_dattri.METHODS,
    "captum": by_captum.METHODS,
}


def of(packages: Sequence[str]) -> list[Method]:
    """The methods of some packages.

    Raises:
        ImportError: if one is not installed.
    """
    for package in packages:
        require(package, "attribution", "benchmarks.attribution")
    return [method for package in packages for method in METHODS[package]]


def installed() -> list[str]:
    """The packages that are here."""
    return [package for package in METHODS if importlib.util.find_spec(package) is not None]
