"""From a program and a plan to one local graph per layer and stage: the passes, in order."""

from __future__ import annotations

from autoshard.ir import Program
from autoshard.passes.apply_axis import ApplyAxis
from autoshard.passes.base import SEQUENTIAL, Pass, StageGraphs, run_passes
from autoshard.passes.clean_up import CleanUp
from autoshard.passes.micro_batches import MicroBatches
from autoshard.passes.recompute import MarkRecompute
from autoshard.passes.split_stages import SplitStages
from autoshard.plan.plan import Plan

PASSES: tuple[Pass, ...] = (
    SplitStages(),  # which stage runs which segments, and what is sent between them
    ApplyAxis("dp"),  # what one data-parallel rank runs
    ApplyAxis(SEQUENTIAL),  # ... on one micro-batch
    ApplyAxis("cp"),  # ... on one rank's positions
    ApplyAxis("tp"),  # ... as one tensor-parallel rank
    MicroBatches(),  # what runs once per step rather than per micro-batch
    MarkRecompute(),  # what backward computes again
    CleanUp(),  # equal ops, idle copies, dead code
)


def stage_graphs(program: Program, plan: Plan) -> StageGraphs:
    """Every pass, with the verifier in between."""
    return run_passes(program, plan, PASSES)


__all__ = ["PASSES", "StageGraphs", "stage_graphs"]
