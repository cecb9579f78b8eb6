"""Train, sweep, leave groups out and trace influence with several processes, each of which has its share of the data.

    torchrun --standalone --nproc_per_node 2 examples/many_processes.py --out runs/many_processes

runs on the CPU of one machine, with made-up images, a twentieth of them with wrong labels, which the test images have
not. Killed during the last sweep, the same command trains again, to the same weights, and that sweep goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import vlearn

CLASSES, SIZE = 5, 12


def images(count: int, seed: int) -> TensorDataset:
    """Noisy stripes of one of five slopes."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    phase = 6.3 * torch.rand(count, 1, 1, generator=random)
    stripes = torch.sin(phase + 0.8 * row + 0.4 * labels[:, None, None] * column)
    return TensorDataset(stripes.unsqueeze(1) + 0.7 * torch.randn(count, 1, SIZE, SIZE, generator=random), labels)


def network() -> nn.Module:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(128, CLASSES)
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the example in one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record and the sweep")
    parser.add_argument("--examples", type=int, default=1001)
    parser.add_argument("--epochs", type=int, default=16)
    options = parser.parse_args(arguments)

    distributed.init_process_group("gloo")
    is_first = distributed.get_rank() == 0
    torch.manual_seed(0)
    train_data, test_data = images(options.examples, seed=1), images(200, seed=2)
    labels = train_data.tensors[1]
    wrong = torch.arange(0, len(labels), 20)
    labels[wrong] = (labels[wrong] + 1) % CLASSES

    # Training wants equal shares, in a new order in each epoch; a sweep wants each example once.
    sampler = DistributedSampler(train_data, seed=3)
    batches = DataLoader(train_data, batch_size=25, sampler=sampler)
    share = DataLoader(train_data, batch_size=100, sampler=vlearn.UnrepeatedDistributedSampler(train_data))

    model = DistributedDataParallel(network())
    optimizer = vlearn.IVON(model, lr=0.2, ess=len(train_data), hess_init=0.2)
    memory = vlearn.MemoryMap(len(train_data), options.out / "record", overwrite=True, sync=True)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        table = vlearn.sweep(model, optimizer.posterior(), share, F.cross_entropy, sync=True, progress=False)
        memory.record_sweep(epoch, table, test_loss=test_loss(model, test_data.tensors))

    posterior = optimizer.posterior()
    with_all = {"loss_fn": F.cross_entropy, "sync": True, "progress": False}
    out = options.out / "sweep"
    table = vlearn.sweep(model, posterior, share, leverage=None, deviation=None, out=out, **with_all)
    groups = {"with wrong labels": wrong, "with right labels": wrong[:-1] + 1}
    left_out = vlearn.leave_group_out(model, posterior, share, groups, **with_all)
    tests = DataLoader(test_data, batch_size=100)
    influence = vlearn.influence(model, posterior, share, tests, top_k=3, **with_all)

    if is_first:
        suspects = table.index[table.self_influence.argsort(descending=True)[: len(wrong)]]
        share_wrong = float(torch.isin(suspects, wrong).float().mean())
        print(f"{len(table)} examples by {distributed.get_world_size()} processes")
        for step, test, loo in zip(memory.steps, memory.test_loss, memory.column("loo_loss"), strict=True):
            print(f"epoch {step}: leave-one-out loss {loo.mean():.3f}, test loss {test:.3f}")
        print(f"of the {len(wrong)} most sensitive examples {share_wrong:.0%} have a wrong label, of all 5%")
        for name, now, without in zip(left_out.group, left_out.loss, left_out.left_out_loss, strict=True):
            print(f"examples {name}: loss {now:.3f}, had none of them been there {without:.3f}")
        print(f"the first test image leans on examples {influence.train_index[:, 0].tolist()}")
    distributed.barrier()
    del model, optimizer, posterior  # before the group, whose threads the wrapper keeps
    distributed.destroy_process_group()


@torch.no_grad()
def test_loss(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    """The mean loss at the posterior's mean."""
    model.eval()
    loss = F.cross_entropy(model(data[0]), data[1])
    model.train()
    return float(loss)


if __name__ == "__main__":
    main()
