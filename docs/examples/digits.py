"""Record a small convolutional network on real handwritten digits, and put the recording to use.

Run it with ``nox -s demo``, or with ``python docs/examples/digits.py`` where actrec and scikit-learn are
installed. It takes about half a minute on two cores and downloads nothing: the digits ship inside scikit-learn.

1. Train the classic recipe: two convolutions, each followed by an in-place ReLU.
2. Record ``conv1``, ``conv2`` and ``head`` over whole data sets, batch by batch, and print the table.
3. Fit a linear probe on each layer: how well can a digit be read off there?
4. Compare with the usual hook, ``out.detach().cpu()``: the in-place ReLUs overwrite what it stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from actrec import record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from actrec import Recording

LAYERS = ["conv1", "conv2", "head"]


class Net(nn.Module):
    """Convolution, ReLU, convolution, ReLU, pool, linear head. The ReLUs work in place, as is usual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten digits."""
        hidden = self.relu1(self.conv1(images))
        hidden = self.relu2(self.conv2(hidden))
        return self.head(self.pool(hidden).flatten(1))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the 1,797 digits of 8 by 8 pixels: two thirds to train on, one third to test on."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    train, test = train_test_split(
        range(len(labels)), test_size=1 / 3, stratify=labels, random_state=0
    )
    labels = torch.tensor(labels)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train(model: nn.Module, data: TensorDataset, epochs: int = 20) -> None:
    """Train with Adam and cross-entropy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def recorded(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> Recording:
    """Record the layers over a whole data set, with its pixels and labels beside them."""
    with record(model, LAYERS) as acts:
        for images, labels in loader:
            model(images)
            acts.add("pixels", images)
            acts.add("label", labels)
    return acts


@torch.no_grad()
def classic(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Record the same layers with the hook that everybody writes."""
    store: dict[str, list[Tensor]] = {name: [] for name in LAYERS}

    def hook_for(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _args: object, out: Tensor) -> None:
            store[name].append(out.detach().cpu())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in LAYERS]
    for images, _ in loader:
        model(images)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(outputs) for name, outputs in store.items()}


@torch.no_grad()
def reference(model: Net, loader: DataLoader[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Compute the same layers without any hook, from functions that write nothing in place."""
    batches = []
    for images, _ in loader:
        conv1 = F.conv2d(images, model.conv1.weight, model.conv1.bias, padding=1)
        conv2 = F.conv2d(F.relu(conv1), model.conv2.weight, model.conv2.bias, padding=1)
        pooled = F.max_pool2d(F.relu(conv2), 2).flatten(1)
        batches.append((conv1, conv2, F.linear(pooled, model.head.weight, model.head.bias)))
    return {
        name: torch.cat(outputs)
        for name, outputs in zip(LAYERS, zip(*batches, strict=True), strict=True)
    }


def features(acts: Recording, name: str) -> Tensor:
    """Return what was recorded under a name, with one row for each image."""
    return acts[name].cat().flatten(1)


def probe(name: str, fit_on: Recording, score_on: Recording) -> float:
    """Fit a linear probe on one recording and return its accuracy on the other."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(features(fit_on, name).numpy(), fit_on["label"].cat().numpy())
    return model.score(features(score_on, name).numpy(), score_on["label"].cat().numpy())


def print_probes(fit_on: Recording, score_on: Recording) -> None:
    """Print the accuracy of a probe on the pixels and on each layer."""
    for name in ["pixels", *LAYERS]:
        size = features(score_on, name).shape[1]
        accuracy = probe(name, fit_on, score_on)
        print(f"  {name:<6}  {size:>5} features  {accuracy:6.1%}")


def print_differences(stored: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    """Print, layer by layer, how many stored values differ from the true ones."""
    for name in LAYERS:
        values, true = stored[name], truth[name]
        wrong = int((values != true).sum())
        share = f"{wrong / true.numel():6.1%} wrong"
        print(f"  {name:<6}{share}, smallest {values.min():6.2f}, should be {true.min():6.2f}")


def main() -> None:
    """Train, record, probe, compare."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    model = Net()
    train(model, train_set)
    model.eval()

    loader = DataLoader(test_set, batch_size=100)
    acts = recorded(model, loader)
    print(acts)

    right = (acts["head"].cat().argmax(1) == acts["label"].cat()).sum()
    print(f"\nThe network itself reads {right / len(test_set):.1%} of the test digits correctly.")
    print("A linear probe, fitted on the training digits\nand scored on the test digits, reads")
    print_probes(recorded(model, DataLoader(train_set, batch_size=100)), acts)

    truth = reference(model, loader)
    print("\nThe usual hook, out.detach().cpu(),\nagainst a computation without hooks:")
    print_differences(classic(model, loader), truth)
    print("\nactrec, against the same:")
    print_differences({name: acts[name].cat() for name in LAYERS}, truth)


if __name__ == "__main__":
    main()
