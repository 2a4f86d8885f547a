"""Cut the list of segments into pipeline stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autoshard.errors import InternalError
from autoshard.ir import Program, Segment
from autoshard.passes.base import Call, Stage, StageGraphs


@dataclass(frozen=True, slots=True)
class SplitStages:
    """Give each stage its segments and find what must be sent between stages.

    Values of the shared segment are never sent: every stage computes the ones that it needs.
    """

    name: str = "split_stages"

    def accepts(self, graphs: StageGraphs) -> bool:
        return not graphs.stages

    def apply(self, graphs: StageGraphs) -> StageGraphs:
        program, plan = graphs.program, graphs.plan
        home = _homes(program, [[s.index for s in stage.segments] for stage in plan.stages])
        local = _available_everywhere(program)
        carried = [_carried(program, home, local, k) for k in range(len(plan.stages) - 1)]
        stages = []
        for k, stage in enumerate(plan.stages):
            calls = tuple(
                Call(
                    index=s.index,
                    path=program.segments[s.index].path,
                    layer=program.segments[s.index].layer.name,
                    bindings=program.segments[s.index].bindings,
                    recompute=s.recompute,
                )
                for s in stage.segments
                if program.segments[s.index].layer.kind != "shared"
            )
            stages.append(
                Stage(
                    index=k,
                    calls=calls,
                    receives=carried[k - 1] if k else (),
                    sends=carried[k] if k < len(carried) else (program.loss,),
                    shared_outputs=_shared_outputs(graphs.shared, calls, program),
                )
            )
        return replace(graphs, stages=tuple(stages))


def _homes(program: Program, stages: Sequence[Sequence[int]]) -> dict[int, int]:
    """Segment index -> stage."""
    home = {index: k for k, indices in enumerate(stages) for index in indices}
    for index, segment in enumerate(program.segments):
        if segment.layer.kind == "shared":
            home[index] = 0
        elif index not in home:
            raise InternalError(f"split_stages: no stage has segment {index} ({segment.path})")
    order = [home[i] for i, s in enumerate(program.segments) if s.layer.kind != "shared"]
    if order != sorted(order):
        raise InternalError(f"split_stages: stages are not in program order: {order}")
    return home


def _available_everywhere(program: Program) -> set[str]:
    """Batch values, and what the shared segment computes from them."""
    names = {v.name for v in program.batch}
    for segment in program.segments:
        if segment.layer.kind == "shared":
            names.update(segment.outputs)
    return names


def _carried(
    program: Program, home: Mapping[int, int], local: set[str], cut: int
) -> tuple[str, ...]:
    """Values made up to stage ``cut`` that a later stage needs, in the order they are made."""
    wanted = {
        name
        for index, segment in enumerate(program.segments)
        if home[index] > cut
        for name in segment.inputs
    }
    if max(home.values()) > cut:
        wanted.add(program.loss)
    made = [
        name
        for index, segment in enumerate(program.segments)
        if home[index] <= cut and segment.layer.kind != "shared"
        for name in segment.outputs
    ]
    return tuple(n for n in dict.fromkeys(made) if n in wanted and n not in local)


def _shared_outputs(
    shared: Segment | None, calls: Sequence[Call], program: Program
) -> tuple[str, ...]:
    if shared is None:
        return ()
    wanted = {name for call in calls for name in call.bindings.values()}
    if calls and calls[-1].index == len(program.segments) - 1:
        wanted.add(program.loss)
    return tuple(v.name for v in shared.layer.graph.outputs if shared.bindings[v.name] in wanted)
