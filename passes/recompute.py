"""Mark what backward recomputes.

The plan names ops to keep as the captured layer has them; the sum that a conversion makes of a
kept op's addends is kept as well, so that backward repeats no communication for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from autoshard.errors import InternalError
from autoshard.ir import Graph
from autoshard.passes.base import Call, Stage, StageGraphs
from autoshard.placement.conversion import is_conversion
from autoshard.plan.plan import Recompute


@dataclass(frozen=True, slots=True)
class MarkRecompute:
    """Translate each segment's plan into ops of its local graph."""

    name: str = "recompute"

    def accepts(self, graphs: StageGraphs) -> bool:
        return any(call.recompute.keep for stage in graphs.stages for call in stage.calls)

    def apply(self, graphs: StageGraphs) -> StageGraphs:
        def marked(call: Call) -> Call:
            keep = _kept(graphs.layers[call.layer].graph, call.recompute.keep, call.path)
            return replace(call, recompute=Recompute(mode=call.recompute.mode, keep=keep))

        def stage_marked(stage: Stage) -> Stage:
            return replace(stage, calls=tuple(marked(call) for call in stage.calls))

        return replace(graphs, stages=tuple(map(stage_marked, graphs.stages)))


def _kept(graph: Graph, keep: Iterable[str], path: str) -> tuple[str, ...]:
    wanted = set(keep)
    known = {op.name for op in graph.ops} | {v.name for op in graph.ops for v in op.outputs}
    if unknown := wanted - known:
        raise InternalError(f"recompute: {path} has no ops {sorted(unknown)} to keep")
    kept: list[str] = []
    results: set[str] = set()
    for op in graph.ops:
        outputs = {v.name for v in op.outputs}
        converted = is_conversion(op) and op.operands[0].name in results
        if op.name in wanted or outputs & wanted or converted:
            kept.append(op.name)
            results |= outputs
    return tuple(kept)
