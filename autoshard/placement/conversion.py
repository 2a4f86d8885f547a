"""How a tensor passes from one state to another on a mesh axis, forward and backward.

| from \\ to | ``R`` | ``V`` | ``S`` | ``P`` |
|---|---|---|---|---|
| ``R`` | - | identity / all-reduce | slice / all-gather | scale by 1/n / identity |
| ``V`` | identity / scale by 1/n | - | slice / pad with zeros | scale by 1/n / scale by 1/n |
| ``S`` | all-gather / slice | all-gather / reduce-scatter | all-to-all, both ways | pad / slice |
| ``P`` | all-reduce / identity | all-reduce / all-reduce | reduce-scatter / all-gather | - |

Each entry is one function of :mod:`autoshard.runtime.collectives`. Megatron's *f* is ``R -> V``,
its *g* is ``P -> R``; sequence parallelism is ``S -> V`` and ``P -> S`` (Korthikanti et al. 2022,
section 4.2.2); Ulysses and expert parallelism are ``S -> S``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoshard.ir import Op
from autoshard.placement.state import S, State

Motion = Literal[
    "none", "slice", "scale", "pad", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"
]
"""What moves on one way; the first four stay on the rank."""

COLLECTIVES: frozenset[Motion] = frozenset(
    ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """One entry of the table: the runtime function and what it does on each way."""

    function: str
    forward: Motion
    backward: Motion


_TABLE: dict[tuple[str, str], Conversion] = {
    ("R", "V"): Conversion("all_reduce_gradient", "none", "all_reduce"),
    ("R", "S"): Conversion("split", "slice", "all_gather"),
    ("R", "P"): Conversion("share", "scale", "none"),
    ("V", "R"): Conversion("share_gradient", "none", "scale"),
    ("V", "S"): Conversion("split_varying", "slice", "pad"),
    ("V", "P"): Conversion("share_varying", "scale", "scale"),
    ("S", "R"): Conversion("all_gather_replicated", "all_gather", "slice"),
    ("S", "V"): Conversion("all_gather", "all_gather", "reduce_scatter"),
    ("S", "S"): Conversion("all_to_all", "all_to_all", "all_to_all"),
    ("S", "P"): Conversion("pad", "pad", "slice"),
    ("P", "R"): Conversion("all_reduce", "all_reduce", "none"),
    ("P", "V"): Conversion("all_reduce_both", "all_reduce", "all_reduce"),
    ("P", "S"): Conversion("reduce_scatter", "reduce_scatter", "all_gather"),
}

FUNCTIONS: frozenset[str] = frozenset(entry.function for entry in _TABLE.values())


def is_conversion(op: Op) -> bool:
    """The op is an entry of the table."""
    namespace, _, function = op.target.partition(".")
    return namespace == "autoshard" and function in FUNCTIONS


def conversion(source: State, target: State) -> Conversion | None:
    """The way from one state to another; ``None`` if they are equal.

    Two splits of one dim with different blocks have no direct way: they go through ``V``.

    Raises:
        KeyError: if there is no way in one step.
    """
    if source == target:
        return None
    if source.is_split and target.is_split and source.dim == target.dim:
        raise KeyError((str(source), str(target)))
    return _TABLE[source.kind, target.kind]


def convertible(source: State, target: State) -> bool:
    try:
        conversion(source, target)
    except KeyError:
        return False
    return True


def conversion_states(op: Op) -> tuple[State, State]:
    """The states between which a conversion op converts; blocks are left out.

    Raises:
        StopIteration: if the op is no conversion.
    """
    function = op.target.partition(".")[2]
    source, target = next(k for k, entry in _TABLE.items() if entry.function == function)
    dims = iter(arg for arg in op.args[1:] if isinstance(arg, int))
    return tuple(S(next(dims)) if kind == "S" else State(kind) for kind in (source, target))  # type: ignore[return-value, arg-type]
