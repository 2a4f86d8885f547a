"""Ops that permute, add, drop or repeat dims, or copy: letters move along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autoshard.ir import Op
from autoshard.placement.candidates import base, block_options, may_split, whole
from autoshard.placement.named import (
    LETTERS,
    arguments,
    broadcast_letters,
    fresh_letters,
    with_arguments,
)
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import S, V
from autoshard.placement.strategy import Hints, Signature, Strategy


def moved(op: Op, order: Iterable[int]) -> Signature:
    """Output dim ``i`` is input dim ``order[i]``; ``-1`` for a new dim of size 1."""
    fresh = fresh_letters()
    source = LETTERS[: op.operands[0].type.ndim]
    target = "".join(next(fresh) if d < 0 else source[d] for d in order)
    return Signature((source,), (target,), linear=((0,),), padded=frozenset(source))


@rule(
    "aten.contiguous.default", "aten.clone.default", "aten.alias.default", "aten.detach.default",
    "aten.lift_fresh_copy.default",
)  # fmt: skip
def copy(op: Op) -> Signature:
    """Every element stays where it is."""
    return moved(op, range(op.output.type.ndim))


@rule("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def transpose(op: Op) -> Signature:
    order = list(range(op.output.type.ndim))
    first, second = (d % max(len(order), 1) for d in op.args[1:3])
    if order:
        order[first], order[second] = second, first
    return moved(op, order)


@rule("aten.t.default", "aten.numpy_T.default")
def reverse(op: Op) -> Signature:
    return moved(op, reversed(range(op.output.type.ndim)))


@rule("aten.mT.default", "aten.adjoint.default")
def transpose_matrices(op: Op) -> Signature:
    ndim = op.output.type.ndim
    return moved(op, (*range(ndim - 2), ndim - 1, ndim - 2))


@rule("aten.permute.default")
def permute(op: Op) -> Signature:
    ndim = op.output.type.ndim
    return moved(op, (d % ndim for d in arguments(op)["dims"]))


@rule("aten.movedim.int", "aten.movedim.intlist", "aten.moveaxis.int", "aten.moveaxis.intlist")
def movedim(op: Op) -> Signature:
    ndim = op.output.type.ndim
    source, target = (
        tuple(d % ndim for d in ((dims,) if isinstance(dims, int) else dims))
        for dims in op.args[1:3]
    )
    rest = iter(d for d in range(ndim) if d not in source)
    to = dict(zip(target, source, strict=True))
    return moved(op, [to[d] if d in to else next(rest) for d in range(ndim)])


@rule("aten.unsqueeze.default")
def unsqueeze(op: Op) -> Signature:
    order = list(range(op.operands[0].type.ndim))
    order.insert(arguments(op)["dim"] % op.output.type.ndim, -1)
    return moved(op, order)


SQUEEZES = ("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")


def _squeezed(op: Op) -> tuple[int, ...]:
    """The dims that the call drops."""
    shape = op.operands[0].type.shape
    dims = arguments(op).get("dim", range(len(shape)))
    wanted = {d % max(len(shape), 1) for d in ((dims,) if isinstance(dims, int) else dims)}
    return tuple(d for d, size in enumerate(shape) if size == 1 and d in wanted)


@rule(*SQUEEZES)
def squeeze(op: Op) -> Signature:
    dropped = _squeezed(op)
    return moved(op, (d for d in range(op.operands[0].type.ndim) if d not in dropped))


@localises(*SQUEEZES)
def squeeze_the_same_dims(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """Named explicitly: a part of size 1 must not be dropped."""
    return replace(
        local, target="aten.squeeze.dims", args=(local.args[0], _squeezed(op)), kwargs=()
    )


# --------------------------------------------------------------------------- repetition


@rule(
    "aten.expand.default", "aten.broadcast_to.default", "aten.expand_as.default",
    "aten.expand_copy.default",
)  # fmt: skip
def expand(op: Op) -> Signature:
    """A stretched or new dim may be split: then the operand is used as a whole by every rank."""
    shapes = [v.type.shape for v in op.operands]
    inputs, output, fixed = broadcast_letters(shapes, op.output.type.shape)
    passing = frozenset(inputs[0]) & frozenset(output)
    return Signature(inputs, (output,), fixed, ((0,),), passing)


@localises("aten.expand.default", "aten.broadcast_to.default", "aten.expand_copy.default")
def expand_to_local(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    return with_arguments(local, size=local.output.type.shape)


@rule("aten.broadcast_tensors.default")
def broadcast_together(op: Op) -> Signature:
    shapes = [v.type.shape for v in op.operands]
    inputs, output, fixed = broadcast_letters(shapes, op.output.type.shape)
    everything = tuple(range(len(inputs)))
    return Signature(inputs, tuple(output for _ in op.outputs), fixed, (everything,))


@rule("aten.meshgrid.default", "aten.meshgrid.indexing")
def meshgrid(op: Op) -> Signature | None:
    """Each output is one vector, stretched along the dims of all others."""
    if any(v.type.ndim != 1 for v in op.operands):
        return None
    inputs = LETTERS[: len(op.operands)]
    output = inputs
    if arguments(op).get("indexing") == "xy" and len(inputs) > 1:
        output = inputs[1] + inputs[0] + inputs[2:]
    everything = tuple(range(len(inputs)))
    return Signature(tuple(inputs), tuple(output for _ in inputs), linear=(everything,))


REPEATS = ("aten.repeat.default", "aten.tile.default")


def _repeats(op: Op) -> tuple[int, ...]:
    """How often each output dim repeats its input dim."""
    given = arguments(op).get("repeats", arguments(op).get("dims"))
    assert given is not None
    return (1,) * (op.output.type.ndim - len(given)) + tuple(given)


@strategies_for(*REPEATS)
def repeat(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
    """A dim's copies are blocks of the output; or whole copies are shared out."""
    yield from base(op, linear=[(0,)])
    value, out = op.operands[0], op.output
    missing = out.type.ndim - value.type.ndim
    for dim, times in enumerate(_repeats(op)):
        if dim >= missing:
            for blocks in block_options(hints, [(value, dim - missing)]):
                source = S(dim - missing, blocks)
                size = value.type.shape[dim - missing]
                target = S(dim, (blocks or (size,)) * times)
                if may_split(value, source, n, padded=times == 1):
                    yield Strategy((source,), (target,))
        if times > 1 and times % n == 0:
            yield Strategy((whole(value, V),), (S(dim),))


@localises(*REPEATS)
def repeat_less(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """Fewer copies where they are shared out."""
    times = list(_repeats(op))
    out = strategy.outputs[0]
    if out.is_split and not strategy.inputs[0].is_split:
        times[out.dim] //= n
    name = "repeats" if op.target == "aten.repeat.default" else "dims"
    return with_arguments(local, **{name: tuple(times)})


@strategies_for("aten.repeat_interleave.self_int")
def repeat_interleave(op: Op, n: int, hints: Hints) -> Iterable[Strategy]:
    """Copies of an element are neighbours, so a part's copies are a part of the output."""
    yield from base(op, linear=[(0,)])
    value = op.operands[0]
    given = arguments(op)
    if given["dim"] is None:
        return  # flattens
    repeated = given["dim"] % value.type.ndim
    for dim in range(value.type.ndim):
        times = given["repeats"] if dim == repeated else 1
        for blocks in block_options(hints, [(value, dim)]):
            if may_split(value, S(dim, blocks), n):
                yield Strategy((S(dim, blocks),), (S(dim, tuple(b * times for b in blocks)),))


@localises("aten.repeat_interleave.self_int")
def repeat_local(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """Without the size of the output, which the call may state."""
    return with_arguments(local, output_size=None)
