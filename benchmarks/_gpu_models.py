"""GPT-2 small and ResNet-18, written once for torch's nn and meshtape's."""

from __future__ import annotations

from typing import Any, NamedTuple


class GPTSize(NamedTuple):
    """Radford et al. 2019; `words` is the vocabulary, padded to a multiple of 64."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    length: int = 1024
    words: int = 50304


def gpt(nn: Any, size: GPTSize) -> Any:
    """A pre-norm causal Transformer whose output layer shares its weight with the embedding. Token indices
    (B, T) to logits (B * T, words); no dropout.
    """
    functional = nn.functional

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
            self.qkv = nn.Linear(size.width, 3 * size.width)
            self.out = nn.Linear(size.width, size.width)
            self.up = nn.Linear(size.width, 4 * size.width)
            self.down = nn.Linear(4 * size.width, size.width)

        def forward(self, x: Any) -> Any:
            batch, length, width = x.shape
            heads = self.qkv(self.norm1(x)).reshape(batch, length, 3, size.heads, width // size.heads)
            q, k, v = (heads[:, :, i].swapaxes(1, 2) for i in range(3))
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(seen.swapaxes(1, 2).reshape(batch, length, width))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Embedding(size.words, size.width)
            self.position = nn.Embedding(size.length, size.width)
            self.blocks = nn.Sequential(*[Block() for _ in range(size.layers)])
            self.norm = nn.LayerNorm(size.width)

        def forward(self, ids: Any) -> Any:
            x = self.blocks(self.token(ids) + self.position.weight)
            return functional.linear(self.norm(x), self.token.weight).reshape(-1, size.words)

    return GPT()


def resnet18(nn: Any, classes: int = 1000, widths: tuple[int, ...] = (64, 128, 256, 512)) -> Any:
    """He et al. 2016, table 1: images (B, 3, H, W) to logits (B, classes)."""
    functional = nn.functional

    def conv(inputs: int, outputs: int, kernel: int, stride: int) -> Any:
        return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
            self.conv2, self.norm2 = conv(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
            self.skip = nn.Identity() if inputs == outputs and stride == 1 else nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.norm1(self.conv1(x)))
            return functional.relu(self.norm2(self.conv2(y)) + self.skip(x))

    parts = [conv(3, widths[0], 7, 2), nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = widths[0]
    for i, width in enumerate(widths):
        parts += [Block(before, width, 1 if i == 0 else 2), Block(width, width, 1)]
        before = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
