"""MONAI hands its own subclass of tensors, with metadata, through the model; its engine is ignite's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vlearn
from tests.clients.problem import EXTRA, SETTINGS, SLOWER, SeenWeights, self_influence
from tests.oracles.per_example import relative_error

pytest.importorskip("monai", reason=EXTRA)
pytest.importorskip("ignite", reason=EXTRA)
from ignite.engine import Events  # noqa: E402
from monai.data import DataLoader, Dataset, MetaTensor  # noqa: E402
from monai.engines import SupervisedTrainer  # noqa: E402
from monai.losses import DiceLoss  # noqa: E402
from monai.networks.nets import UNet  # noqa: E402


def item(number: int) -> dict[str, MetaTensor]:
    """An image of 8 x 8 with a bright square, and where it is; each with an affine map and a name."""
    image = 0.3 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    label = torch.zeros_like(image)
    row, column = number % 5, number // 5 % 5
    label[:, row : row + 3, column : column + 3] = 1

    def marked(values: Tensor) -> MetaTensor:
        affine = (number + 1) * torch.eye(4, dtype=torch.float64)
        return MetaTensor(values, affine=affine, meta={"filename_or_obj": f"image {number}"})

    return {"image": marked(image + label), "label": marked(label)}


ITEMS = [item(number) for number in range(20)]


def loader() -> DataLoader:
    return DataLoader(Dataset(ITEMS), batch_size=5)


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(4, 8), strides=(2,)).double()


def dice(output: Tensor, target: Tensor) -> Tensor:
    """1 less twice the overlap over the sum of both sizes, of each example ``[N]``."""
    p, y = output.sigmoid().flatten(1), target.flatten(1)
    return 1 - (2 * (p * y).sum(1) + 1e-5) / (p.sum(1) + y.sum(1) + 1e-5)


class Run:
    """MONAI's own training loop around the optimizer, made from the parameters."""

    def __init__(self, kind: Any = vlearn.IVON, epochs: int = 1):
        self.network = network()
        self.seen = SeenWeights(self.network)
        settings = SETTINGS if kind is vlearn.IVON else SLOWER
        self.optimizer = kind(self.network.parameters(), **settings)
        self.trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=epochs,
            train_data_loader=loader(),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=DiceLoss(sigmoid=True),
        )

    def train(self) -> list[float]:
        losses: list[float] = []
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
        self.trainer.run()
        return losses


def test_the_engine_trains_on_batches_with_metadata() -> None:
    assert isinstance(next(iter(loader()))["image"], MetaTensor)
    losses = Run(epochs=40).train()
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


@pytest.mark.parametrize("kind", [vlearn.IVON, vlearn.VOGN])
def test_the_rows_of_a_step_are_the_oracle_s(kind: Any) -> None:
    run = Run(kind)
    run.train()
    rows = run.optimizer.sensitivities(deviation=True)
    batch = list(loader())[-1]
    image, label = batch["image"].as_tensor(), batch["label"].as_tensor()
    variance = run.optimizer.posterior().variance
    truth = self_influence(run.network, run.seen.by_name, variance, lambda m: m(image), lambda f: dice(f, label))
    assert relative_error(rows.self_influence, truth) < 1e-10
    assert all(type(each) is Tensor for each in (rows.residual, rows.self_influence, rows.deviation))


def test_a_sweep_of_batches_with_metadata_is_that_of_plain_ones() -> None:
    run = Run()
    run.train()
    posterior = run.optimizer.posterior()
    marked = [(batch["image"], batch["label"]) for batch in loader()]
    plain = [(image.as_tensor(), label.as_tensor()) for image, label in marked]
    tables = [
        vlearn.sweep(run.network, posterior, each, DiceLoss(sigmoid=True), progress=False) for each in (marked, plain)
    ]
    for name in ("loss", "loo_loss", "self_influence", "deviation"):
        of_marked, of_plain = (getattr(table, name) for table in tables)
        assert type(of_marked) is Tensor and torch.equal(of_marked, of_plain)
    image, label = plain[0]
    mean = {name: p.detach() for name, p in run.network.named_parameters()}
    truth = self_influence(run.network.eval(), mean, posterior.variance, lambda m: m(image), lambda f: dice(f, label))
    assert relative_error(tables[0].self_influence[:5], truth) < 1e-10
