"""What is wrong with my data? Asked of a network that someone else has trained.

    pip install "vlearn[vision]"
    python examples/your_checkpoint.py [--data-root ROOT] [--structure last-layer-kronecker] [--seconds 60]

A torchvision ResNet-18 with BatchNorm is trained by AdamW for a minute on 5,000 images of CIFAR-10, of whose labels a
tenth were changed at random. Its training has no line of vlearn. Only then does vlearn look at the checkpoint:

1. `vlearn.posterior.fit` makes a posterior at its weights, that knows how long AdamW has trained;
2. `vlearn.sweep` predicts each image's loss without it, and so the test loss;
3. the images that the network fits worst once they are left out are the most suspicious labels;
4. `vlearn.influence` tells which training images a wrong prediction leans on.
"""

from __future__ import annotations

import argparse
import pickle
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHANGED = 0.1  # share of the training labels


def load(root: Path) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """5,000 training images with some wrong labels, 1,000 test images, and which labels are wrong."""
    folder = root / "cifar-10-batches-py"
    if not folder.exists():
        import torchvision

        torchvision.datasets.CIFAR10(str(root), download=True)

    def images(file: str, count: int) -> tuple[Tensor, Tensor]:
        with open(folder / file, "rb") as opened:
            part = pickle.load(opened, encoding="bytes")
        x = torch.tensor(part[b"data"][:count]).view(-1, 3, 32, 32).float() / 255
        mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
        return (x - mean[:, None, None]) / std[:, None, None], torch.tensor(part[b"labels"][:count])

    (x, y), test = images("data_batch_1", 5000), images("test_batch", 1000)
    draws = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=draws) < CHANGED
    shifted = (y + torch.randint(1, 10, y.shape, generator=draws)) % 10
    return TensorDataset(x, torch.where(wrong, shifted, y)), TensorDataset(*test), wrong


def train(model: nn.Module, data: TensorDataset, seconds: float) -> tuple[torch.optim.Optimizer, int]:
    """A usual training loop, for some time; the optimizer and how many steps it has taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for x, y in DataLoader(data, batch_size=100, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps += 1
            if time.perf_counter() - began > seconds:
                break
    return optimizer, steps


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    """Each example's loss and predicted class."""
    model.eval()
    outputs = torch.cat([model(x) for x, _ in DataLoader(data, batch_size=250)])
    return F.cross_entropy(outputs, data.tensors[1], reduction="none"), outputs.argmax(1)


def main() -> None:
    """Train, look, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), help="of CIFAR-10; downloaded if it is not there"
    )
    parser.add_argument(
        "--structure", default="last-layer-kronecker", help="of the posterior, see vlearn.posterior.fit"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of training")
    arguments = parser.parse_args()
    try:
        from torchvision.models import resnet18
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch
        raise SystemExit(f'this example needs torchvision: pip install "vlearn[vision]" ({error})') from error

    torch.manual_seed(0)
    train_data, test_data, wrong = load(arguments.data_root)
    labels = train_data.tensors[1]
    model = resnet18(num_classes=10)
    optimizer, steps = train(model, train_data, arguments.seconds)
    test_loss, predicted = evaluate(model, test_data)
    right = (predicted == test_data.tensors[1]).float().mean()
    print(f"trained for {steps} steps: test loss {test_loss.mean():.3f}, accuracy {right:.1%}")

    # From here on, vlearn: the model, its data, its loss, and the optimizer for what it knows of the training.
    began = time.perf_counter()
    loader = DataLoader(train_data, batch_size=100)
    posterior = vlearn.posterior.fit(
        model,
        loader,
        F.cross_entropy,
        arguments.structure,
        prior_precision=optimizer,
        training_time=vlearn.posterior.training_time(optimizer, steps),
    )
    fitted = time.perf_counter()
    table = vlearn.sweep(model, posterior, loader, F.cross_entropy)
    print(f"fit: {fitted - began:.0f} s, sweep: {time.perf_counter() - fitted:.0f} s")
    print(
        f"loss: training {table.loss.mean():.3f}, predicted without a test set {table.loo_loss.mean():.3f}, "
        f"test {test_loss.mean():.3f}"
    )

    suspects = table.loo_loss.argsort(descending=True)
    print("\nmost suspicious labels, by the loss that is predicted for each image if it had not been seen:")
    for i in suspects[:10].tolist():
        verdict = "changed" if wrong[i] else "as published"
        print(
            f"  image {i:4d}: {CLASSES[labels[i]]:<10}  loss {table.loss[i]:5.2f} -> {table.loo_loss[i]:5.2f}  ({verdict})"
        )
    for count in (100, int(wrong.sum())):
        found = wrong[suspects[:count]].float().mean()
        print(f"of the first {count}, {found:.0%} were changed (by chance {wrong.float().mean():.0%})")

    mistakes = (predicted != test_data.tensors[1]).nonzero().flatten()
    worst = mistakes[test_loss[mistakes].argsort(descending=True)][:3]
    questions = DataLoader(TensorDataset(*(tensor[worst] for tensor in test_data.tensors)), batch_size=3)
    scores = vlearn.influence(model, posterior, loader, questions, F.cross_entropy, top_k=None)
    print("\ntraining images that harm the three worst test predictions most:")
    for k, number in enumerate(worst.tolist()):
        harmful = scores.train_index[scores.values[:, k].argsort()[:5]].tolist()
        named = ", ".join(f"{i} ({CLASSES[labels[i]]}{', changed' if wrong[i] else ''})" for i in harmful)
        truth, told = CLASSES[test_data.tensors[1][number]], CLASSES[predicted[number]]
        print(f"  test image {number}, {truth} taken for {told}: {named}")


if __name__ == "__main__":
    main()
