"""Is a graph legal? Checked after capture and after every pass.

``AUTOSHARD_VERIFY`` sets how much is looked at: ``0`` nothing; ``1`` (the default) that every
operand is defined before its use, names are unique and conversions name an axis; ``2`` also that
every op, run on tensors without storage, returns what it declares: a literal that was not made
local shows there.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autoshard.errors import InternalError
from autoshard.ir import Graph, Op, TensorType, Value, resolve
from autoshard.placement.conversion import is_conversion
from autoshard.placement.state import local_size

DEFAULT_LEVEL = 1


def verify(graph: Graph, where: str, sizes: Mapping[str, int] | None = None) -> None:
    """Check one graph.

    Args:
        where: the pass and the layer, for the message.
        sizes: ranks of each mesh axis; without it the shapes of conversions are not checked.

    Raises:
        InternalError: naming ``where``, the op and what is wrong with it.
    """
    level = int(os.environ.get("AUTOSHARD_VERIFY", DEFAULT_LEVEL))
    if level >= 1:
        _check_structure(graph, where)
    if level >= 2:
        for op in graph.ops:
            _check_types(op, where, sizes or {})


def _check_structure(graph: Graph, where: str) -> None:
    defined: dict[str, TensorType] = {}
    for value in (*graph.inputs, *graph.parameters):
        if value.name in defined:
            raise InternalError(f"{where}: {value} is an input or parameter twice")
        defined[value.name] = value.type
    names: set[str] = set()
    for op in graph.ops:
        if op.name in names:
            raise InternalError(f"{where}: two ops are named {op.name}")
        names.add(op.name)
        for value in op.operands:
            _check_use(value, defined, f"{where}: op {op.name} ({op.target})")
        for value in op.outputs:
            if value.name in defined:
                raise InternalError(f"{where}: op {op.name} defines %{value.name} again")
            defined[value.name] = value.type
        if is_conversion(op) and not isinstance(op.keywords.get("axis"), str):
            raise InternalError(f"{where}: conversion {op.name} names no axis: {op}")
    for value in graph.outputs:
        _check_use(value, defined, f"{where}: the outputs")


def _check_use(value: Value, defined: Mapping[str, TensorType], user: str) -> None:
    if value.name not in defined:
        raise InternalError(f"{user} take %{value.name}, which is not defined before")
    found = defined[value.name]
    if (found.shape, found.dtype) != (value.type.shape, value.type.dtype):
        raise InternalError(f"{user} take {value}, which is defined as {found}")


def _check_types(op: Op, where: str, sizes: Mapping[str, int]) -> None:
    declared = [(v.type.shape, v.type.dtype) for v in op.outputs]
    if is_conversion(op):
        given = _converted(op, sizes)
        actual = [given] if given else declared
    elif any(k == "axis" or (k == "axes" and a) for k, a in op.kwargs):
        return  # talks to other ranks: its shapes are its rule's business
    else:
        actual = _run(op, where)
    if actual != declared:
        raise InternalError(
            f"{where}: op {op.name} returns {_show(actual)} but declares {_show(declared)}: {op}"
        )


def _run(op: Op, where: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What PyTorch says the op returns."""
    with _fake_mode(), torch.no_grad():
        tensors = op.map(lambda v: torch.empty(v.type.shape, dtype=v.type.dtype, device="cpu"))
        try:
            result = resolve(op.target)(*tensors.args, **dict(tensors.kwargs))
        except Exception as error:
            raise InternalError(f"{where}: op {op.name} fails: {op}: {error}") from error
    return [(tuple(t.shape), t.dtype) for t in _tensors(result)]


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)


@functools.cache
def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode()


def _converted(op: Op, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], torch.dtype] | None:
    """What a conversion returns, by the table of local sizes; ``None`` if the axis is unknown."""
    n = sizes.get(op.keywords["axis"])
    if n is None:
        return None
    source = op.operands[0].type
    shape, function, literals = list(source.shape), op.target.split(".")[1], op.args[1:]
    if function in {"split", "split_varying", "reduce_scatter"}:
        dim, *blocks = literals
        shape[dim] = _local(shape[dim], blocks[0] if blocks else (), n)
    elif function in {"all_gather", "all_gather_replicated", "pad"}:
        dim, size, *blocks = literals
        _expect(op, shape[dim], _local(size, blocks[0] if blocks else (), n))
        shape[dim] = size
    elif function == "all_to_all":
        source_dim, target_dim, size, *both = literals
        source_blocks, target_blocks = both or ((), ())
        _expect(op, shape[source_dim], _local(size, source_blocks, n))
        shape[source_dim] = size
        shape[target_dim] = _local(shape[target_dim], target_blocks, n)
    return tuple(shape), source.dtype


def _local(size: int, blocks: tuple[int, ...], n: int) -> int:
    return sum(local_size(b, n) for b in blocks or (size,))


def _expect(op: Op, found: int, expected: int) -> None:
    if found != expected:
        raise InternalError(
            f"conversion {op.name} expects a part of {expected} but takes {found}: {op}"
        )


def _show(types: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(str(TensorType(shape, dtype)) for shape, dtype in types)
