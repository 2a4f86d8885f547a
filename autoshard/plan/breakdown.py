"""Where the step of a plan goes, rank by rank and layer by layer.

The plan is priced once more by the very functions that the search uses, with cost models that
watch: one writes down every collective that it is asked for, another takes collectives to be free,
so that the difference is what they add to the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from autoshard.cluster import Link
from autoshard.cost_models.costs import CostModel
from autoshard.ir import Graph, Op, TensorType
from autoshard.options import ASYNCHRONOUS
from autoshard.placement.conversion import (
    COLLECTIVES,
    Motion,
    conversion,
    conversion_states,
    is_conversion,
)
from autoshard.placement.state import State
from autoshard.plan.class_costs import (
    ClassCosts,
    axis_links,
    collective_seconds,
    sum_over_tp_s,
)
from autoshard.plan.plan import Breakdown, Communication, ConversionReport, LayerReport
from autoshard.plan.recompute import MenuEntry
from autoshard.plan.request import Request
from autoshard.plan.scheduled_stages import PipelineSeconds
from autoshard.plan.stage_costs import StageCosts
from autoshard.plan.staged_plan import StagedPlan

COPY = "copy"
"""The kind of conversions that move nothing between ranks: slices, padding, scaling."""
ROUNDING = 1e-9
"""Share of a step that is no waiting."""
WITHIN_OPS = "within ops"
"""The kind of what ops of the runtime communicate themselves."""


@dataclass(frozen=True, slots=True)
class _Call:
    kind: str
    axis: str
    num_bytes: float
    seconds: float


class _Watched:
    """A cost model that remembers what is communicated.

    Args:
        links: of the mesh axes; a link that is none of these objects is of ``axis``.
        free: collectives take no time.
    """

    def __init__(self, costs: CostModel, links: Mapping[str, Link], *, free: bool = False) -> None:
        self._costs = costs
        self._links = links
        self._free = free
        self.axis = ""
        self.calls: list[_Call] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._costs, name)

    def _axis_of(self, link: Link) -> str:
        return next((axis for axis, own in self._links.items() if own is link), self.axis)

    def _note(self, kind: str, link: Link, num_bytes: float, seconds: float) -> float:
        if seconds:
            self.calls.append(_Call(kind, self._axis_of(link), num_bytes, seconds))
        return 0.0 if self._free else seconds

    def collective(self, kind: Any, nbytes: float, axis_link: Link) -> float:
        return self._note(kind, axis_link, nbytes, self._costs.collective(kind, nbytes, axis_link))

    def conversion(
        self, value_type: TensorType, source: State, target: State, axis_link: Link
    ) -> tuple[float, float]:
        seconds = self._costs.conversion(value_type, source, target, axis_link)
        step = conversion(source, target)
        motions = (step.forward, step.backward) if step else (COPY, COPY)
        for motion, own_s in zip(motions, seconds, strict=True):
            self._note(_kind(motion), axis_link, value_type.nbytes, own_s)
        return seconds

    def inner_collectives(self, op: Op, links: Mapping[str, Link]) -> tuple[float, float]:
        seconds = self._costs.inner_collectives(op, links)
        axes = op.keywords.get("axes", (op.keywords.get("axis"),))
        for axis in [axis for axis in axes if axis in links][:1]:
            for own_s in seconds:
                self._note(WITHIN_OPS, links[axis], op.output.type.nbytes, own_s)
        return seconds

    def taken(self) -> list[_Call]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


def _kind(motion: Motion | str) -> str:
    return motion if motion in COLLECTIVES else COPY


@dataclass(slots=True)
class _Book:
    """Collectives by kind and axis."""

    entries: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, calls: list[_Call], times: int, exposed_s: float | None = None) -> None:
        """Enter calls that are made ``times`` times in a step.

        Args:
            exposed_s: what all of them add to the step, taken in proportion of their seconds;
                ``None``: nothing hides them.
        """
        total_s = times * sum(c.seconds for c in calls)
        for call in calls:
            own_s = times * call.seconds
            shown_s = own_s if exposed_s is None else exposed_s * own_s / total_s
            entry = self.entries.setdefault((call.kind, call.axis), [0, 0, 0.0, 0.0])
            for i, part in enumerate((times, times * call.num_bytes, own_s, shown_s)):
                entry[i] += part

    def communication(self) -> tuple[Communication, ...]:
        made = (
            Communication(
                kind=kind, axis=axis, count=int(count), num_bytes=int(num_bytes), seconds=seconds,
                exposed_s=exposed_s,
            )
            for (kind, axis), (count, num_bytes, seconds, exposed_s) in self.entries.items()
        )  # fmt: skip
        return tuple(sorted(made, key=lambda c: -c.seconds))


class Breakdowns:
    """Prices a plan again, watching."""

    def __init__(self, request: Request, best: StagedPlan, costs: CostModel) -> None:
        self._best = best
        self._device = request.cluster.device
        links = axis_links(request.cluster, best.configuration.mesh)
        self._links = links
        self._watched = _Watched(costs, links)
        self._prices, self._free_prices = (
            StageCosts(
                request, best.configuration, best.classes, cast(CostModel, model),
                "ddp" if best.data_parallel in ASYNCHRONOUS else best.data_parallel,
            )
            for model in (self._watched, _Watched(costs, links, free=True))
        )  # fmt: skip
        self._within: dict[str, list[_Call]] = {}

    def ranks(self, pipeline: PipelineSeconds) -> tuple[Breakdown, ...]:
        """Of every pipeline rank."""
        return tuple(self._rank(rank, pipeline) for rank in range(self._best.configuration.mesh.pp))

    def _rank(self, rank: int, pipeline: PipelineSeconds) -> Breakdown:
        best, book = self._best, _Book()
        m, homes = best.configuration.turns(rank), best.configuration.homes
        stages = [k for k, home in enumerate(homes) if home == rank]
        if best.configuration.workers:
            return self._replica(rank, pipeline)
        compute_s = recompute_s = spent_s = optimizer_s = 0.0
        for index, entry in (pair for k in stages for pair in best.stages[k]):
            layer = best.class_of(index)
            busy_s, free_s = self._segment(layer, entry, book, m)
            step_s, own_s = self._once(layer, book)
            compute_s += m * (free_s - entry.extra_backward_s - layer.communication_s)
            recompute_s += m * entry.extra_backward_s
            spent_s += m * busy_s + step_s
            optimizer_s += own_s
        waits_s, sent = pipeline.step_s - spent_s, self._sends(stages)
        waits_s = waits_s if waits_s > ROUNDING * pipeline.step_s else 0.0
        sends_s = min(waits_s, pipeline.sends_s) if sent else 0.0
        book.add(sent, m, sends_s)
        return Breakdown(
            compute_s=compute_s, recompute_s=recompute_s, communication=book.communication(),
            optimizer_s=optimizer_s, bubble_s=waits_s - sends_s,
        )  # fmt: skip

    def _replica(self, stage: int, pipeline: PipelineSeconds) -> Breakdown:
        """Of a replica of a stage that has replicas of its own."""
        best, book = self._best, _Book()
        m, choice = best.configuration.turns(stage), best.choices[stage]
        reduction_s, optimizer_s = best.tails[stage]
        recompute_s = m * sum(entry.extra_backward_s for _, entry in best.stages[stage])
        num_bytes = sum(
            t.nbytes for i, _ in best.stages[stage] for t in best.class_of(i).parameters.values()
        )
        if reduction_s:
            book.add([_Call("all_reduce", "replicas", num_bytes, reduction_s)], 1)
        busy_s = m * (choice.forward_s + choice.backward_s)
        sent = [_Call("send", "pp", best.send_bytes[stage], choice.send_s)] if choice.send_s else []
        waits_s = max(0.0, pipeline.step_s - busy_s - reduction_s - optimizer_s)
        sends_s = min(waits_s, pipeline.sends_s) if sent else 0.0
        book.add(sent, m, sends_s)
        return Breakdown(
            compute_s=busy_s - recompute_s, recompute_s=recompute_s,
            communication=book.communication(), optimizer_s=optimizer_s, bubble_s=waits_s - sends_s,
        )  # fmt: skip

    def _segment(
        self, layer: ClassCosts, entry: MenuEntry, book: _Book, m: int
    ) -> tuple[float, float]:
        """Seconds of a micro-batch, and what they were if data parallelism moved nothing."""
        book.add(self._inside(layer), m)
        self._watched.axis = "dp"
        busy_s = self._prices.choice(layer, entry).seconds
        free_s = self._free_prices.choice(layer, entry).seconds
        book.add(self._watched.taken(), m, m * (busy_s - free_s))
        return busy_s, free_s

    def _inside(self, layer: ClassCosts) -> list[_Call]:
        """What the ops of a layer communicate for one micro-batch."""
        if layer.name not in self._within:
            for op in layer.graph.ops:
                collective_seconds(op, self._links, cast(CostModel, self._watched))
            pace = self._best.configuration.pace(self._device)
            calls = (replace(c, seconds=pace * c.seconds) for c in self._watched.taken())
            self._within[layer.name] = list(calls)
        return self._within[layer.name]

    def _once(self, layer: ClassCosts, book: _Book) -> tuple[float, float]:
        """Seconds of reduction and optimizer after the last micro-batch, and of the latter."""
        self._watched.axis = "dp"
        copied_s = self._prices.copied_s(layer)
        reduction_s, optimizer_s = self._prices.once_per_step(layer)
        num_bytes = sum(kind.nbytes for kind in layer.parameters.values())
        book.add([_Call(COPY, "dp", num_bytes, copied_s)] if copied_s else [], 1)
        book.add(self._watched.taken(), 1, reduction_s - copied_s - layer.reduced_s)
        assignment = self._best.assignments.get(layer.name)
        sum_over_tp_s(layer.parameters, assignment, self._links, cast(CostModel, self._watched))
        book.add(self._watched.taken(), 1)
        return reduction_s + optimizer_s, optimizer_s

    def _sends(self, stages: list[int]) -> list[_Call]:
        """What the stages of a rank send for one micro-batch: outputs on, gradients back."""
        best, homes = self._best, self._best.configuration.homes
        self._watched.axis = "pp"
        for stage in stages:
            for cut in (stage, stage - 1):
                if 0 <= cut < len(homes) - 1 and homes[cut] != homes[cut + 1]:
                    self._prices.send_s(best.send_bytes[cut])
        return self._watched.taken()

    # -- layers -----------------------------------------------------------------------------------

    def layers(self) -> dict[str, LayerReport]:
        """Of every layer class."""
        return {name: self._report(layer) for name, layer in self._best.classes.items()}

    def _report(self, layer: ClassCosts) -> LayerReport:
        graph, saved = layer.graph, layer.saved
        ops = [op for op in graph.ops if not is_conversion(op)]
        kept = {
            op.name: saved.extra_bytes.get(op.name, 0)
            + sum(saved.values[v.name].num_bytes for v in op.outputs if v.name in saved.values)
            for op in graph.ops
        }
        return LayerReport(
            op_s={op.name: layer.op_s[op.name] for op in ops},
            saved_bytes={name: size for name, size in kept.items() if size},
            parameter_bytes={v.name: v.type.nbytes for v in graph.parameters},
            conversions=tuple(_conversions(graph, layer.op_s)),
        )


def _conversions(graph: Graph, op_s: Mapping[str, float]) -> Iterator[ConversionReport]:
    for op in graph.ops:
        if not is_conversion(op):
            continue
        source, target = conversion_states(op)
        step, value = conversion(source, target), op.operands[0]
        forward, backward = (step.forward, step.backward) if step else (COPY, COPY)
        names = {v.name for v in op.outputs}
        users = (u.name for u in graph.ops if names & {v.name for v in u.operands})
        yield ConversionReport(
            value=value.name, users=tuple(users), axis=str(op.keywords["axis"]),
            source=str(source), target=str(target), forward=forward,
            backward=backward if value.type.differentiable else "none",
            num_bytes=value.type.nbytes,
            seconds=op_s[op.name],
        )  # fmt: skip
