"""What to keep of a layer whose forward is run again in backward: an integer program per budget.

A recomputed layer keeps its inputs. Backward runs its ops again, in order, until everything that
autograd saves exists once more; a kept op is not run again, and its results stay in memory.

Sets
    units ``u``: an op and the conversions of its results, which are kept together;
    storages ``r``: what the results of kept ops occupy, each once, views belonging to their base.
Variables
    ``k[u]`` binary: the unit is kept; ``h[r]`` in 0..1: the storage is held.
Objective
    the seconds of what runs again, ``sum seconds[u] (1 - k[u])``, over the ops that would run
    again at all (:func:`repeated_ops`).
Constraints
    ``k[u] <= h[r]`` for every storage of the unit's results;
    ``sum bytes[r] h[r] + sum extra[u] k[u] <= budget`` (masks and the like belong to their op).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

import numpy as np

from autoshard.cost_models.memory import SavedActivations
from autoshard.errors import OptionError
from autoshard.ir import Graph, Op
from autoshard.placement.conversion import is_conversion
from autoshard.plan.plan import Recompute
from autoshard.plan.solver import Builder, Milp, solve

Point = tuple[float, float]
"""Bytes and seconds."""
_NEGLIGIBLE = 1e-6
"""Points of a hull that are closer to each other, relatively, count as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """One layer class as one rank runs it for one micro-batch, conversions included.

    Attributes:
        forward_s: op name -> seconds of its forward.
        shared_inputs: inputs that other segments hold anyway (masks, rotary tables): not counted.
    """

    graph: Graph
    forward_s: Mapping[str, float]
    saved: SavedActivations
    shared_inputs: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True, kw_only=True)
class MenuEntry:
    """One way to recompute a layer.

    Attributes:
        keep: names of ops, without the conversions that are kept along with them.
        extra_backward_s: what runs again, per micro-batch.
        saved_bytes: held from forward to backward, layer inputs included.
        peak_recompute_bytes: what recomputing brings back for as long as backward of this one
            layer takes.
    """

    mode: str
    keep: tuple[str, ...] = ()
    extra_backward_s: float = 0.0
    saved_bytes: int = 0
    peak_recompute_bytes: int = 0

    @property
    def recompute(self) -> Recompute:
        return Recompute(mode=self.mode, keep=self.keep)


@dataclass(frozen=True, slots=True)
class _Unit:
    """An op and the conversions of its results; seconds of what would run again of them."""

    name: str
    ops: frozenset[str]
    seconds: float
    storages: tuple[str, ...]
    extra_bytes: int


def repeated_ops(graph: Graph, saved: SavedActivations) -> tuple[str, ...]:
    """The ops that full recompute runs again, in order.

    ``torch.utils.checkpoint`` stops as soon as the last saved tensor exists again. Operands are
    saved before an op runs, so the last op that saves anything runs only if it saves a result.
    """
    last = -1
    for position, op in enumerate(graph.ops):
        if saved.needs.get(op.name) or saved.extra_bytes.get(op.name):
            last = position
    if last < 0:
        return ()
    final = graph.ops[last]
    results = {v.name for v in final.outputs}.intersection(saved.needs.get(final.name, ()))
    included = bool(results) or bool(saved.extra_bytes.get(final.name))
    return tuple(op.name for op in graph.ops[: last + included])


def recompute_menu(
    layer: LayerCosts, num_points: int = 6, *, time_limit_s: float = 10.0
) -> tuple[MenuEntry, ...]:
    """Ways to recompute a layer, from ``none`` to ``full``, none of the others dominated.

    Between the two lie the fastest within evenly spaced budgets.

    Args:
        num_points: at most this many entries, at least 2.
    """
    if num_points < 2:
        raise OptionError(f"num_points expects at least 2 but got {num_points}; ask for 2 or more")
    units = _units(layer)
    none, full = _nothing(layer), _entry(layer, units, frozenset(), mode="full")
    entries = []
    useful = [u for u in units if u.seconds > 0.0]
    room = none.saved_bytes - full.saved_bytes
    if useful and room > 0 and num_points > 2:
        milp, columns, row = _program(layer, useful)
        for limit in np.linspace(0.0, room, num_points)[1:-1]:
            entries.append(_best_within(layer, units, (milp, columns, row), limit, time_limit_s))
    return (none, *_undominated(entries, none, full), full)


def freed_bytes(layer: LayerCosts, num_points: int = 9) -> tuple[float, tuple[Point, ...]]:
    """What is saved without recomputation, and what freeing some of it takes at least.

    No mix of ways to recompute is below the convex function that the pieces are of: the upper
    envelope of lines ``price * freed + rest`` that no way is below, which the same program finds
    with bytes priced instead of limited. The prices are those at which the menu's entries change.

    Returns:
        Bytes, and pieces of (bytes freed, seconds), cheapest first.
    """
    menu = recompute_menu(layer, num_points)
    saved = float(menu[0].saved_bytes)
    corners = _lower_hull([(saved - e.saved_bytes, e.extra_backward_s) for e in menu])
    prices = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(corners)]
    lines = [(0.0, 0.0), *zip(prices, _least_rests(layer, prices), strict=True)]
    most = corners[-1][0]
    meets = {(q - s) / (p - r) for (p, s), (r, q) in combinations(lines, 2) if p != r}
    at = sorted({0.0, most, *(x for x in meets if 0.0 < x < most)})
    floor = _lower_hull([(x, max(p * x + rest for p, rest in lines)) for x in at])
    return saved, tuple((b[0] - a[0], b[1] - a[1]) for a, b in pairwise(floor))


def _least_rests(layer: LayerCosts, prices: Sequence[float]) -> Iterator[float]:
    """By price, the least ``seconds - price * freed bytes`` of any way to recompute, or of none."""
    units = [u for u in _units(layer) if u.seconds > 0.0]
    room = _nothing(layer).saved_bytes - _entry(layer, (), frozenset(), mode="full").saved_bytes
    again_s = _repeated_s(layer, ())
    milp, _, row = _program(layer, units)
    own = milp.rows == row
    for price in prices:
        objective = milp.objective.copy()
        objective[milp.columns[own]] += price * milp.coefficients[own]
        least = solve(replace(milp, objective=objective), relax_first=True).bound
        yield min(0.0, again_s - price * room + least)


def _lower_hull(points: Sequence[Point]) -> list[Point]:
    """Those on the lower convex hull, by falling yield of what is freed."""
    hull: list[Point] = []
    for point in sorted(points):
        if hull and point[0] - hull[-1][0] <= _NEGLIGIBLE * point[0]:
            continue
        while len(hull) > 1 and (point[1] - hull[-2][1]) * (hull[-1][0] - hull[-2][0]) <= (
            hull[-1][1] - hull[-2][1]
        ) * (point[0] - hull[-2][0]):
            hull.pop()
        hull.append(point)
    return hull


def pinned_menu(
    layer: LayerCosts, again: Callable[[Op], bool], *, regions: bool = False
) -> tuple[MenuEntry, ...]:
    """The one way to recompute a layer in which the ops that ``again`` names run again.

    Args:
        regions: they alone are checkpointed, rather than the layer but for the other ops' results.
    """
    if regions:
        return _region_menu(layer, frozenset(op.name for op in layer.graph.ops if again(op)))
    units = _units(layer)
    ops = {op.name: op for op in layer.graph.ops}
    kept = frozenset(u.name for u in units if not again(ops[u.name]))
    none = _nothing(layer)
    if len(kept) == len(units):
        return (none,)
    return none, _entry(layer, units, kept, mode="selective")


def _region_menu(layer: LayerCosts, again: frozenset[str]) -> tuple[MenuEntry, ...]:
    """Regions keep what comes into them; what they make is kept if others save it."""
    none, saved = _nothing(layer), layer.saved
    if not again:
        return (none,)
    made = {saved.owners[v.name] for op in layer.graph.ops if op.name in again for v in op.outputs}
    given = {v.name for v in layer.graph.parameters} | layer.shared_inputs
    held = {
        name: value.num_bytes for name, value in saved.values.items()
        if not again.issuperset(value.savers)
    }  # fmt: skip
    for op in layer.graph.ops:
        for value in op.operands if op.name in again else ():
            if (owner := saved.owners[value.name]) not in made:
                held[owner] = layer.graph.values[owner].type.nbytes
    extra = sum(n for name, n in saved.extra_bytes.items() if name not in again)
    total = sum(n for name, n in held.items() if name not in given) + extra
    entry = MenuEntry(
        mode="selective",
        keep=tuple(op.name for op in layer.graph.ops if op.name not in again),
        extra_backward_s=sum(layer.forward_s[name] for name in again),
        saved_bytes=total,
        peak_recompute_bytes=max(0, none.saved_bytes - total),
    )
    return none, entry


def best_within(
    layer: LayerCosts, budget_bytes: float, *, time_limit_s: float = 10.0
) -> MenuEntry | None:
    """The way that takes least time among all that save at most ``budget_bytes``.

    ``None`` if not even full recompute fits.
    """
    none = _nothing(layer)
    if none.saved_bytes <= budget_bytes:
        return none
    units = _units(layer)
    full = _entry(layer, units, frozenset(), mode="full")
    if full.saved_bytes > budget_bytes:
        return None
    useful = [u for u in units if u.seconds > 0.0]
    room = budget_bytes - full.saved_bytes
    if not useful:
        return full
    return _best_within(layer, units, _program(layer, useful), room, time_limit_s)


def _units(layer: LayerCosts) -> list[_Unit]:
    """Every op that may be kept, with the conversions that follow from its results."""
    given = {v.name for v in (*layer.graph.inputs, *layer.graph.parameters)}
    owners = layer.saved.owners
    repeated = set(repeated_ops(layer.graph, layer.saved))
    members: dict[str, list[Op]] = {}
    unit_of: dict[str, str] = {}
    for op in layer.graph.ops:
        head = op.name
        if is_conversion(op):
            source = op.operands[0].name
            if source not in unit_of:
                continue
            head = unit_of[source]
        members.setdefault(head, []).append(op)
        unit_of.update((v.name, head) for v in op.outputs)
    units = []
    for name, ops in members.items():
        storages = (owners.get(v.name, v.name) for op in ops for v in op.outputs)
        units.append(
            _Unit(
                name=name,
                ops=frozenset(op.name for op in ops),
                seconds=sum(layer.forward_s[op.name] for op in ops if op.name in repeated),
                storages=tuple(dict.fromkeys(s for s in storages if s not in given)),
                extra_bytes=sum(layer.saved.extra_bytes.get(op.name, 0) for op in ops),
            )
        )
    return units


def _storage_bytes(layer: LayerCosts) -> dict[str, int]:
    sizes = {name: value.type.nbytes for name, value in layer.graph.values.items()}
    sizes.update((name, saved.num_bytes) for name, saved in layer.saved.values.items())
    return sizes


def _program(layer: LayerCosts, units: Sequence[_Unit]) -> tuple[Milp, dict[str, int], int]:
    """The program with an open budget, the columns of its units, and the budget's row."""
    builder, sizes = Builder(), _storage_bytes(layer)
    kept = {u.name: builder.variable(-u.seconds) for u in units}
    held: dict[str, int] = {}
    for unit in units:
        for storage in unit.storages:
            if storage not in held:
                held[storage] = builder.variable(integer=False)
            builder.row([kept[unit.name], held[storage]], [1.0, -1.0], upper=0.0)
    row = builder.row(
        [*held.values(), *kept.values()],
        [*(float(sizes[s]) for s in held), *(float(u.extra_bytes) for u in units)],
    )
    return builder.build(), kept, row


def _best_within(
    layer: LayerCosts,
    units: Sequence[_Unit],
    program: tuple[Milp, dict[str, int], int],
    room_bytes: float,
    time_limit_s: float,
) -> MenuEntry:
    milp, columns, row = program
    upper = milp.row_upper.copy()
    upper[row] = room_bytes
    solution = solve(replace(milp, row_upper=upper), time_limit_s=time_limit_s)
    if not solution.found:
        return _entry(layer, units, frozenset(), mode="full")
    chosen = frozenset(name for name, column in columns.items() if solution.values[column] > 0.5)
    return _entry(layer, units, chosen, mode="selective" if chosen else "full")


def _nothing(layer: LayerCosts) -> MenuEntry:
    """Without recompute: what autograd saves."""
    saved = layer.saved
    values = sum(v.num_bytes for n, v in saved.values.items() if n not in layer.shared_inputs)
    return MenuEntry(mode="none", saved_bytes=values + sum(saved.extra_bytes.values()))


def _entry(
    layer: LayerCosts, units: Sequence[_Unit], chosen: frozenset[str], *, mode: str
) -> MenuEntry:
    sizes = _storage_bytes(layer)
    kept = [u for u in units if u.name in chosen]
    held = dict.fromkeys(s for u in kept for s in u.storages)
    inputs = {
        layer.saved.owners.get(v.name, v.name): sizes[v.name]
        for v in layer.graph.inputs
        if v.name not in layer.shared_inputs
    }
    extra = sum(u.extra_bytes for u in kept)
    lost = [
        v.num_bytes for n, v in layer.saved.values.items() if not v.layer_input and n not in held
    ]
    return MenuEntry(
        mode=mode,
        keep=tuple(u.name for u in kept),
        extra_backward_s=_repeated_s(layer, kept),
        saved_bytes=sum(inputs.values()) + sum(sizes[s] for s in held) + extra,
        peak_recompute_bytes=sum(lost) + sum(layer.saved.extra_bytes.values()) - extra,
    )


def _repeated_s(layer: LayerCosts, kept: Sequence[_Unit]) -> float:
    skipped = frozenset[str]().union(*(u.ops for u in kept))
    repeated = repeated_ops(layer.graph, layer.saved)
    return sum(layer.forward_s[name] for name in repeated if name not in skipped)


def _undominated(entries: Sequence[MenuEntry], none: MenuEntry, full: MenuEntry) -> list[MenuEntry]:
    """Those between ``none`` and ``full`` that nothing beats in both seconds and bytes."""
    kept: list[MenuEntry] = []
    least = none.saved_bytes
    for entry in sorted(entries, key=lambda e: (e.extra_backward_s, e.saved_bytes)):
        slower = entry.extra_backward_s >= full.extra_backward_s
        if full.saved_bytes < entry.saved_bytes < least and not slower:
            kept.append(entry)
            least = entry.saved_bytes
    return kept
