"""What a user runs with torchrun: a wrapped network on each rank's share of the data. Writes what each has found."""

import os
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import vlearn


def main(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    x = torch.randn(256, 10)
    train_data = TensorDataset(x, (x[:, :3] * torch.tensor([1.0, 2.0, 3.0])).argmax(1))
    sampler = DistributedSampler(train_data, seed=1)
    loader = DataLoader(train_data, batch_size=16, sampler=sampler)

    model = DistributedDataParallel(nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3)))
    optimizer = vlearn.IVON(model, lr=0.1, ess=len(train_data), beta2=0.999)
    draws = []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            draws.append(next(model.parameters()).detach().clone())
            optimizer.step()
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), train_data.tensors[1]))
    found = {
        "loss": loss,
        "influence": optimizer.sensitivities().self_influence,
        "draws": torch.stack(draws),
        "state": optimizer.state_dict()["state"],
        "model": model.module.state_dict(),
    }
    torch.save(found, f"{folder}/rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
    # The wrapper is gone with main. One that lives keeps the group's threads, and one that outlives Python may abort.
    torch.distributed.destroy_process_group()
