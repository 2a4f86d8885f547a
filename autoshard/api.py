"""``autoshard.compile``: from an ordinary model to a trained distributed one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autoshard import cluster as clusters
from autoshard.capture import capture
from autoshard.capture.self_check import self_check
from autoshard.cluster import Cluster
from autoshard.cost_models.costs import CostModel
from autoshard.errors import AutoshardError, InternalError, OptionError, PlanFileError
from autoshard.ir import Program
from autoshard.options import (
    Constraints,
    validate_costs,
    validate_numbers,
    validate_precision,
    validate_sharding_names,
    validate_world_size,
)
from autoshard.parallel import OptimizerChoice, Parallel
from autoshard.passes.cast import cast_program
from autoshard.plan.plan import Plan
from autoshard.plan.search import find_plan
from autoshard.plan.standalone import standalone_batches
from autoshard.plan.write import AS_THE_MODEL
from autoshard.runtime import launch
from autoshard.runtime import optimizer as optimizers

Progress = Callable[[str], None]

CUSTOM_OPTIMIZER = "custom"
"""The optimizer of a plan that was given a callable: its state's size is a guess."""
SAMPLES_PER_DEVICE = 8
"""Samples per step and device where neither the user nor an example says how many."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A captured program and the plan for it."""

    program: Program
    plan: Plan


def compile(
    model: nn.Module,
    *,
    world_size: int,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    cluster: str | Path | Cluster | None = None,
    global_batch_size: int | None = None,
    optimizer: OptimizerChoice = "adamw",
    precision: str | None = None,
    constraints: Constraints | Mapping[str, Any] | None = None,
    strict: bool = False,
    seed: int = 0,
    time_limit_s: float | None = None,
    costs: CostModel | str | None = None,
    plan: Plan | str | Path | None = None,
) -> Parallel:
    """Plan the training of ``model`` on ``world_size`` devices and make it runnable.

    Planning needs no cluster and allocates no parameters. Under ``torchrun`` with ``world_size``
    processes the result trains: ``for batch in loader: loss = parallel.step(batch)``. Every rank
    makes this call; rank 0 searches and the others take its plan.

    Args:
        model: real, fake or on the meta device. It is not changed.
        world_size: number of devices, one process each.
        example_inputs: one example batch: a dict of keyword arguments or a tuple of arguments;
            the batch dim comes first in every tensor that has one. Hugging Face models need none.
        loss_fn: ``loss_fn(model_output, batch) -> scalar``; ``None`` if the model returns its loss
            (``.loss``, or the scalar itself).
        cluster: a preset (``"h100"``, ``"a100-80"``, ``"cpu"``, ...), a cluster, or the path of a
            cluster file; ``None``: this machine under ``torchrun`` or with measured costs, else
            ``"h100"``.
        global_batch_size: samples per step over all ranks; ``None``: the example's batch size, or
            ``SAMPLES_PER_DEVICE * world_size`` for a model that knows its own inputs.
        optimizer: a name, or a callable from parameters to a ``torch.optim.Optimizer``.
        precision: ``None`` keeps the model's own dtypes; ``"bf16"`` computes matrix products in
            bfloat16 over float32 parameters, as autocast does.
        constraints: pins, see :class:`autoshard.options.Constraints`.
        strict: an op without a sharding rule is an error rather than replicated and reported.
        seed: of all random ops in the distributed module.
        time_limit_s: stop the search then, with the best plan so far and its gap.
        costs: ``None``: computed from the cluster's figures; ``"measured"``: ops are measured on
            the present device (once: measurements are kept on disk); or a cost model.
        plan: use this plan (or plan file) instead of searching.

    Raises:
        OptionError: a bad argument or contradicting pins.
        CaptureError: the model cannot be captured exactly; names the line and the cure.
        InfeasibleError: no plan fits in memory; says what is missing.
        PlanFileError: ``plan`` is damaged, or for another model.
    """
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.load(plan)
    planned = make_plan(
        model, world_size=world_size, example_inputs=example_inputs, loss_fn=loss_fn,
        cluster=cluster, global_batch_size=global_batch_size, optimizer=optimizer,
        precision=precision, constraints=constraints, strict=strict, seed=seed,
        time_limit_s=time_limit_s, costs=costs, plan=plan,
    )  # fmt: skip
    return Parallel(model, planned.program, planned.plan, optimizer=optimizer)


def make_plan(
    model: nn.Module,
    *,
    world_size: int,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    cluster: str | Path | Cluster | None = None,
    global_batch_size: int | None = None,
    optimizer: OptimizerChoice = "adamw",
    precision: str | None = None,
    constraints: Constraints | Mapping[str, Any] | None = None,
    strict: bool = False,
    seed: int = 0,
    time_limit_s: float | None = None,
    costs: CostModel | str | None = None,
    plan: Plan | None = None,
    model_name: str = "",
    progress: Progress = lambda text: None,
) -> Planned:
    """The planning half of :func:`compile`: capture, cost, plan."""
    pins = Constraints.of(constraints)
    validate_world_size(world_size, pins)
    validate_precision(precision)
    validate_numbers(global_batch_size=global_batch_size, time_limit_s=time_limit_s, seed=seed)
    optimizers.factory(optimizer)
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"expected a model (torch.nn.Module) but got {type(model).__name__}; presets by name "
            "are for the command line: autoshard plan --model gpt2"
        )
    if cluster is None and costs is not None and not isinstance(costs, str):
        cluster = getattr(costs, "cluster", None)
    if cluster is None and costs is None and not launch.under_torchrun():
        cluster = "h100"
    devices = clusters.find(cluster)
    clusters.check_size(devices, world_size)
    validate_costs(costs, devices)
    standalone = 1
    if plan is not None:
        global_batch_size = global_batch_size or plan.global_batch_size
        standalone = plan.standalone
        precision = None if plan.precision == AS_THE_MODEL else plan.precision
    if example_inputs is None and global_batch_size is None:
        global_batch_size = SAMPLES_PER_DEVICE * world_size

    # 1. capture: one exact forward graph with the loss, at the global batch size
    progress("capturing the model")
    start = time.perf_counter()

    def captured_at(batch_size: int | None) -> Program:
        return capture(
            model, example_inputs=example_inputs, loss_fn=loss_fn, global_batch_size=batch_size,
            model_name=model_name,
        )  # fmt: skip

    if standalone > 1 and global_batch_size is not None:
        global_batch_size //= standalone
    captured = captured_at(global_batch_size)
    validate_sharding_names(pins.sharding, captured)
    if plan is None and (pins.allow_coupled_micro_batches or pins.stale):
        standalone = standalone_batches(captured, pins, world_size)
        if standalone > 1:
            captured = captured_at(captured.batch_size // standalone)

    # 2. precision: explicit casts, so that costs and memory see them
    program = captured if precision is None else cast_program(captured, precision)
    capture_s = time.perf_counter() - start

    # 3. plan: cost models and integer programs
    if plan is not None:
        _validate_plan(plan, program, world_size)
        return Planned(program, plan)

    def search() -> Plan:
        progress("checking the program against the model")
        note = self_check(captured, model, example_inputs, loss_fn)
        found = find_plan(
            program, cluster=devices, world_size=world_size, constraints=pins,
            optimizer=optimizer if isinstance(optimizer, str) else CUSTOM_OPTIMIZER,
            precision=precision, strict=strict, seed=seed, time_limit_s=time_limit_s,
            costs=costs, progress=progress, standalone=standalone,
        )  # fmt: skip
        return replace(found, notes=(*found.notes, *([note] if note else [])))

    plan = _found_once(search, world_size)
    seconds = {"capture": capture_s, **plan.solver.seconds}
    return Planned(program, replace(plan, solver=replace(plan.solver, seconds=seconds)))


def _found_once(search: Callable[[], Plan], world_size: int) -> Plan:
    """Under ``torchrun`` rank 0 searches and all ranks take its plan.

    So a time limit, which strikes at another moment on every rank, cannot make ranks differ.
    """
    environment = launch.environment()
    if world_size == 1 or environment is None or environment.world_size != world_size:
        return search()
    import torch.distributed as dist

    launch.start(world_size)
    outcome: list[Plan | AutoshardError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [search()]
        except AutoshardError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    (found,) = outcome
    if isinstance(found, Plan):
        return found
    raise found or InternalError("api: rank 0 sent neither a plan nor an error")


def _validate_plan(plan: Plan, program: Program, world_size: int) -> None:
    if plan.world_size != world_size:
        raise PlanFileError(
            f"the plan is for {plan.world_size} devices but world_size is {world_size}: plan "
            f"again, or start {plan.world_size} processes"
        )
    if plan.global_batch_size != program.batch_size * plan.standalone:
        raise PlanFileError(
            f"the plan is for a global batch of {plan.global_batch_size} samples but got "
            f"{program.batch_size * plan.standalone}: plan again, or use the plan's"
        )
    if plan.program != program.fingerprint:
        raise PlanFileError(
            f"the plan is for {plan.model} (program {plan.program[:12]}) but this model is "
            f"{program.model_name} (program {program.fingerprint[:12]}): the model, its inputs or "
            "its loss have changed, so plan again"
        )
