"""Draw the picture on the front page: a digit, its feature maps, and the distributions of the layers.

``python docs/examples/front_page.py`` writes ``docs/_static/front.png``. It needs actrec, scikit-learn and matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import torch
from digits import Net, digits, train
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader

from actrec import plot, record

PICTURE = Path(__file__).parents[1] / "_static" / "front.png"
DIGIT = 3  # the number of the image among those to test on


def main() -> None:
    """Train the network of the demo, record it, and draw what was recorded."""
    torch.manual_seed(0)
    train_set, test_set = digits()
    model = Net()
    train(model, train_set)
    with torch.no_grad(), record(model.eval(), ["conv1", "conv2", "pool", "head"]) as acts:
        for images, _ in DataLoader(test_set, batch_size=100):
            model(images)

    plt.style.use(PICTURE.parents[1] / "matplotlibrc")  # for light and dark pages
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11})
    figure, axes = plt.subplots(
        2, 2, figsize=(6.4, 5), layout="constrained", width_ratios=[1, 1.35]
    )
    axes = axes.flatten()
    axes[0].imshow(test_set[DIGIT][0].squeeze(), cmap="gray_r")
    axes[0].set(xticks=[], yticks=[], title="a digit")
    plot.feature_maps(acts["conv1"][0], item=DIGIT, ax=axes[1])
    axes[1].set_title("acts['conv1'][0]")
    plot.feature_maps(acts["conv2"][0], item=DIGIT, ax=axes[2])
    axes[2].set_title("acts['conv2'][0]")
    plot.distributions(acts, ax=axes[3])
    axes[3].set(title="all values of each layer", xlabel="")
    figure.savefig(PICTURE, dpi=160)


if __name__ == "__main__":
    main()
