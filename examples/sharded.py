"""A small transformer whose weights, gradients and posterior are sharded over processes (FSDP2).

    torchrun --nproc-per-node 2 examples/sharded.py --folder /tmp/run

trains a character model of a sentence on CPUs, prints the loss, what each process holds of the optimizer's state and
the passage of its last minibatch that it remembers most, and writes a checkpoint with torch.distributed.checkpoint. The
same command goes on from it, on any number of processes: with --nproc-per-node 1 or 4 the steps are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import vlearn

TEXT = (
    "a draw of the weights is put into every shard, each process makes its own part of the noise from the place of the "
    "entry, and so the model is the same however many processes hold it. "
) * 4
CHARACTERS = sorted(set(TEXT))
LENGTH, WIDTH, BATCH = 32, 32, 16


class Block(nn.Module):
    """Attention and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From ``[N, LENGTH, WIDTH]`` to the same."""
        y, mask = self.norm(x), nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


class CharacterModel(nn.Module):
    """Predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(len(CHARACTERS), WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores ``[N, characters, LENGTH]`` of the next characters from ``[N, LENGTH]``."""
        return self.head(self.blocks(self.embedding(tokens) + self.position)).transpose(1, 2)


def passages() -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[N, LENGTH]``."""
    codes = torch.tensor([CHARACTERS.index(character) for character in TEXT])
    rows = codes.unfold(0, LENGTH + 1, 1)
    return rows[:, :-1], rows[:, 1:]


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint, which all processes can reach")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights in every process

    model = CharacterModel()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    inputs, targets = passages()
    optimizer = vlearn.VAdamW(model, lr=3e-3, num_data=len(inputs))

    checkpoint, first = arguments.folder / "checkpoint", 0
    if checkpoint.exists():
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "step": 0}
        dcp.load(saved, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        first = saved["step"]

    loss = torch.zeros(())
    for step in range(first, first + arguments.steps):
        optimizer.generator = torch.Generator().manual_seed(step)  # so that any number of processes goes on alike
        batch = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(step))[:BATCH]
        own = batch.chunk(count)[rank]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[own]), targets[own])
        loss.backward()
        optimizer.step()
        if step == first + arguments.steps - 1:
            rows = optimizer.sensitivities()  # all processes ask, each gets its own examples' rows
            most = int(own[rows.self_influence.argmax()])
            print(f"process {rank}: of {len(own)} passages it remembers {TEXT[most : most + LENGTH]!r} most")

    dist.all_reduce(loss := loss.detach())
    entries = [t.to_local().numel() for s in optimizer.state.values() for t in s.values() if t.dim()]
    print(f"process {rank}: holds {sum(entries)} entries of the optimizer's state")
    if rank == 0:
        print(f"step {first + arguments.steps}: loss {float(loss) / count:.4f}")
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": first + arguments.steps}, checkpoint_id=checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
