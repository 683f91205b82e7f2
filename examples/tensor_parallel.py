"""One model, two ways to split it: data parallel on 4 workers, and data x tensor parallel on a 2 x 2 mesh.

    python examples/tensor_parallel.py [--steps N]

The model and the training loop do not know. In the second run nn.parallelize() lays out the two weights of a
block as Megatron-LM does (arXiv:1909.08053): the first is split by its outputs, the second by its inputs, so
that the hidden activations are split over "model", and one all-reduce per block brings the halves together.
"""

from __future__ import annotations

import numpy as np
from command import Parser, at_least_one
from train_digits import Digits, load

import meshtape as mt
from meshtape import nn, optim

Split = dict[str, dict[str, mt.Shard]]

# A Linear's weight is (outputs, inputs). What is not named stays Replicate.
SPLIT: Split = {
    "0.weight": {"model": mt.Shard(0)},
    "0.bias": {"model": mt.Shard(0)},
    "2.weight": {"model": mt.Shard(1)},
}


def curve(axes: dict[str, int], split: Split, digits: Digits, steps: int) -> np.ndarray:
    """Train on a mesh of threads with these axes; prints the layouts, returns the loss of every step."""
    with mt.init(workers=4, backend="local", mesh=axes) as mesh:
        mt.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
        if split:
            nn.parallelize(model, split)
        optimizer = optim.AdamW(model.parameters(), lr=3e-3)
        images, labels = (mt.tensor(a[:256], layout={"data": mt.Shard(0)}) for a in digits.train)
        losses = []
        for _ in range(steps):
            hidden = model[1](model[0](images))
            loss = nn.functional.cross_entropy(model[2](hidden), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        print(f"\n{mesh}")
        for name, tensor in [*model.named_parameters(), ("images", images), ("hidden", hidden)]:
            print(f"  {name:10}{tensor.shape!s:12}{tensor.layout}")
        mt.visualize(model[0].weight)
        return mt.stack(losses).numpy()


def main() -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least_one, default=60, metavar="N", help="steps of each run")
    options = parser.parse_args()
    digits = load(seed=0)
    data = curve({"data": 4}, {}, digits, options.steps)
    both = curve({"data": 2, "model": 2}, SPLIT, digits, options.steps)
    gap = np.abs(data - both).max()
    print(f"\n{'step':>6}{'data parallel':>16}{'2 x 2':>12}")
    for step in sorted({0, options.steps // 4, options.steps // 2, options.steps - 1}):
        print(f"{step + 1:6}{data[step]:16.6f}{both[step]:12.6f}")
    print(f"largest difference of the losses {gap:.1e}: rounding")
    if gap > 1e-3:
        raise SystemExit(f"The two runs differ by {gap:.1e}, which is more than rounding.")


if __name__ == "__main__":
    main()
