"""A decoder with sparse experts, small enough to train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoshard


class Experts(nn.Module):
    def __init__(self, hidden: int, width: int, number: int, choices: int) -> None:
        super().__init__()
        self.choices = choices
        self.router = nn.Linear(hidden, number, bias=False)
        self.up = nn.Parameter(torch.randn(number, 2 * width, hidden) * 0.2)
        self.down = nn.Parameter(torch.randn(number, hidden, width) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = torch.topk(torch.softmax(self.router(x), -1), self.choices)
        return autoshard.sparse_experts(x, scores, chosen, self.up, self.down, "silu")


class Layer(nn.Module):
    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.experts = Experts(hidden, 2 * hidden, experts, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.norm(x))


class SparseModel(nn.Module):
    def __init__(self, *, layers: int = 2, hidden: int = 16, experts: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, hidden)
        self.layers = nn.ModuleList(Layer(hidden, experts) for _ in range(layers))
        self.head = nn.Linear(hidden, 32)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())
