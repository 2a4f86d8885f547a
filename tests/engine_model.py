"""A small language model, plain and by hand in stages, for the tests of the engine.

Fused gate and up projections are split in blocks over ``tp``, the residual stream is split along
the sequence (so that norms and row-parallel biases have gradients that are addends), embedding and
head are tied, and the mean over targets skips ignored ones, of which ranks have different numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from autoshard.ir import TensorType, Value
from autoshard.runtime.collectives import all_gather, all_gather_replicated, reduce_scatter, split
from autoshard.runtime.mesh import Mesh, current
from autoshard.runtime.parameters import Layer, Parameter, Split, attach, load_parameters, local
from autoshard.runtime.recompute import recompute

VOCABULARY, LENGTH, WIDTH, HIDDEN, BLOCKS = 37, 8, 12, 16, 4


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.7))  # a scalar: FSDP2 cannot split it

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        mixed = functional.silu(gate) * up.cumsum(1)  # positions interact
        return x + self.down(mixed) * self.scale


class Plain(nn.Module):
    """The model as a user would write it."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain(dtype: torch.dtype = torch.float64) -> Plain:
    torch.manual_seed(7)
    return Plain().to(dtype)


def batch(size: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    labels = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)
    ignored = torch.rand(size, LENGTH, generator=generator) < torch.linspace(0, 0.8, size)[:, None]
    return {"ids": ids, "labels": labels.masked_fill(ignored, -100)}


def batch_values(size: int) -> tuple[Value, ...]:
    kind = TensorType((size, LENGTH), torch.int64, per_sample=True)
    return (Value("ids", kind), Value("labels", kind))


def _addend(shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
    return Parameter(shape, dtype, partial_gradient=("tp",))


def _block_class(dtype: torch.dtype) -> type[Layer]:
    class Block(Layer):
        PARAMETERS: ClassVar = {
            "norm.weight": _addend((WIDTH,), dtype),
            "norm.bias": _addend((WIDTH,), dtype),
            "gate_up.weight": Parameter(
                (2 * HIDDEN, WIDTH), dtype, split=Split(0, (HIDDEN, HIDDEN))
            ),
            "gate_up.bias": Parameter((2 * HIDDEN,), dtype, split=Split(0, (HIDDEN, HIDDEN))),
            "down.weight": Parameter((WIDTH, HIDDEN), dtype, split=Split(1)),
            "down.bias": _addend((WIDTH,), dtype),
            "scale": _addend((), dtype),
        }

        def forward(self, x: Tensor) -> Tensor:
            normed = functional.layer_norm(
                x, (WIDTH,), local(self.norm.weight), local(self.norm.bias)
            )
            gathered = all_gather(normed, 1, LENGTH, axis="tp")
            gate, up = functional.linear(
                gathered, local(self.gate_up.weight), local(self.gate_up.bias)
            ).chunk(2, -1)
            mixed = functional.silu(gate) * up.cumsum(1)
            out = reduce_scatter(functional.linear(mixed, local(self.down.weight)), 1, axis="tp")
            return x + (out + local(self.down.bias)) * local(self.scale)

    return Block


def _ends(dtype: torch.dtype) -> tuple[type[Layer], type[Layer]]:
    class Embed(Layer):
        PARAMETERS: ClassVar = {"weight": Parameter((VOCABULARY, WIDTH), dtype)}

        def forward(self, ids: Tensor) -> Tensor:
            return split(functional.embedding(ids, local(self.weight)), 1, axis="tp")

    class Head(Layer):
        PARAMETERS: ClassVar = {
            "norm.weight": _addend((WIDTH,), dtype),
            "norm.bias": _addend((WIDTH,), dtype),
            "head.weight": Parameter((VOCABULARY, WIDTH), dtype),
        }

        def forward(self, x: Tensor, labels: Tensor, count: Tensor) -> Tensor:
            normed = functional.layer_norm(
                x, (WIDTH,), local(self.norm.weight), local(self.norm.bias)
            )
            x = all_gather_replicated(normed, 1, LENGTH, axis="tp")
            logits = functional.linear(x, local(self.head.weight))
            total = functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            return total / count

    return Embed, Head


class Stage(Layer):
    """Blocks ``first`` to ``last`` with the embedding before and the head after them, if theirs."""

    def __init__(self, stage: int, num_stages: int, dtype: torch.dtype) -> None:
        super().__init__()
        per_stage = BLOCKS // num_stages
        self.first, self.last = stage == 0, stage == num_stages - 1
        self.BATCH = (("ids",) if self.first else ()) + (("labels",) if self.last else ())
        self.PROLOGUE = ("count",) if self.last else ()
        block, (embed, head) = _block_class(dtype), _ends(dtype)
        self.paths = [f"blocks.{i}" for i in range(stage * per_stage, (stage + 1) * per_stage)]
        if self.first:
            self.input = embed()
            attach(self, self.input, "input", {"weight": "embed.weight"})
        for path in self.paths:
            attach(self, block(), path)
        if self.last:
            self.output = head()
            names = {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
            attach(self, self.output, "output", {**names, "head.weight": "embed.weight"})
        # Not submodules, so that every parameter has one path only.
        self.calls = [self.get_submodule(path) for path in self.paths]
        self.remat = False

    def prologue(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = (batch["labels"] != -100).sum()
        if current().size("dp") > 1:
            dist.all_reduce(count, group=current().group("dp"))
        return {"count": count}

    def forward(
        self,
        x: Tensor | None = None,
        *,
        key: Tensor,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        count: Tensor | None = None,
    ) -> Any:
        if ids is not None:
            x = self.input(ids)
        for block in self.calls:
            x = recompute(block, x) if self.remat else block(x)
        return x if labels is None else self.output(x, labels, count)


def stage(mesh: Mesh, dtype: torch.dtype = torch.float64, remat: bool = False) -> Stage:
    """This rank's stage with the weights of :func:`plain`; the mesh must be current."""
    made = Stage(mesh.rank("pp"), mesh.size("pp"), dtype)
    made.remat = remat
    load_parameters(made, plain(dtype).state_dict())
    return made


def boundary(mesh: Mesh, size: int, num_micro_batches: int, dtype: torch.dtype) -> TensorType:
    samples = size // mesh.size("dp") // num_micro_batches
    return TensorType((samples, LENGTH // mesh.size("tp"), WIDTH), dtype, differentiable=True)
