"""A small decoder-only transformer for the training-step benchmarks: two blocks of width 64, made-up text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 64, 64, 4, 32, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Weights from a fixed seed, so that all contenders start from the same point."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.blocks = nn.Sequential(Block(), Block())
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places.weight))).transpose(1, 2)


def batches(count: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [16, 32] and the ones that follow, endlessly: each follows from the last by a rule with noise."""
    generator = torch.Generator().manual_seed(1)
    text = [torch.randint(VOCABULARY, (BATCH, 1), generator=generator)]
    for _ in range(LENGTH * count):
        text.append((3 * text[-1] + torch.randint(2, (BATCH, 1), generator=generator)) % VOCABULARY)
    tokens = torch.cat(text, 1)
    pairs = [(tokens[:, i : i + LENGTH], tokens[:, i + 1 : i + 1 + LENGTH]) for i in range(0, LENGTH * count, LENGTH)]
    return cycle([(x.contiguous(), y.contiguous()) for x, y in pairs])
