"""Tables of the optimizers side by side: what each predicts, and what its step costs."""

from __future__ import annotations

from typing import Any

from benchmarks.report.markdown import percent, short, table
from benchmarks.report.records import RESULTS, read

KRONECKER, DIAGONAL = "SGD + Laplace, Kronecker", "SGD + Laplace, diagonal"


def fashion_mnist() -> str:
    """5,000 images of Fashion-MNIST, by every method."""
    labels = {
        "SGD": "SGD",
        KRONECKER: KRONECKER,
        DIAGONAL: DIAGONAL,
        "SGD + fit, Kronecker": "SGD + `posterior.fit`, Kronecker",
        "SGD + fit, with the training time": "the same, with the training time",
        "AdamW": "AdamW, √v̂ as its posterior",
        "ivon-opt": "ivon-opt",
        "VAdamW": "`vlearn.VAdamW`",
        "IVON": "`vlearn.IVON`",
        "EVON": "`vlearn.EVON`",
        "VON": "`vlearn.VON`",
        "VOGN": "`vlearn.VOGN`",
        "KFACVON": "`vlearn.KFACVON`",
        "EK-FAC": "`vlearn.KFACVON`, EK-FAC",
    }
    rows = read("family/fashion-mnist-5k")["table"]
    header = (
        "",
        "accuracy at the mean",
        "test loss: mean, draws",
        "calibration error: mean, draws",
        "leave-one-out less test loss",
    )
    return table(
        header,
        [
            (label, percent(rows[name]["mean"]["accuracy"]), _losses(rows[name]), _errors(rows[name]), _gap(rows[name]))
            for name, label in labels.items()
        ],
    )


PICKED = {
    "SGD": ("`torch.optim.SGD`", "for comparison"),
    "AdamW": ("`torch.optim.AdamW`", "for comparison"),
    "VAdamW": (
        "`vlearn.VAdamW`",
        "in doubt, and wherever you would take AdamW: its settings, its loss, a posterior beside it",
    ),
    "IVON": (
        "`vlearn.IVON`",
        "leave-one-out is to follow the test loss on many examples, at the cost of Adam; ivon-opt's code",
    ),
    "EVON": ("`vlearn.EVON`", "training from scratch, for half as much time again; draws that predict; any layer"),
    "VON": ("`vlearn.VON`", "the curvature should carry little noise and forget `hess_init`"),
    "VOGN": ("`vlearn.VOGN`", "the loss is no likelihood; tempering, damping, augmentation"),
    "KFACVON": ("`vlearn.KFACVON`", "leave-one-out on few examples; draws that need correlations within a layer"),
    "FullVON": ("`vlearn.FullVON`", "up to a few thousand parameters: the exact posterior of a linear model"),
}


def family() -> str:
    """Each optimizer in a line: when to pick it, and its test loss on 5,000 images of Fashion-MNIST."""
    rows = read("family/fashion-mnist-5k")["table"]

    def loss(name: str) -> str:
        if name not in rows:
            return ""
        of_draws = PICKED[name][0].startswith("`vlearn")
        return short(rows[name]["mean"]["nll_by_draws" if of_draws else "nll"], 3)

    return table(
        ("optimizer", "pick it when", "test loss"),
        [(label, when, loss(name)) for name, (label, when) in PICKED.items()],
    )


def digits() -> str:
    """Digits, by every method."""
    rows = read("family/digits")["table"]
    header = (
        "",
        "accuracy: mean, draws",
        "test loss: mean, draws",
        "calibration error: mean, draws",
        "leave-one-out",
        "less test loss",
    )
    return table(
        header,
        [
            (
                name.replace("beta2", "`beta2`"),
                _both(rows[name], "accuracy", percent),
                _losses(rows[name]),
                _errors(rows[name]),
                short(rows[name]["mean"]["loo_loss"], 3) if "loo_loss" in rows[name]["mean"] else "",
                _gap(rows[name]),
            )
            for name in rows
        ],
    )


TASKS = {
    "mlp": "power plant, MLP",
    "lenet": "Fashion-MNIST, LeNet-5",
    "vit": "Fashion-MNIST, ViT of timm",
    "unet": "three garments, U-Net with BatchNorm",
    "gpt": "tinyshakespeare, GPT",
    "gru": "tinyshakespeare, GRU",
    "embedding": "embeddings of passages (InfoNCE)",
    "ft-transformer": "kin8nm, FT-Transformer",
    "lora": "lines in capitals, GPT-2 with LoRA",
    "resnet": "CIFAR-10, ResNet with GroupNorm",
    "bert": "tenths of tinyshakespeare, BERT",
    "ppo": "CartPole, PPO: mean return, at best 500",
}


def recorded() -> list[dict[str, Any]]:
    """What every method reached in other people's networks, of each task that has been run."""
    return [read(f"defaults/{name}")["methods"] for name in TASKS if (RESULTS / f"defaults/{name}.json").exists()]


def largest_excess(which: str = "line") -> float:
    """By how much VAdamW's validation loss is above AdamW's at most, by the line or tuned, as a share."""
    return max(
        methods["VAdamW"][which]["mean"]["loss"] / methods["AdamW"][which]["mean"]["loss"] - 1
        for methods in with_data()
    )


def with_data() -> list[dict[str, Any]]:
    """Those of the recorded tasks that have a validation loss, not a return."""
    return [methods for methods in recorded() if "return" not in methods["AdamW"]["line"]["mean"]]


def lines() -> str:
    """The line to begin with for each kind of network, and what it reached."""
    of_task = {name: read(f"defaults/{name}")["methods"] for name in TASKS}

    def loss(name: str, method: str, which: str, quantity: str = "loss") -> float:
        return of_task[name][method][which]["mean"][quantity]

    of_evon = [
        f"{TASKS[name].partition(', ')[2]} {short(loss(name, 'EVON', 'line'), 3)} "
        f"(AdamW {short(loss(name, 'AdamW', 'line'), 3)}, tuned {short(loss(name, 'AdamW', 'tuned'), 3)})"
        for name in ("gpt", "gru", "ft-transformer", "vit", "mlp", "lenet")
    ]
    wide, drawn = (short(loss("lenet", "EVON, ess=T", "line", quantity), 3) for quantity in ("loss", "loss_by_draws"))
    count = len(with_data())
    gap = short(read("generalization/fashion-mnist")["table"]["IVON"]["mean"]["mean_absolute_gap"], 3)
    rows = [
        (
            "whatever AdamW trains: transformers, fine-tuning, tabular data, embeddings, policies",
            "`VAdamW(model, lr=1e-3, num_data=N)`, with AdamW's own lr",
            f"a loss at most {percent(largest_excess())} above AdamW's on {count} tasks; PPO solves CartPole",
        ),
        (
            "whatever is trained from scratch",
            "`EVON(model, lr=2, num_data=N)`",
            f"{'; '.join(of_evon)}, which overfits: with ess=N {wide}, and {drawn} by the draws",
        ),
        (
            "images, where leave-one-out is to follow the test loss",
            "`IVON(model, lr=0.1, ess=N)`",
            f"mean gap of {gap} nats over a whole run on Fashion-MNIST, with `hess_init=0.1`",
        ),
    ]
    return table(("network", "line", "measured"), rows)


def defaults() -> str:
    """One line in other people's networks: validation losses, and a policy's return, of the tasks that are recorded."""
    columns = [("AdamW", "line"), ("VAdamW", "line"), ("EVON", "line"), ("EVON, ess=T", "line")]
    columns += [("AdamW", "tuned"), ("VAdamW", "tuned"), ("EVON", "tuned"), ("SOAP", "tuned"), ("SGD", "tuned")]
    columns += [("ivon-opt", "line")]
    rows = []
    for name, label in TASKS.items():
        methods = read(f"defaults/{name}")["methods"]
        means = [methods.get(method, {}).get(which, {}).get("mean", {}) for method, which in columns]
        rows.append((label, *(_loss_or_return(mean) for mean in means)))
    return table(("", *(f"{method}, {which}" for method, which in columns)), rows)


def _loss_or_return(mean: dict[str, float]) -> str:
    if mean.get("loss") is None:
        return ""
    return f"{mean['return']:.0f}" if "return" in mean else short(mean["loss"], 3)


def defaults_calibration() -> str:
    """Validation loss and calibration error of the mean and of the draws' average, where there are classes."""
    columns = [("AdamW", "tuned"), ("SOAP", "tuned"), ("VAdamW", "tuned"), ("EVON", "line"), ("EVON, ess=T", "line")]
    rows = []
    for name, label in TASKS.items():
        methods = read(f"defaults/{name}")["methods"]
        if "calibration_error" in methods["AdamW"]["line"]["mean"]:
            cells = [_calibration(methods[method][which]["mean"]) for method, which in columns]
            rows.append((label, *cells))
    return table(("", *(f"{method}, {which}" for method, which in columns)), rows)


def defaults_leave_one_out() -> str:
    """Training, leave-one-out and held-out loss by vlearn's lines, where there are classes."""
    rows = []
    for name, label in TASKS.items():
        if (RESULTS / f"defaults/leave_one_out/{name}.json").exists():
            methods = read(f"defaults/leave_one_out/{name}")["methods"]
            rows.append((label, *(_three_losses(found["mean"]) for found in methods.values())))
    return table(("train / LOO / held-out loss", "VAdamW, line", "EVON, line", "EVON, ess=T, line"), rows)


def _three_losses(mean: dict[str, float]) -> str:
    losses = (mean[key] for key in ("train_loss", "loo_loss", "held_out_loss"))
    return " / ".join("refused" if loss is None else short(loss, 3) for loss in losses)


def _calibration(mean: dict[str, float]) -> str:
    """ "loss, error" of the mean, and those of the draws after a slash."""
    pairs = [(mean["loss"], mean["calibration_error"])]
    if "loss_by_draws" in mean:
        pairs.append((mean["loss_by_draws"], mean["calibration_error_by_draws"]))
    return " / ".join(f"{short(loss, 3)}, {short(error, 3)}" for loss, error in pairs)


def cost() -> str:
    """A training step in multiples of SGD's, by the number of threads."""
    names = ("AdamW", "ivon-opt", "IVON", "VAdamW", "SOAP", "EVON", "VOGN", "VON", "KFACVON", "EK-FAC")
    steps = read("family/cost")["steps"]
    rows = [
        (threads.removeprefix("threads="), *(f"{by_name[name]['of SGD']:.2f}" for name in names))
        for threads, by_name in steps.items()
    ]
    return table(("threads", *names), rows)


def _both(row: dict[str, Any], quantity: str, shown: Any) -> str:
    """A quantity at the mean and, of a posterior, by its draws."""
    names = (quantity, f"{quantity}_by_draws")
    return ", ".join(shown(row["mean"][name]) for name in names if name in row["mean"])


def _losses(row: dict[str, Any]) -> str:
    return _both(row, "nll", lambda value: short(value, 3))


def _errors(row: dict[str, Any]) -> str:
    return _both(row, "ece", percent)


def _gap(row: dict[str, Any]) -> str:
    if "loo_gap" not in row["mean"]:
        return ""
    return f"{short(row['mean']['loo_gap'], 3, sign=True)} ± {short(row['deviation']['loo_gap'], 3)}"


def continual() -> str:
    """Test accuracies on split digits, and of merging."""
    found = read("continual")

    def cell(result: dict[str, float] | None) -> str:
        return "" if result is None else f"{100 * result['mean']:.1f} ± {100 * result['error']:.1f}"

    ways = ("without", "with prior", "at once")
    titles = [f"{problem}: {way}" for problem in found["continual"] for way in ways]
    names = list(next(iter(found["continual"].values())))
    rows = [
        (name, *(cell(each[name].get(way)) for each in found["continual"].values() for way in ways)) for name in names
    ]
    return table(("test accuracy in %", *titles), rows)


def merging() -> str:
    """Test accuracies of two sites, averaged and merged."""
    merging = read("continual")["merging"]
    cells = [f"{100 * result['mean']:.1f} ± {100 * result['error']:.1f}" for result in merging.values()]
    return table(("two sites", *merging), [("test accuracy in %", *cells)])
