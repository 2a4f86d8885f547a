"""What a search keeps that does not depend on what things cost.

One memo may serve several searches of the same program with the same pins on the tensor axis: with
other prices, on other clusters, for other meshes. Then a search only prices again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autoshard.cost_models.fusion import fused_works
from autoshard.cost_models.memory import SavedActivations, saved_values, workspace_bytes
from autoshard.cost_models.products import Work
from autoshard.cost_models.work import launches
from autoshard.ir import Graph, Program
from autoshard.passes.apply_axis import apply_axis
from autoshard.plan.local_program import LocalProgram
from autoshard.plan.plan import Assignment

if TYPE_CHECKING:
    from autoshard.plan.sharding_front import Sharding


@dataclass(frozen=True, slots=True)
class RankClass:
    """One layer class as one rank runs it for one micro-batch: facts, no prices.

    Attributes:
        launches: what the host calls for in forward and in backward, conversions aside. A fused
            kernel written by hand is called through as much Python as the ops that it stands for.
        fused: the work of each op by name where neighbouring elementwise ops share a kernel.
    """

    graph: Graph
    saved: SavedActivations
    workspace_bytes: int
    launches: tuple[int, int]
    fused: Mapping[str, Work]


RankClasses = dict[tuple[str, str], RankClass]
"""By name of the class and text of its assignment."""


@dataclass(slots=True)
class Memo:
    """Facts of one program.

    Attributes:
        coupled: where samples interact; ``None``: not asked yet.
        locals: the program of one rank and micro-batch, by (dp, micro-batches, cp, tp, ep).
        ranks: by local program and degree: every class on one rank, by name and assignment.
        shardings: with ``keeps_shardings``, those found, by degree, micro-batch, price of memory
            and pin.
        keeps_shardings: a sharding once chosen stays although prices change. Right where pins
            leave one way; else the plan priced is what was best at first.
    """

    coupled: tuple[str, ...] | None = None
    locals: dict[tuple[int, int, int, int, int], LocalProgram] = field(default_factory=dict)
    ranks: dict[tuple[int, int, str], RankClasses] = field(default_factory=dict)
    shardings: dict[tuple[object, ...], Sharding | None] = field(default_factory=dict)
    keeps_shardings: bool = False


def rank_classes(
    program: Program,
    graphs: Mapping[str, Graph],
    assignments: Mapping[str, Assignment],
    tp: int,
    device_kind: str,
    known: RankClasses,
) -> dict[str, RankClass]:
    """Every class of a program under an assignment on the tensor axis.

    Args:
        graphs: class graphs after the batch is split.
        known: what was found before from the same graphs; added to.
    """
    found = {}
    for layer in program.classes:
        key = (layer.name, repr(assignments.get(layer.name)))
        if key not in known:
            graph = graphs[layer.name]
            if tp > 1:
                graph = apply_axis(graph, assignments[layer.name], "tp", tp)
            saved = saved_values(graph, device_kind=device_kind)
            known[key] = RankClass(
                graph, saved, workspace_bytes(graph, saved), launches(graph), fused_works(graph)
            )
        found[layer.name] = known[key]
    return found
