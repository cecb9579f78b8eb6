"""Tables of what IVON's step and sensitivities cost."""

from __future__ import annotations

from benchmarks.report.markdown import roughly, table
from benchmarks.report.records import read


def step() -> str:
    """Milliseconds of IVON's step, as multiples of ivon-opt's, and peak memory."""
    return _steps("step_cost", ("one thread", "two threads"))


def step_on_a_gpu() -> str:
    """The same on a GPU."""
    return _steps("step_cost_cuda", ("tensors of 1 million", "tensors of 16 million"), digits=1)


def _steps(name: str, titles: tuple[str, str], digits: int = 0) -> str:
    """Two runs beside each other, and the peak memory of the second, as in the picture."""
    labels = {
        "ivon-opt": "ivon-opt",
        "vlearn": "`vlearn.IVON`",
        "vlearn, compiled": "`vlearn.IVON(..., compiled=True)`",
        "AdamW foreach": "AdamW, `foreach`",
        "AdamW fused": "AdamW, `fused`",
    }
    one, two = read(name)["steps"].values()

    def time(row: dict[str, float], name: str) -> str:
        multiple = f", {row['of ivon-opt']:.2f}x" if name.startswith("vlearn") else ""
        return f"{row['step, ms']:.{digits}f} ms{multiple}"

    rows = [
        (label, time(one[key], key), time(two[key], key), f"{two[key]['peak, bytes per parameter']:.0f}")
        for key, label in labels.items()
    ]
    return table(("", *titles, "peak, bytes per parameter"), rows)


def batch_norm() -> str:
    """Rows with constant batch statistics beside those in eval mode."""
    agreement = read("batch_norm")["agreement"]
    rows = [(batch, *(f"{value:.3f}" for value in row.values())) for batch, row in agreement.items()]
    return table(("examples in a minibatch", *next(iter(agreement.values()))), rows)


def fits() -> str:
    """Seconds of an epoch of training, and multiples of it of every fit."""
    seconds = read("fit_cost")["seconds"]
    names = list(dict.fromkeys(name for row in seconds.values() for name in row))
    base = names[0]

    def cell(row: dict[str, float], name: str) -> str:
        if name not in row:
            return "-"
        return f"{row[name]:.1f} s" if name == base else f"{row[name] / row[base]:.2f}"

    rows = [(name, *(cell(row, name) for row in seconds.values())) for name in names]
    return table(("", *seconds), rows)


def influences() -> str:
    """Seconds of a sweep, multiples of it of all influences and of the largest, and the peak memory of each."""

    by_structure = read("influence_cost")["costs"]

    def cells(by_call: dict[str, dict[str, float]]) -> list[str]:
        base = by_call["sweep"]["seconds"]
        times = {call: f"{cost['seconds'] / base:.1f}" for call, cost in by_call.items()} | {"sweep": f"{base:.0f} s"}
        return [f"{times[call]}, {cost['peak, MiB']:.0f} MiB" for call, cost in by_call.items()]

    rows = [(f"`{structure}`", *cells(by_call)) for structure, by_call in by_structure.items()]
    return table(("", *next(iter(by_structure.values()))), rows)


def sensitivities() -> str:
    """Sensitivities in multiples of a plain forward and backward pass, one thread."""
    labels = {
        "watched, nothing asked": "a watched step, nothing asked",
        "live self-influence": "live self-influence",
        "live with deviation": "live, with V e",
        "sweep with LOO": "sweep with leave-one-out losses",
        "sweep with LOO and leverage": "sweep with leverage too",
    }
    others = {
        "vmap(grad)": "`vmap(grad)`: self-influence alone",
        "vmap(jacrev)": "`vmap(jacrev)`, the paper's code",
        "laplace-torch": "laplace-torch's functional variance",
    }
    by_network = read("sensitivity_cost")["multiples"]["threads=1"]
    rows = [(label, *(f"{row[name]:.2f}" for row in by_network.values())) for name, label in labels.items()]
    rows += [
        (label, *(roughly(row[name]) if name in row else "-" for row in by_network.values()))
        for name, label in others.items()
    ]
    return table(("", *by_network), rows)
