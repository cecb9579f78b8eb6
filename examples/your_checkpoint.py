"""What is wrong with my data? Asked of a network that someone else has trained.

    pip install "vlearn[vision]"
    python examples/your_checkpoint.py [--data-root ROOT] [--structure last-layer-kronecker] [--epochs 4]

A torchvision ResNet-18 with BatchNorm is trained by AdamW for a minute or two on 5,000 images of CIFAR-10, of whose
labels a tenth were changed at random. Its training has no line of vlearn. Only then does vlearn look at the checkpoint:

1. `vlearn.posterior.fit` makes a posterior at its weights, which knows for how long AdamW has trained them;
2. `vlearn.sweep` predicts each image's loss without it, and so the test loss;
3. the images whose loss would then be largest have the most suspicious labels;
4. `vlearn.influence` tells which training images a wrong prediction leans on.

The posterior is of the last layer: it finds the labels, and predicts a test loss that is somewhat low. That of all
layers, --structure kronecker, takes three minutes, finds fewer of them, and far overstates the loss of a network that
has seen each image four times.
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


def load(root: Path, count: int) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """Training images with some wrong labels, 1,000 test images, and which labels are wrong."""
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

    (x, y), test = images("data_batch_1", count), images("test_batch", 1000)
    draws = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=draws) < CHANGED
    shifted = (y + torch.randint(1, 10, y.shape, generator=draws)) % 10
    return TensorDataset(x, torch.where(wrong, shifted, y)), TensorDataset(*test), wrong


def train(model: nn.Module, data: TensorDataset, epochs: int) -> tuple[torch.optim.Optimizer, int]:
    """A usual training loop; the optimizer and how many steps it has taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps = 0
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=50, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps += 1
    return optimizer, steps


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> tuple[Tensor, Tensor]:
    """Each example's loss and predicted class."""
    model.eval()
    outputs = torch.cat([model(x) for x, _ in DataLoader(data, batch_size=250)])
    return F.cross_entropy(outputs, data.tensors[1], reduction="none"), outputs.argmax(1)


def main(argv: list[str] | None = None) -> None:
    """Train, look, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="of CIFAR-10; else it is downloaded there")
    parser.add_argument("--structure", default="last-layer-kronecker", help="of the posterior, see the docs of fit")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=5000, help="that the network is trained on")
    arguments = parser.parse_args(argv)
    try:
        from torchvision.models import resnet18
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch
        raise SystemExit(f'this example needs torchvision: pip install "vlearn[vision]" ({error})') from error

    torch.manual_seed(0)
    train_data, test_data, wrong = load(arguments.data_root, arguments.images)
    labels, answers = train_data.tensors[1], test_data.tensors[1]
    model = resnet18(num_classes=10)
    began = time.perf_counter()
    optimizer, steps = train(model, train_data, arguments.epochs)
    seconds = time.perf_counter() - began
    test_loss, predicted = evaluate(model, test_data)
    right = (predicted == answers).float().mean()
    print(f"trained for {steps} steps in {seconds:.0f} s: accuracy {right:.1%}, test loss {test_loss.mean():.3f}")

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
    loss, without = table.loss.mean(), table.loo_loss.mean()
    print(f"a fit takes {fitted - began:.0f} s, a sweep {time.perf_counter() - fitted:.0f} s")
    print(f"training loss {loss:.3f}; without a test set the test loss is predicted as {without:.3f}")

    suspects = table.loo_loss.argsort(descending=True)
    print("\nThe most suspicious labels, by the loss of each image if it had not been seen:")
    for i in suspects[:10].tolist():
        losses, verdict = f"{table.loss[i]:5.2f} -> {table.loo_loss[i]:5.2f}", "changed" if wrong[i] else "as published"
        print(f"  image {i:4d}, {CLASSES[labels[i]]:<10}  {losses}  ({verdict})")
    for count in (len(suspects) // 50, int(wrong.sum())):
        share = wrong[suspects[:count]].float().mean()
        print(f"Of the first {count}, {share:.0%} had been changed (of all, {wrong.float().mean():.0%}).")

    mistakes = (predicted != answers).nonzero().flatten()
    worst = mistakes[test_loss[mistakes].argsort(descending=True)][:3]
    questions = DataLoader(TensorDataset(*(tensor[worst] for tensor in test_data.tensors)), batch_size=3)
    scores = vlearn.influence(model, posterior, loader, questions, F.cross_entropy)
    print("\nThe training images that do most harm to the three worst predictions:")
    for k, number in enumerate(worst.tolist()):
        harmful = scores.train_index[scores.values[:, k].argsort()[:5]].tolist()
        named = ", ".join(f"{i} ({CLASSES[labels[i]]}{', changed' if wrong[i] else ''})" for i in harmful)
        print(f"  test image {number}, {CLASSES[answers[number]]} taken for {CLASSES[predicted[number]]}: {named}")


if __name__ == "__main__":
    main()
