"""Train a small network on scikit-learn's handwritten digits (1797 scans of 8x8 pixels, no download).

    python examples/train_digits.py [--workers N] [--backend ray|local|inline] [--epochs N] [--out DIR] ...
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from command import Parser, at_least_one, positive, start
from sklearn.datasets import load_digits
from tqdm import tqdm

import meshtape as mt
from meshtape import nn, optim

SHOW_EVERY = 16     # steps between two looks at the loss; each look waits for the workers


class Digits(NamedTuple):
    """Images (n, 64) float32 in 0 to 1 and labels (n,) int64: four fifths to train on, one fifth held out."""

    train: tuple[np.ndarray, np.ndarray]
    held_out: tuple[np.ndarray, np.ndarray]


def load(seed: int) -> Digits:
    """The digits, dealt by `seed`."""
    images, labels = load_digits(return_X_y=True)
    arrays = ((images / 16).astype(np.float32), labels.astype(np.int64))
    fifth = len(labels) // 5
    held_out, train = mt.data.random_split(arrays, [fifth, len(labels) - fifth], seed=seed)
    return Digits(train, held_out)


def build(hidden: int) -> nn.Sequential:
    """Two hidden layers, the second half as wide."""
    half = max(1, hidden // 2)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, half), nn.ReLU(),
                         nn.Linear(half, 10))


def accuracy(model: nn.Module, images: mt.Tensor, labels: mt.Tensor) -> float:
    """The fraction of images that the model names rightly."""
    with mt.no_grad():
        return (model(images).argmax(axis=1) == labels).mean().item()


def describe(model: nn.Module, images: mt.Tensor, labels: mt.Tensor) -> None:
    """Print who works, and how weights and batches lie on them."""
    mesh = mt.current_mesh()
    nodes, devices = sorted(set(mesh.nodes)), sorted(set(mesh.devices))
    print(f"workers: {mesh.size} ({mesh.backend}, {', '.join(devices)})\n"
          f"nodes: {len(nodes)} ({', '.join(nodes)})")
    for name, tensor in [*model.named_parameters(), ("images", images), ("labels", labels)]:
        print(f"  {name:10} {tensor.shape!s:11} {tensor.dtype.name:8} {tensor.layout}")


def train(model: nn.Module, digits: Digits, epochs: int, batch_size: int, lr: float, seed: int,
          ) -> tuple[np.ndarray, list[float]]:
    """Train; returns the loss of every step and the held-out accuracy after every epoch."""
    loader = mt.data.DataLoader(digits.train, batch_size, shuffle=True, seed=seed)
    unseen = [mt.tensor(a, layout=mt.Shard(0)) for a in digits.held_out]
    optimizer = optim.AdamW(model.parameters(), lr=lr)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    plan_at = min(2, epochs * len(loader))      # the first step also initialises
    curve: list[np.ndarray] = []
    scores: list[float] = []
    samples = epochs * len(digits.train[0])
    with tqdm(total=samples, unit=" samples", unit_scale=True, ncols=100, mininterval=0.5) as bar:
        for epoch in range(epochs):
            losses = []
            for step, (images, labels) in enumerate(loader, start=1):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                if epoch * len(loader) + step == plan_at:
                    with bar.external_write_mode():
                        describe(model, images, labels)
                        mt.explain()
                if step % SHOW_EVERY == 1:
                    bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.4f}", refresh=False)
                bar.update(len(images))
            schedule.step()
            curve.append(mt.stack(losses).numpy())
            scores.append(accuracy(model, *unseen))
            bar.write(f"epoch {epoch + 1:3}  loss {curve[-1].mean():.4f}  held-out accuracy {scores[-1]:.2%}")
    return np.concatenate(curve), scores


def draw(losses: np.ndarray, scores: list[float], title: str, path: Path) -> None:
    """The loss of every step, its mean per epoch, and the accuracy after every epoch, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    blue, orange, grey = "#2b6cb0", "#dd6b20", "#718096"
    epochs = np.arange(1, len(scores) + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
    steps = np.arange(1, len(losses) + 1) / (len(losses) / len(scores))
    left.plot(steps, losses, color=blue, linewidth=0.7, alpha=0.35, label="every step")
    means = [part.mean() for part in np.array_split(losses, len(scores))]
    left.plot(epochs - 0.5, means, color=blue, linewidth=2, marker=".", label="mean of the epoch")
    left.set(title="Training loss (cross-entropy)", xlabel="epoch", yscale="log", xlim=(0, len(scores)))
    left.legend(frameon=False)
    right.plot(epochs, scores, color=orange, linewidth=2, marker=".")
    right.annotate(f"{scores[-1]:.1%}", (epochs[-1], scores[-1]), xytext=(-6, -16), ha="right", weight="bold",
                   textcoords="offset points", color=orange)
    right.set(title="Accuracy on the held-out fifth", xlabel="epoch", xlim=(0, len(scores)),
              ylim=(min(0.9, min(scores) - 0.02), 1.0))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.grid(color=grey, alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(11)
    figure.suptitle(title, fontsize=10, color=grey)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_mesh(backend="ray")
    parser.add_argument("--epochs", type=at_least_one, default=30, metavar="N", help="passes over the images")
    parser.add_argument("--batch-size", type=at_least_one, default=64, metavar="N", help="images per step")
    parser.add_argument("--lr", type=positive, default=3e-3, metavar="X", help="AdamW's first learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="deals, shuffles and initialises")
    parser.add_argument("--hidden", type=at_least_one, default=256, metavar="N", help="units of layer 1")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where the picture goes")
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    started = time.perf_counter()
    start(options)
    mt.manual_seed(options.seed)
    digits = load(options.seed)
    model = build(options.hidden)
    print(f"digits: {len(digits.train[0])} images to train on, {len(digits.held_out[0])} held out")
    ready = time.perf_counter()
    losses, scores = train(model, digits, options.epochs, options.batch_size, options.lr, options.seed)
    ended = time.perf_counter()

    mesh = mt.current_mesh()
    path = options.out / "digits.png"
    draw(losses, scores, f"digits, {mesh.size} workers ({mesh.backend}), batches of {options.batch_size}, "
         f"AdamW {options.lr:g}, seed {options.seed}", path)
    rate = options.epochs * len(digits.train[0]) / (ended - ready)
    print(f"held-out accuracy {scores[-1]:.2%} after {options.epochs} epochs, {len(losses)} steps, "
          f"{rate:,.0f} samples/s\ncurves in {path}\n"
          f"total {time.perf_counter() - started:.1f} s, of which training {ended - ready:.1f} s")


if __name__ == "__main__":
    main()
