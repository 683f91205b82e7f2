"""The six models that benchmarks train, written once for torch's nn and meshtape's, with their data and
weights.

All are classifiers trained on random data with cross-entropy and AdamW (lr 1e-3), float32. Equal weights come
from `weights`, by the names of the state dict, which are the same in both libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
BATCHES = 8         # different batches, used in turn
LR = 1e-3


class Model(NamedTuple):
    """`build(nn)` makes the module: batch inputs of `shape` without the batch dimension (`words` > 0: indices
    below that number) to logits (rows, classes). `steps` is how many steps make a round of a benchmark.
    """

    build: Callable[[Any], Any]
    shape: tuple[int, ...]
    classes: int
    batch: int
    steps: int
    words: int = 0


def mlp(*widths: int, norm: bool = False) -> Callable[[Any], Any]:
    """Linear layers with ReLU, or with LayerNorm and GELU, between them."""
    def build(nn: Any) -> Any:
        parts: list[Any] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            parts.append(nn.Linear(a, b))
            if i < len(widths) - 2:
                parts += [nn.LayerNorm(b), nn.GELU()] if norm else [nn.ReLU()]
        return nn.Sequential(*parts)

    return build


def cnn(nn: Any, size: int = 28) -> Any:
    """Two convolutions with pooling, then one linear layer."""
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 10))


def transformer(width: int, heads: int, length: int, words: int) -> Callable[[Any], Any]:
    """A two-layer causal Transformer that predicts every next character; no dropout."""
    def build(nn: Any) -> Any:
        # torch wants a mask beside is_causal=True, and then does not read it.
        mask = nn.Transformer.generate_square_subsequent_mask(length) if hasattr(nn, "Transformer") else None

        class CharTransformer(nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.token = nn.Embedding(words, width)
                self.position = nn.Embedding(length, width)
                layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                                   batch_first=True)
                self.encoder = nn.TransformerEncoder(layer, 2)
                self.head = nn.Linear(width, words)

            def forward(self, ids: Any) -> Any:
                x = self.token(ids) + self.position.weight
                return self.head(self.encoder(x, mask=mask, is_causal=True)).reshape(-1, words)

        return CharTransformer()

    return build


def lstm(inputs: int, hidden: int) -> Callable[[Any], Any]:
    """An LSTM whose last hidden state is classified."""
    def build(nn: Any) -> Any:
        class LastState(nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(inputs, hidden, batch_first=True)
                self.head = nn.Linear(hidden, 10)

            def forward(self, x: Any) -> Any:
                _, (h, _) = self.lstm(x)
                return self.head(h[-1])

        return LastState()

    return build


MODELS = {
    "mlp64": Model(mlp(64, 128, 128, 10), (64,), 10, 64, 200),
    "mlp784": Model(mlp(784, 512, 512, 10), (784,), 10, 256, 12),
    "mlpnorm": Model(mlp(256, 1024, 1024, 10, norm=True), (256,), 10, 256, 6),
    "cnn28": Model(cnn, (1, 28, 28), 10, 128, 6),
    "charlm": Model(transformer(64, 4, 64, 65), (64,), 65, 32, 8, words=65),
    "lstm": Model(lstm(64, 128), (50, 64), 10, 64, 8),
}

# The same programs on operands so small that arithmetic costs next to nothing; the LSTM keeps its 50 steps.
TINY = {
    "mlp64": Model(mlp(4, 4, 4, 4), (4,), 4, 2, 200),
    "mlp784": Model(mlp(4, 4, 4, 4), (4,), 4, 2, 200),
    "mlpnorm": Model(mlp(4, 4, 4, 4, norm=True), (4,), 4, 2, 200),
    "cnn28": Model(partial(cnn, size=4), (1, 4, 4), 10, 2, 200),
    "charlm": Model(transformer(32, 2, 4, 8), (4,), 8, 2, 100, words=8),
    "lstm": Model(lstm(4, 4), (50, 4), 10, 2, 100),
}


def batches(model: Model, factor: int = 1) -> list[tuple[Array, Array]]:
    """Inputs (B, *shape) and targets (rows,) of BATCHES batches, B `factor` times the model's batch."""
    rng = np.random.default_rng(0)
    size = model.batch * factor
    found = []
    for _ in range(BATCHES):
        if model.words:
            x: Array = rng.integers(0, model.words, (size, *model.shape))
            rows = x.size
        else:
            x, rows = rng.standard_normal((size, *model.shape), dtype=np.float32), size
        found.append((x, rng.integers(0, model.classes, rows)))
    return found


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays for the names of a state dict, the same for the same names and shapes; norms start near 1."""
    rng = np.random.default_rng(1)
    found = {}
    for name, shape in sorted(shapes.items()):
        bound = prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
        values = rng.uniform(-bound, bound, shape)
        norm = len(shape) == 1 and name.endswith("weight")
        found[name] = (values + norm).astype(np.float32)
    return found
