"""What a user runs with torchrun: all processes sweep to one folder. The second one is killed at an example once."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.distributed.shares import dataset, network, posterior_of

COUNT, LETHAL = 40, 25  # the second process of two gets to it in its fifth batch of 3


class Lethal(TensorDataset):
    def __init__(self, folder: Path):
        super().__init__(*dataset(COUNT).tensors)
        self.mark = folder / "died"

    def __getitem__(self, index):
        if index == LETHAL and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, model, data = torch.distributed.get_rank(), network(), Lethal(folder)
    loader = DataLoader(data, batch_size=3, sampler=vlearn.UnrepeatedDistributedSampler(data))
    options = {"leverage": None, "sync": True, "progress": False, "out": folder / "sweep"}
    table = vlearn.sweep(model, posterior_of(model), loader, F.cross_entropy, **options)
    torch.save({"loo_loss": table.loo_loss.clone(), "index": table.index.clone()}, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
