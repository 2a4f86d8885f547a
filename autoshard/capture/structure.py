"""What a stretch of ops is without its names: stretches are equal if their forms are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from autoshard import ir


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive ops with what flows in and out of them.

    Attributes:
        inputs: values from outside, in order of first use.
        parameters: parameters and buffers, in order of first use.
        outputs: values that are used after the stretch, in order of production.
    """

    ops: tuple[ir.Op, ...]
    inputs: tuple[ir.Value, ...]
    parameters: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def stretch_of(
    ops: Sequence[ir.Op], parameters: Mapping[str, ir.Value], used_later: Callable[[str], bool]
) -> Stretch:
    """Find what flows in and out of ``ops``."""
    made: set[str] = set()
    inputs: dict[str, ir.Value] = {}
    held: dict[str, ir.Value] = {}
    for op in ops:
        for value in op.operands:
            if value.name in parameters:
                held.setdefault(value.name, value)
            elif value.name not in made:
                inputs.setdefault(value.name, value)
        made.update(v.name for v in op.outputs)
    outputs = tuple(v for op in ops for v in op.outputs if used_later(v.name))
    return Stretch(tuple(ops), tuple(inputs.values()), tuple(held.values()), outputs)


def relative(name: str, path: str) -> str:
    """``name`` below the module ``path``; unchanged if it lies elsewhere."""
    if name == path:
        return ""
    return name[len(path) + 1 :] if path and name.startswith(path + ".") else name


def form_of(
    stretch: Stretch, path: str, kind_of: Callable[[str], str], *, loosely: bool = False
) -> Hashable:
    """Ops, literals, types and wiring, with parameters named relative to ``path``.

    Args:
        kind_of: what sort of input a value is; inputs of different sorts are different.
        loosely: leave out float literals (drop rates, scales), which do not change the cost.
    """
    refs: dict[str, Hashable] = {}
    for p in stretch.parameters:
        refs[p.name] = ("parameter", relative(p.name, path))
    for i, v in enumerate(stretch.inputs):
        refs[v.name] = ("input", i)

    def form(arg: ir.Arg) -> Hashable:
        if isinstance(arg, ir.Value):
            return refs[arg.name]
        if isinstance(arg, tuple):
            return tuple(map(form, arg))
        if isinstance(arg, float) and loosely:
            return "float"
        return (type(arg).__name__, arg if not isinstance(arg, torch.dtype) else str(arg))

    ops = []
    for number, op in enumerate(stretch.ops):
        args = (form(op.args), tuple((k, form(v)) for k, v in op.kwargs))
        module = "" if loosely else relative(op.module, path)
        ops.append((op.target, *args, tuple(v.type for v in op.outputs), module))
        refs.update((v.name, ("op", number, i)) for i, v in enumerate(op.outputs))
    return (
        tuple(ops),
        tuple((kind_of(v.name), v.type) for v in stretch.inputs),
        tuple((relative(p.name, path), p.type) for p in stretch.parameters),
        tuple(refs[v.name] for v in stretch.outputs),
    )
