"""Lightning, Accelerate and Hugging Face's Trainer shard the model themselves, the last two after the optimizer."""

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import accelerate
import accelerate.state
import lightning
import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import vlearn

sys.path.append(str(Path(__file__).parents[2]))
from tests.distributed.frameworks import dataset, network

ACCUMULATED = 2


def new_optimizer(model: nn.Module, **other: Any) -> vlearn.IVON:
    return vlearn.IVON(model, lr=0.1, ess=64, beta2=0.99, generator=torch.Generator().manual_seed(5), **other)


def state(optimizer: vlearn.IVON) -> dict[str, Tensor]:
    """Means and Hessians by name."""
    names, found = optimizer._parameters.names(), {}
    for p, name in names.items():
        for key, tensor in (("mean", p), ("hessian", optimizer.state[p]["hessian"])):
            full = getattr(tensor, "full_tensor", None)
            found[f"{name}.{key}"] = (tensor if full is None else full()).detach().clone()
    return found


def alone() -> dict[str, Tensor]:
    """One process with the examples of all ranks and micro-batches at once."""
    model = network()
    optimizer = new_optimizer(model, shared_noise=True)
    for _ in range(2):
        for x, y in DataLoader(dataset(), batch_size=2 * ACCUMULATED * 8):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    return state(optimizer)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # pyright: ignore
        for layer in self.net.children():
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> vlearn.IVON:
        self.made = new_optimizer(self.net)
        return self.made

    def train_dataloader(self) -> DataLoader[Any]:  # Lightning's own sampler would shuffle
        return DataLoader(dataset(), batch_size=8, sampler=DistributedSampler(dataset(), shuffle=False))


def by_lightning(folder: str) -> dict[str, Tensor]:
    module = Classifier()
    off = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    trainer = lightning.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        devices=2,
        accelerator="cpu",
        max_epochs=2,
        gradient_clip_val=0.1,
        accumulate_grad_batches=ACCUMULATED,
        use_distributed_sampler=False,
        **dict.fromkeys(off, False),
    )
    trainer.fit(module)
    return state(module.made)


def shard_on_cpus() -> None:
    """Accelerate shards on accelerators alone: here it takes CPUs for some."""
    init = accelerate.state.AcceleratorState.__init__

    def init_as_accelerator(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = init_as_accelerator


def by_accelerate(folder: str) -> dict[str, Tensor]:
    shard_on_cpus()
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, fsdp_plugin=plugin)
    model = network()
    optimizer = new_optimizer(model)
    wrapper, prepared, loader = accelerator.prepare(model, optimizer, DataLoader(dataset(), batch_size=8))
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(wrapper):
                accelerator.backward(F.cross_entropy(wrapper(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapper.parameters(), 0.1)
                prepared.step()
                prepared.zero_grad()
    return state(optimizer)


class Sentences(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {
            "input_ids": torch.randint(20, (8,), generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }


def by_trainer(folder: str) -> dict[str, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    accelerate.state.AcceleratorState._reset_state()
    accelerate.state.GradientState._reset_state()
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as its launcher does
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ACCUMULATED,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "cpu_ram_efficient_loading": False},
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        arguments,
        train_dataset=Sentences(),
        optimizer_cls_and_kwargs=(vlearn.IVON, {"lr": 0.1, "ess": 1e4}),
    )
    trainer.train()
    optimizer: Any = trainer.optimizer.optimizer  # pyright: ignore
    assert isinstance(optimizer, vlearn.IVON) and optimizer.diagnostics().step == 4
    return state(optimizer)


if __name__ == "__main__":
    found: dict[str, Any] = {}
    for how, train in {"lightning": by_lightning, "accelerate": by_accelerate, "trainer": by_trainer}.items():
        try:
            found[how] = train(sys.argv[1])
        except Exception:
            found[how] = traceback.format_exc()
    torch.save(found, f"{sys.argv[1]}/rank{torch.distributed.get_rank()}.pt")
