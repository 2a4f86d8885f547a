"""The one model of the benchmark: a decoder transformer of any published shape.

Its attention runs on one fused kernel or, as before FlashAttention, as separate products around a
softmax; its feed-forward part is plain, gated or sparse; the rest follows the two families that
published runs belong to: GPT (LayerNorm, biases, learned positions, tied embedding) and Llama
(RMSNorm, no biases, rotary positions, embedding and head apart).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoshard


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides a decoder's graph.

    Attributes:
        vocab: 0 for layers alone, without embedding and head.
        ffn: width of the feed-forward part, or of one expert.
        experts: 0 for a dense model.
        shared_ffn: width of the expert that every token visits, 0 for none.
        tied: the head uses the embedding's weight.
        rotary: rotary positions instead of learned ones.
        rms_norm: RMSNorm instead of LayerNorm.
        bias: linear layers have one.
        dropout: of attention probabilities and of what each half of a layer adds.
        wide_logits: the loss is computed on a float32 copy of the logits.
        fused_attention: one kernel that keeps no score.
        fused_projections: query, key and value are one product, and so are gate and up.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    sequence: int
    experts: int = 0
    experts_per_token: int = 0
    shared_ffn: int = 0
    gated: bool = False
    tied: bool = True
    rotary: bool = False
    rms_norm: bool = False
    bias: bool = True
    dropout: float = 0.0
    wide_logits: bool = True
    fused_attention: bool = True
    fused_projections: bool = False
    head_dim: int = 0

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.hidden // self.heads


class Decoder(nn.Module):
    """Embedding, layers, norm, head, and the mean cross entropy of the next token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.positions = None if shape.rotary else nn.Embedding(shape.sequence, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = _norm(shape)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        shape = self.shape
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        angles = _angles(positions, shape.size_of_head) if shape.rotary else None
        x = F.dropout(x, shape.dropout, self.training)
        for layer in self.layers:
            x = layer(x, angles)
        logits = self.head(self.norm(x)).flatten(0, 1)
        if shape.wide_logits:
            logits = logits.float()
        return F.cross_entropy(logits, targets.flatten())


class Layers(nn.Module):
    """Layers alone, with a loss that costs nothing next to them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        shape = self.shape
        angles = _angles(positions, shape.size_of_head) if shape.rotary else None
        for layer in self.layers:
            x = layer(x, angles)
        return x.float().mean()


class Layer(nn.Module):
    """Attention and feed-forward, each on a norm and added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.norm1 = _norm(shape)
        self.attention = Attention(shape)
        self.norm2 = _norm(shape)
        self.feed_forward: nn.Module = Experts(shape) if shape.experts else FeedForward(shape)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        x = x + F.dropout(self.attention(self.norm1(x), angles), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.norm2(x)), self.dropout, self.training)


class Attention(nn.Module):
    """Causal attention with as many heads for keys and values as the shape says."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.size_of_head
        inner, kv = shape.heads * self.size, shape.kv_heads * self.size
        sizes = (inner, kv, kv)
        if shape.fused_projections:
            self.qkv: nn.Module = Joint(shape.hidden, sizes, bias=shape.bias)
        else:
            self.qkv = Apart(shape.hidden, dict(zip("qkv", sizes, strict=True)), bias=shape.bias)
        self.core: nn.Module = Fused(shape) if shape.fused_attention else Unfused(shape)
        self.out = nn.Linear(inner, shape.hidden, bias=shape.bias)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in self.qkv(x))
        if angles is not None:
            q, k = _rotated(q, angles), _rotated(k, angles)
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))


class Joint(nn.Module):
    """Several projections of one input as one product."""

    def __init__(self, inputs: int, outputs: Sequence[int], *, bias: bool) -> None:
        super().__init__()
        self.sizes = list(outputs)
        self.product = nn.Linear(inputs, sum(outputs), bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(self.product(x), self.sizes, -1)


class Apart(nn.Module):
    """Several projections of one input, a product each."""

    def __init__(self, inputs: int, outputs: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.products = nn.ModuleDict(
            {name: nn.Linear(inputs, size, bias=bias) for name, size in outputs.items()}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(product(x) for product in self.products.values())


class Fused(nn.Module):
    """Scores, softmax and weighted sum in one kernel."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.grouped = shape.kv_heads != shape.heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)


class Unfused(nn.Module):
    """Scores, softmax and weighted sum one after another, each in memory."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.groups, self.dropout = shape.heads // shape.kv_heads, shape.dropout
        self.scale = shape.size_of_head**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        scores = torch.matmul(q * self.scale, k.transpose(2, 3))
        place = torch.arange(q.shape[2], device=q.device)
        later = place[None, :] > place[:, None]
        shares = torch.softmax(scores.masked_fill(later, -10000.0), -1)
        return torch.matmul(F.dropout(shares, self.dropout, self.training), v)


class Experts(nn.Module):
    """Every token visits some of many gated feed-forward parts, and perhaps one that all visit."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.choices = shape.experts_per_token
        number, hidden, width = shape.experts, shape.hidden, shape.ffn
        self.router = nn.Linear(hidden, number, bias=False)
        self.up = nn.Parameter(torch.empty(number, 2 * width if shape.gated else width, hidden))
        self.down = nn.Parameter(torch.empty(number, hidden, width))
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=0.02)
        self.activation = "silu" if shape.gated else "gelu"
        self.shared = FeedForward(shape, shape.shared_ffn) if shape.shared_ffn else None

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = torch.topk(torch.softmax(self.router(x), -1), self.choices)
        y = autoshard.sparse_experts(x, scores, chosen, self.up, self.down, self.activation)
        return y if self.shared is None else y + self.shared(x)


class FeedForward(nn.Module):
    """Plain (GELU) or gated (SiLU)."""

    def __init__(self, shape: Shape, width: int = 0) -> None:
        super().__init__()
        width = width or shape.ffn
        self.gated = shape.gated
        if not shape.gated:
            self.up: nn.Module = nn.Linear(shape.hidden, width, bias=shape.bias)
        elif shape.fused_projections:
            self.up = Joint(shape.hidden, (width, width), bias=shape.bias)
        else:
            self.up = Apart(shape.hidden, {"gate": width, "up": width}, bias=shape.bias)
        self.down = nn.Linear(width, shape.hidden, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.up(x)
        return self.down(F.silu(gate) * up)


def _norm(shape: Shape) -> nn.Module:
    return nn.RMSNorm(shape.hidden, eps=1e-5) if shape.rms_norm else nn.LayerNorm(shape.hidden)


def _angles(positions: Tensor, size: int) -> Tensor:
    """Angles of rotary positions ``[sequence, size]`` (Su et al. 2021)."""
    steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angles = positions.float()[:, None] * (10000.0**-steps)[None, :]
    return torch.cat((angles, angles), -1)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (x * angles.cos() + turned * angles.sin()).to(x.dtype)
