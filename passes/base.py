"""What passes work on, and how they are run.

A pass is a pure step from :class:`StageGraphs` to :class:`StageGraphs`. Between any two the
verifier looks at every graph; ``AUTOSHARD_DUMP=<folder>`` writes what each pass left as text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from autoshard.ir import Graph, LayerClass, Program, Segment
from autoshard.passes.randomness import is_random
from autoshard.plan.plan import Mesh, Plan, Recompute
from autoshard.verify import verify

SEQUENTIAL = "micro"
"""The axis of micro-batches: its "ranks" run one after the other, so nothing moves between them."""


def whole(name: str) -> str:
    """The name of a value for the whole local batch rather than for one micro-batch."""
    return f"{name}@whole"


def axis_sizes(plan: Plan) -> dict[str, int]:
    """Size of every axis that graphs are localised for, in the order of application."""
    parts = plan.num_micro_batches // plan.standalone
    return {"dp": plan.mesh.dp, SEQUENTIAL: parts, "cp": plan.mesh.cp, "tp": plan.mesh.tp}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer class as it stands after the passes so far.

    Attributes:
        random_axes: for every op that draws numbers, the axes over which its output is split.
    """

    name: str
    kind: str
    graph: Graph
    random_axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One segment of the program in a stage.

    Attributes:
        index: position among the program's segments.
        bindings: class value name -> program value name (as in :class:`autoshard.ir.Segment`).
    """

    index: int
    path: str
    layer: str
    bindings: Mapping[str, str]
    recompute: Recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one pipeline stage runs. Values between its calls go by their program names.

    A batch value, or one that the shared segment computes, may exist twice: under its name as a
    micro-batch has it, and under :func:`whole` of its name for the whole local batch.

    Attributes:
        receives, sends: activations from the stage before and to the stage after, in one order on
            both sides; a value that a later stage needs passes through all stages in between.
        shared_outputs: values of the shared segment that this stage needs, by class name.
        prologue: the part of the shared segment that runs once per step on the whole local batch;
            its inputs are batch values by name, its outputs are :func:`whole` values.
        shared: the part that runs for every micro-batch.
        cut: values whose whole version is cut into micro-batches along dim 0 after the prologue.
    """

    index: int
    calls: tuple[Call, ...]
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    shared_outputs: tuple[str, ...] = ()
    prologue: Graph | None = None
    shared: Graph | None = None
    cut: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGraphs:
    """A program on its way to one graph per stage.

    Attributes:
        layers: the distinct layers by class name; each is rewritten once for all stages.
        stages: empty until the program is split.
        axes: the axes that have been applied.
    """

    program: Program
    plan: Plan
    layers: Mapping[str, Layer]
    stages: tuple[Stage, ...] = ()
    axes: tuple[str, ...] = ()

    @property
    def mesh(self) -> Mesh:
        return self.plan.mesh

    @property
    def shared(self) -> Segment | None:
        """The segment of parameter-free ops on the batch, if the program has one."""
        first = self.program.segments[0] if self.program.segments else None
        return first if first and first.layer.kind == "shared" else None

    @staticmethod
    def start(program: Program, plan: Plan) -> StageGraphs:
        layers = {c.name: _layer(c) for c in program.classes}
        return StageGraphs(program=program, plan=plan, layers=layers)

    def with_layers(self, layers: Iterable[Layer]) -> StageGraphs:
        return replace(self, layers={layer.name: layer for layer in layers})


def _layer(c: LayerClass) -> Layer:
    random_axes: dict[str, tuple[str, ...]] = {op.name: () for op in c.graph.ops if is_random(op)}
    return Layer(name=c.name, kind=c.kind, graph=c.graph, random_axes=random_axes)


class Pass(Protocol):
    """One rewrite."""

    @property
    def name(self) -> str: ...

    def accepts(self, graphs: StageGraphs) -> bool:
        """False where there is nothing to do: the pass is skipped."""
        ...

    def apply(self, graphs: StageGraphs) -> StageGraphs: ...


def run_passes(program: Program, plan: Plan, passes: Iterable[Pass]) -> StageGraphs:
    """Run ``passes`` in order, with the verifier and the dump in between.

    Raises:
        InternalError: if a pass leaves a graph that is not legal; names the pass and the op.
    """
    graphs = StageGraphs.start(program, plan)
    _check(graphs, "capture")
    for number, step in enumerate(passes):
        if step.accepts(graphs):
            graphs = step.apply(graphs)
            _check(graphs, step.name)
        _dump(graphs, f"{number:02}_{step.name}")
    return graphs


def _check(graphs: StageGraphs, where: str) -> None:
    sizes = axis_sizes(graphs.plan)
    for layer in graphs.layers.values():
        verify(layer.graph, f"{where}: {layer.name}", sizes)
    for stage in graphs.stages:
        for part in (stage.prologue, stage.shared):
            if part is not None:
                verify(part, f"{where}: stage {stage.index}", sizes)


def _dump(graphs: StageGraphs, name: str) -> None:
    folder = os.environ.get("AUTOSHARD_DUMP")
    if not folder:
        return
    parts = [f"# layer {layer.name}\n{layer.graph}" for layer in graphs.layers.values()]
    for stage in graphs.stages:
        calls = "\n".join(f"  {c.path}: {c.layer} ({c.recompute.mode})" for c in stage.calls)
        parts.append(
            f"# stage {stage.index}: receives {list(stage.receives)}, sends {list(stage.sends)}\n"
            f"{calls}"
        )
        parts += [f"## {label}\n{graph}" for label, graph in
                  (("prologue", stage.prologue), ("shared", stage.shared)) if graph]  # fmt: skip
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{name}.txt").write_text("\n\n".join(parts) + "\n")
