"""A small frame for rewrites of a flat graph: one pass over the ops, with values replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoshard import ir
from autoshard.capture.lower import Lowered, annotated


@dataclass(frozen=True, slots=True)
class Replacement:
    """What an op becomes: new ops, and the value that stands for its first output from now on."""

    ops: tuple[ir.Op, ...]
    value: ir.Value


RewriteRule = Callable[["Rewriter", ir.Op], Replacement | None]


class Rewriter:
    """One pass; ``producer`` tells what made a value of the new graph."""

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered
        self._taken = {name for op in lowered.graph.ops for name in (op.name, *_names(op.outputs))}
        self._taken.update(_names((*lowered.graph.inputs, *lowered.graph.parameters)))
        self._made: dict[str, ir.Op] = {}
        self._used = {v.name for op in lowered.graph.ops for v in op.operands}
        self._used.update(_names(lowered.graph.outputs))

    def is_used(self, value: ir.Value) -> bool:
        """Some op of the original graph takes ``value``, or it is an output."""
        return value.name in self._used

    def producer(self, value: Any, target: str) -> ir.Op | None:
        """The op that made ``value``, if it is a call of ``target``."""
        op = self._made.get(value.name) if isinstance(value, ir.Value) else None
        return op if op is not None and op.target == target else None

    def op_like(
        self,
        op: ir.Op,
        target: str,
        args: tuple[ir.Arg, ...],
        shape: Iterable[int],
        dtype: torch.dtype,
        kwargs: tuple[tuple[str, ir.Arg], ...] = (),
    ) -> ir.Op:
        """A new op with a fresh name, made where ``op`` was made."""
        name = base = target.split(".")[1]
        count = 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        output = ir.Value(name, ir.TensorType(tuple(shape), dtype))
        return replace(op, name=name, target=target, args=args, kwargs=kwargs, outputs=(output,))

    def run(self, rule: RewriteRule) -> Lowered:
        """Apply ``rule`` to every op, on rewritten operands; then drop dead ops."""
        graph = self._lowered.graph
        stands_for: dict[str, ir.Value] = {}
        calls, frames = dict(self._lowered.calls), dict(self._lowered.frames)
        ops: list[ir.Op] = []
        for old in graph.ops:
            op = old.map(lambda v: stands_for.get(v.name, v))
            found = rule(self, op)
            if found is None:
                new: tuple[ir.Op, ...] = (op,)
            else:
                new = found.ops
                stands_for[op.outputs[0].name] = found.value
            for made in new:
                calls[made.name] = calls[old.name]
                frames[made.name] = frames[old.name]
                self._made.update((v.name, made) for v in made.outputs)
            ops.extend(new)
        outputs = tuple(stands_for.get(v.name, v) for v in graph.outputs)
        graph = replace(graph, ops=tuple(ops), outputs=outputs).without_dead_ops()
        return replace(self._lowered, graph=annotated(graph), calls=calls, frames=frames)


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(v.name for v in values)
