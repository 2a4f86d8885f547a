"""Which block structures are worth trying, found in the program itself.

A fused projection is split by heads only if its output dim is split blockwise, one block for each
of the tensors that are cut out of it. Where a program cuts (``split``, ``cat``, a ``view`` with a
leading count), the ops' own strategies name the blocks; from there they are carried through every
op that can keep them, back to the parameters and on to the uses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from autoshard.ir import Graph, Op
from autoshard.placement import registry
from autoshard.placement.rules.shapes import FLATTENS, VIEWS
from autoshard.placement.strategy import Hints

MAX_BLOCKS = 8
MAX_LEADING_COUNT = 4
"""A view with a larger leading count tells heads apart, which are split as they are."""
MAX_HINTS_PER_DIM = 4

_Found = dict[tuple[str, int], frozenset[tuple[int, ...]]]


@functools.lru_cache(maxsize=256)
def block_hints(graph: Graph) -> Hints:
    """Block sizes by (value name, dim), at most four for a dim, none with more than eight blocks.

    On an axis of one rank every split is legal, so the strategies of an op for one rank tell which
    blocks of its operands and outputs belong together, whatever sizes will have to divide later.
    Remembered, since planning asks again and again for those of few graphs.
    """
    found: _Found = {}
    for ops in (tuple(reversed(graph.ops)), graph.ops):
        for _ in range(2):  # once more for values that are used by earlier ops as well
            if not _sweep(ops, found):
                break
    return found


def _sweep(ops: Sequence[Op], found: _Found) -> bool:
    """Carry blocks through each op; whether anything was new."""
    changed = False
    for op in ops:
        before = {key: blocks for key, blocks in found.items()}
        for key, blocks in sorted(_blocks_of(op, found), key=_simplest_first):
            known = found.get(key, frozenset())
            if len(known) < MAX_HINTS_PER_DIM:
                found[key] = known | {blocks}
        changed |= found != before
    return changed


def _simplest_first(item: tuple[tuple[str, int], tuple[int, ...]]) -> tuple[object, ...]:
    (name, dim), blocks = item
    return len(blocks), name, dim, blocks


def _blocks_of(op: Op, found: _Found) -> Iterable[tuple[tuple[str, int], tuple[int, ...]]]:
    values = (*op.operands, *op.outputs)
    mine = {key: b for key, b in found.items() if any(key[0] == v.name for v in values)}
    is_view = op.target in (*VIEWS, *FLATTENS)
    seen: dict[tuple[tuple[str, int], tuple[int, ...]], None] = {}
    for strategy in registry.strategies(op, 1, mine):
        for value, state in zip(values, (*strategy.inputs, *strategy.outputs), strict=True):
            alike = len(set(state.blocks)) == 1
            limit = MAX_LEADING_COUNT if is_view and alike else MAX_BLOCKS
            if 1 < len(state.blocks) <= limit:
                seen[(value.name, state.dim), state.blocks] = None
    return seen
