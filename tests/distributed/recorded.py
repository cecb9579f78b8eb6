"""Lightning, Accelerate and the Trainer in two processes, recorded by the first."""

import gc
import sys
from typing import Any

import accelerate
import lightning
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from vlearn.integrations.lightning import SensitivityCallback as OfLightning
from vlearn.integrations.transformers import SensitivityCallback as OfTransformers

N = 22
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
Seen = list[tuple[torch.Tensor, torch.Tensor]]  # numbers, losses


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def numbers_of(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([(X == row).all(1).nonzero()[0, 0] for row in x])


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.seen: Seen = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        self.seen.append((numbers_of(batch[0]), losses.detach()))
        return losses.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def by_lightning(folder: str) -> tuple[Seen, nn.Module, Any]:
    module, callback = Classifier(), OfLightning(folder, sweeps=2)
    off = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    settings: Any = {"strategy": "ddp", "devices": 2, "accelerator": "cpu", "max_epochs": 2}
    trainer = lightning.Trainer(**settings, callbacks=[callback], **dict.fromkeys(off, False))
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 4, shuffle=True))
    return module.seen, module.net, callback.recorder


def by_accelerate(folder: str) -> tuple[Seen, nn.Module, Any]:
    accelerator, seen = accelerate.Accelerator(cpu=True), []
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(X, Y), 4, shuffle=True))
    with vlearn.Recorder(folder, model, optimizer, sweeps=2) as recorder:
        for _ in range(2):
            for x, y in recorder.follow(loader):
                losses = F.cross_entropy(model(x), y, reduction="none")
                seen.append((numbers_of(x), losses.detach()))
                accelerator.backward(losses.mean())
                optimizer.step()
                optimizer.zero_grad()
    return seen, model.module, recorder


class OfVectors(nn.Module):
    """A model as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.seen: Seen = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.net(x)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if torch.is_grad_enabled():
            self.seen.append((numbers_of(x), losses.detach()))
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=losses.mean(), logits=logits)  # pyright: ignore


def by_trainer(folder: str) -> tuple[Seen, nn.Module, Any]:
    model, callback = OfVectors(), OfTransformers(folder)
    settings: Any = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=4, num_train_epochs=2, ddp_backend="gloo", **settings
    )
    data: Any = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    return model.seen, model.net, callback.recorder


def main(folder: str) -> None:
    found: dict[str, Any] = {}
    for train in (by_lightning, by_accelerate, by_trainer):
        seen, model, recorder = train(f"{folder}/{train.__name__}")
        rank = torch.distributed.get_rank()
        found[train.__name__] = {
            "numbers": torch.cat([numbers for numbers, _ in seen]),
            "losses": torch.cat([losses for _, losses in seen]),
            "weights": [p.detach() for p in model.parameters()],
            "is_alone": rank == 0 and recorder.record is not None,
        }
        if rank:
            try:
                _ = recorder.record
            except RuntimeError as error:
                found[train.__name__]["refused"] = str(error)
    torch.save(found, f"{folder}/rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    gc.collect()
    torch.distributed.destroy_process_group()
