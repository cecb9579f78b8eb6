"""Lightning and Accelerate wrap the model themselves, so the optimizer has only seen the network or its parameters."""

import gc
import sys
from typing import Any

import accelerate
import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(64, 6, generator=generator), torch.randint(0, 3, (64,), generator=generator))


def state(optimizer: vlearn.IVON) -> torch.Tensor:
    means = [p.detach().flatten() for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([*means, *(each["hessian"].flatten() for each in optimizer.state.values())])


class Classifier(lightning.LightningModule):
    def __init__(self, shared: bool):
        super().__init__()
        self.net, self.shared = network(), shared

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> vlearn.IVON:
        self.made = vlearn.IVON(self.net, lr=0.1, ess=64, beta2=0.99, shared_noise=self.shared)
        return self.made

    def on_train_batch_end(self, *_: Any) -> None:
        self.made.sensitivities()


def by_lightning(shared: bool, clip: bool) -> torch.Tensor:
    module = Classifier(shared)
    off = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    trainer = lightning.Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=2,
        gradient_clip_val=0.1 if clip else None,
        accumulate_grad_batches=2,
        **dict.fromkeys(off, False),
    )
    trainer.fit(module, DataLoader(dataset(), batch_size=8))
    return state(module.made)


def by_accelerate(shared: bool, clip: bool) -> torch.Tensor:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = vlearn.IVON(model.parameters(), lr=0.1, ess=64, beta2=0.99, shared_noise=shared)
    optimizer.watch(model, loss_scale=1 / 2)
    wrapper, prepared, loader = accelerator.prepare(model, optimizer, DataLoader(dataset(), batch_size=8))
    for x, y in loader:
        with accelerator.accumulate(wrapper):
            accelerator.backward(F.cross_entropy(wrapper(x), y))
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapper.parameters(), 0.1)
            prepared.step()
            prepared.zero_grad()
        optimizer.sensitivities()
    return state(optimizer)


def main(folder: str) -> None:
    found: dict[str, Any] = {}
    for train in (by_lightning, by_accelerate):
        for shared, clip in ((False, False), (True, True), (False, True)):
            try:
                found[f"{train.__name__}, shared={shared}, clip={clip}"] = train(shared, clip)
            except RuntimeError as error:
                found[f"{train.__name__}, shared={shared}, clip={clip}"] = str(error)
    torch.save(found, f"{folder}/rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    # A wrapper that lives (here in an error's frame) keeps the group's threads; one that outlives Python may abort.
    gc.collect()
    torch.distributed.destroy_process_group()
