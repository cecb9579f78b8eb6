"""What has been found out about a model's passes, so that not each of them is looked at.

A kind is the sequence of recorded calls, the set of modules in train mode and the structure of the graph: a model that
comes to do something else makes another kind of pass, and is looked at again. Most is looked at once for each kind;
whether examples meet, again when its passes have doubled in number (`vlearn.per_example.independence`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

MOST_KINDS = 256  # a model whose calls are drawn at random has ever new ones


class UnattributedParameters(NamedTuple):
    """Tracked parameters that the recorded calls do not explain, or seem to explain and do not.

    Attributes:
        not_in_model: used, but of a module that is not in the model.
        used_outside_call: of the model, and used outside its module's own call.
        not_in_graph: of the model, and not seen in the graph.
        complex_parameters: of the model, and used.
        unused: those of modules that were called, but that the graph does not use; the calls do not explain them.
    """

    not_in_model: list[Tensor]
    used_outside_call: list[Tensor]
    not_in_graph: list[Tensor]
    unused: set[Tensor]
    complex_parameters: list[Tensor]


@dataclass
class ModelChecks:
    """The findings about one model, by kind of pass.

    Attributes:
        unattributed: the parameters that the recorded calls of a kind of pass do not explain.
        independent: how many passes have come of each kind in which no example's output depends on the other examples.
        example_rows: where an index gives the examples, by what the rows of each call go, see
            `vlearn.per_example.measured_rows`.
        example_axes: along which axes the examples lie in a kind of pass, see `vlearn.per_example.measured_axes`.
        with_examples: calls of layers, by path and number, whose input was seen to have examples.
        row_sums: kinds of passes in which the examples' gradients add up to that of the pass.
        deviations: kinds of passes in which the outputs' deviation agrees with the examples' gradients.
        takes_gradients: whether the next pass of a kind is to take its gradients for that; a first one does.
    """

    unattributed: dict[Any, UnattributedParameters] = field(default_factory=dict)
    independent: dict[Any, int] = field(default_factory=dict)
    example_rows: dict[Any, Any] = field(default_factory=dict)
    example_axes: dict[Any, Any] = field(default_factory=dict)
    with_examples: dict[Any, None] = field(default_factory=dict)
    row_sums: dict[Any, None] = field(default_factory=dict)
    deviations: dict[Any, None] = field(default_factory=dict)
    takes_gradients: dict[Any, bool] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> ModelChecks:
        """The findings about the module whose call a pass began with."""
        return _checks_of.setdefault(model, ModelChecks())


_checks_of: WeakKeyDictionary[nn.Module, ModelChecks] = WeakKeyDictionary()


def remember(findings: dict[Any, Any], kind: Any, finding: Any = None) -> None:
    """Keep what was found about a kind of pass, of `MOST_KINDS` at most."""
    if len(findings) >= MOST_KINDS:
        findings.clear()
    findings[kind] = finding
