"""A small decoder, cut into stages by hand and by plans."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoshard.cluster import find
from autoshard.options import Constraints
from autoshard.plan.plan import Plan
from autoshard.plan.search import find_plan
from autoshard.schedules import SCHEDULES

RANKS = 4
VOCAB, LENGTH, WIDTH, HEADS, BLOCKS = 256, 96, 192, 4, 8
NAMES = [
    name
    for name, kind in SCHEDULES.items()
    if not kind.stale and name not in ("none", "zb-1p")  # zb-1p is zb-h1
]
"""The synchronous ones."""


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.after = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, c))
        return x + self.down(functional.gelu(self.up(self.after(x))))


class Head(nn.Module):
    """From activations to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(x))
        return logits


class Decoder(nn.Module):
    """Embedding, blocks and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = Head()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    def stages(self, count: int) -> list[nn.Sequential]:
        """The same as ``count`` stages of as many blocks, by hand."""
        each = BLOCKS // count
        parts = [list(self.blocks[k * each : (k + 1) * each]) for k in range(count)]
        return [
            nn.Sequential(*p)
            for p in ([self.embed, *parts[0]], *parts[1:-1], [*parts[-1], self.head])
        ]


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def batch(num_micro_batches: int) -> dict[str, Tensor]:
    """One sample per micro-batch."""
    generator = torch.Generator().manual_seed(num_micro_batches)
    shape = (num_micro_batches, LENGTH)
    return {n: torch.randint(VOCAB, shape, generator=generator) for n in ("ids", "labels")}


def num_stages(name: str) -> int:
    return RANKS * SCHEDULES[name].least_virtual


def plan_of(program: Any, name: str) -> Plan:
    """Equal blocks in every stage, as by hand."""
    count = num_stages(name)
    each = BLOCKS // count
    sizes = (each + 1, *[each] * (count - 2), each + 1)
    pins = {"pp": RANKS, "dp": 1, "tp": 1, "schedule": name, "micro_batch_size": 1,
            "virtual_stages": SCHEDULES[name].least_virtual, "stages": sizes,
            "recompute": "none"}  # fmt: skip
    return find_plan(
        program, cluster=find("cpu"), world_size=RANKS, constraints=Constraints.of(pins)
    )
