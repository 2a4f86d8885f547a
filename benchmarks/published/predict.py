"""Predictions of rows through the very path that ``compile`` takes: capture, then ``find_plan``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from autoshard.capture import capture
from autoshard.cluster import Cluster
from autoshard.cost_models.costs import AnalyticCosts, CostModel
from autoshard.errors import AutoshardError, OptionError
from autoshard.ir import Program
from autoshard.plan.memo import Memo
from autoshard.plan.plan import Plan
from autoshard.plan.search import find_plan
from autoshard.software import Software
from benchmarks.published.layouts import Layout, Unpredictable, layout_of, shape_of
from benchmarks.published.machines import cluster_of
from benchmarks.published.models import Decoder, Layers, Shape
from benchmarks.published.rows import Row
from benchmarks.published.stacks import Stack, stack_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Of parameters and activations; in 8 bits there are only products' operands."""
MANY_DIVIDE = 8 * math.lcm(*range(1, 17))
"""A batch that micro-batches of up to 16 samples divide, and most larger ones in use."""
Price = Callable[[Cluster, Software], CostModel]
"""What prices a row: whatever a fit varies is in the cost model that this returns."""


def analytic(cluster: Cluster, software: Software) -> CostModel:
    """The cost models as they come."""
    return AnalyticCosts(cluster)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the planner says of a row's layout.

    Attributes:
        peak_bytes: of the fullest rank, whether it fits or not.
        usable_bytes: of a device.
        parts: seconds of the step by kind.
        layout: what the plan is, in words.
        reported_bytes: the part of the peak that the row's source counts.
        memory_unit_bytes: what its source calls a GB.
    """

    time_s: float
    peak_bytes: int
    usable_bytes: int
    parts: Mapping[str, float]
    layout: str
    reported_bytes: int
    memory_unit_bytes: float

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row without a prediction, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row and what became of it."""

    row: Row
    result: Prediction | Skipped


@dataclass(slots=True)
class Predictor:
    """Predicts rows; programs are captured once per shape and dtype."""

    programs: dict[tuple[Shape, str], Program] = field(default_factory=dict)
    memos: dict[str, Memo] = field(default_factory=dict)

    def predict(self, row: Row, price: Price = analytic) -> Prediction | Skipped:
        """What the planner says of a row, or why it says nothing."""
        try:
            stack = stack_of(row)
            shape = shape_of(row, stack)
            layout, cluster = layout_of(row, shape, stack), cluster_of(row)
            program = self._program(row, shape)
            return self._predicted(row, stack, layout, cluster, program, price)
        except Unpredictable as reason:
            return Skipped(str(reason))
        except AutoshardError as error:
            return Skipped(f"{type(error).__name__}: {error}")

    def _predicted(
        self, row: Row, stack: Stack, layout: Layout, cluster: Cluster, program: Program,
        price: Price,
    ) -> Prediction:  # fmt: skip
        software = replace(stack.software, float8_products=row.precision == "fp8")
        costs = price(cluster, software)

        def planned(memory_bytes: int | None) -> Plan:
            return find_plan(
                program, cluster=costs.cluster, world_size=row.gpus, optimizer="adam",
                constraints=replace(layout.pins, memory_bytes=memory_bytes), costs=costs,
                software=software, num_samples=row.global_batch,
                memo=self.memos.setdefault(program.fingerprint, Memo(keeps_shardings=True)),
            )  # fmt: skip

        plan = planned(layout.pins.memory_bytes)
        if layout.open and plan.prediction.peak_bytes > cluster.device.memory_bytes:
            try:  # what the row leaves open may make it fit
                plan = planned(None)
            except OptionError:
                raise
            except AutoshardError:
                pass
        return Prediction(
            time_s=plan.prediction.step_s, peak_bytes=plan.prediction.peak_bytes,
            usable_bytes=cluster.device.memory_bytes, parts=dict(plan.prediction.parts),
            layout=_in_words(plan),
            reported_bytes=_reported(plan, stack), memory_unit_bytes=stack.memory_unit_bytes,
        )  # fmt: skip

    def _program(self, row: Row, shape: Shape) -> Program:
        """The row's program, at a batch that all usual micro-batches divide.

        Samples of a decoder do not interact, so costs depend on the micro-batch alone.
        """
        key = (shape, str(DTYPES[row.precision]))
        size = row.microbatch or 1
        known = self.programs.get(key)
        if known is None or known.batch_size % size:
            batch_size = math.lcm(size, known.batch_size if known else MANY_DIVIDE)
            self.programs[key] = captured(shape, batch_size, DTYPES[row.precision])
        return self.programs[key]


def captured(shape: Shape, batch_size: int, dtype: torch.dtype) -> Program:
    """The program of a model of that shape; nothing is allocated."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: nn.Module = Decoder(shape) if shape.vocab else Layers(shape)
            size = (min(2, batch_size), shape.sequence)
            example = (
                {"tokens": torch.empty(size, dtype=torch.long),
                 "targets": torch.empty(size, dtype=torch.long)}
                if shape.vocab else {"x": torch.empty(*size, shape.hidden, dtype=dtype)}
            )  # fmt: skip
        return capture(model, example_inputs=example, global_batch_size=batch_size)
    finally:
        torch.set_default_dtype(before)


def _reported(plan: Plan, stack: Stack) -> int:
    """What the source counts of the fullest stage."""
    if stack.memory == "peak":
        return plan.prediction.peak_bytes + round(stack.memory_besides)
    ranks = dict.fromkeys(plan.homes, 0)
    for home, stage in zip(plan.homes, plan.stages, strict=True):
        m = stage.memory
        ranks[home] += m.parameters + m.gradients + m.optimizer
        ranks[home] += m.activations if stack.memory == "activations" else 0
    return max(ranks.values())


def _in_words(plan: Plan) -> str:
    mesh = plan.mesh
    return (
        f"pp={mesh.pp} dp={mesh.dp} tp={mesh.tp} mbs={plan.micro_batch_size} "
        f"{plan.data_parallel} {plan.schedule}"
    )
