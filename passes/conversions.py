"""Conversions between states, as ops."""

from __future__ import annotations

from autoshard.ir import Arg, Op, Value
from autoshard.placement.conversion import conversion, convertible
from autoshard.placement.state import State, V

_NEEDS_SIZE = frozenset({"all_gather", "all_gather_replicated", "pad"})


def way(source: State, target: State) -> tuple[State, ...] | None:
    """The states to pass through, the target last; ``None`` if there is no way.

    Two splits of one dim with different blocks go through the whole value.
    """
    if convertible(source, target):
        return (target,)
    if convertible(source, V) and convertible(V, target):
        return (V, target)
    return None


def conversion_op(
    whole: Value, source: Value, out: Value, have: State, need: State, axis: str, module: str
) -> Op:
    """``out = convert(source)``.

    Args:
        whole: the value before the axis was applied: its sizes are the whole ones.
    """
    entry = conversion(have, need)
    assert entry is not None
    return Op(
        name=out.name,
        target=f"autoshard.{entry.function}",
        args=(source, *_arguments(whole, have, need, entry.function)),
        kwargs=(("axis", axis),),
        outputs=(out,),
        module=module,
    )


def _arguments(whole: Value, have: State, need: State, function: str) -> tuple[Arg, ...]:
    if function == "all_to_all":
        blocks = (have.blocks, need.blocks) if have.blocks or need.blocks else ()
        return (have.dim, need.dim, whole.type.shape[have.dim], *blocks)
    split = need if need.is_split else have
    if not split.is_split:
        return ()
    size = (whole.type.shape[split.dim],) if function in _NEEDS_SIZE else ()
    return (split.dim, *size, *((split.blocks,) if split.blocks else ()))
