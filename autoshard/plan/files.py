"""Plan files: JSON with a version, checked on the way in, compared entry by entry."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from autoshard.errors import OptionError, PlanFileError
from autoshard.plan.plan import PLAN_VERSION, Plan
from autoshard.schedules import check_virtual_stages

NUM_OPS_SHOWN = 4
"""Ops of one layer and axis that a diff lists before it only counts them."""


def save(plan: Plan, path: Path) -> Path:
    """Write atomically: a reader never sees half a plan.

    Raises:
        PlanFileError: the file cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(plan), indent=1)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(text + b"\n")
        os.replace(partial, path)
    except OSError as error:
        raise PlanFileError(
            f"expected to write a plan file at {path} but {error.strerror}: give another path"
        ) from error
    return path


def load(path: Path) -> Plan:
    """Read and check a plan file.

    Raises:
        PlanFileError: missing, truncated, of another version, or with a field that is not as
            expected (the message names the field's path).
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PlanFileError(
            f"expected a plan file at {path} but {error.strerror}: autoshard plan --save writes one"
        ) from error
    return loads(text, str(path))


def loads(text: bytes, where: str = "plan") -> Plan:
    """A plan from its text; ``where`` names it in errors.

    Raises:
        PlanFileError: as :func:`load`.
    """
    try:
        raw = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise PlanFileError(
            f"{where} is not a whole plan file ({error}; {len(text)} bytes): it may be truncated; "
            "save the plan again"
        ) from error
    if not isinstance(raw, dict) or "version" not in raw:
        raise PlanFileError(f"{where} is JSON but no plan file: it has no entry 'version'")
    version = raw["version"]
    if version != PLAN_VERSION:
        raise PlanFileError(
            f"{where} has plan version {version!r} but this autoshard reads version "
            f"{PLAN_VERSION}: plan again with this version"
        )
    try:
        plan = msgspec.convert(raw, Plan)
    except msgspec.ValidationError as error:
        raise PlanFileError(
            f"{where} is no valid plan: {error}; undo the edit, or plan again"
        ) from error
    _validate(plan, where)
    return plan


def _validate(plan: Plan, where: str) -> None:
    """What the types cannot say: sizes that must fit together."""
    mesh = plan.mesh
    if min(plan.replicas, default=1) < 1:
        raise PlanFileError(
            f"{where} is no valid plan: its stages have {plan.replicas} replicas; give each at "
            "least 1"
        )
    ranks = sum(plan.replicas) if plan.is_replicated else mesh.world_size
    if plan.is_replicated and ranks != plan.world_size:
        raise PlanFileError(
            f"{where} is no valid plan: its stages have {plan.replicas} replicas but world_size is "
            f"{plan.world_size}; make them agree"
        )
    if ranks != plan.world_size:
        raise PlanFileError(
            f"{where} is no valid plan: its mesh {mesh} holds "
            f"{mesh.world_size} ranks but world_size is {plan.world_size}; make them agree"
        )
    try:
        check_virtual_stages(plan.schedule, plan.virtual_stages)
    except OptionError as error:
        raise PlanFileError(f"{where} is no valid plan: {error}") from error
    if len(plan.stages) != mesh.pp * plan.virtual_stages:
        chunks = f" x {plan.virtual_stages} virtual stages" if plan.virtual_stages > 1 else ""
        raise PlanFileError(
            f"{where} is no valid plan: it has {len(plan.stages)} stages but pp is "
            f"{mesh.pp}{chunks}; make them agree"
        )
    if plan.is_replicated and plan.schedule != "none":
        try:
            _ = plan.rules
        except OptionError as error:
            raise PlanFileError(f"{where} is no valid plan: {error}") from error
    if plan.micro_batch_size < 1 or plan.global_batch_size % (mesh.dp * plan.micro_batch_size):
        raise PlanFileError(
            f"{where} is no valid plan: dp={mesh.dp} x micro_batch_size={plan.micro_batch_size} "
            f"does not divide global_batch_size={plan.global_batch_size}; make them agree"
        )
    for stage in plan.stages:
        for segment in stage.segments:
            if segment.layer not in plan.layers:
                raise PlanFileError(
                    f"{where} is no valid plan: a stage has a segment of layer {segment.layer!r}, "
                    "which is not under 'layers'; undo the edit, or plan again"
                )


def schema() -> dict[str, Any]:
    """The JSON schema of plan files."""
    # Pins may hold any value that a constraint takes.
    anything = {"description": "the value of a constraint"}
    return msgspec.json.schema(Plan, schema_hook=lambda kind: anything)


def diff(one: Plan, other: Plan) -> str:
    """One line per entry that differs, as ``where: this => that``; empty if nothing does.

    How the plans were found (solver statistics, runners-up) is not compared. Where many ops of a
    layer differ, as they do between meshes, the line counts them.
    """
    left, right = (dict(_entries(_comparable(plan))) for plan in (one, other))
    changed = [key for key in dict.fromkeys((*left, *right)) if left.get(key) != right.get(key)]
    lines = []
    for group, members in groupby(changed, key=_op_group):
        keys = list(members)
        if group and len(keys) > NUM_OPS_SHOWN:
            lines.append(f"{group}: {len(keys)} ops differ")
            continue
        lines += [f"{key}: {left.get(key, '-')} => {right.get(key, '-')}" for key in keys]
    return "\n".join(lines)


def _comparable(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, with each stage's layers as a person would say them."""
    from autoshard.report.stages import describe_segments

    tree: dict[str, Any] = msgspec.to_builtins(plan)
    for name in ("solver", "runners_up", "front"):
        del tree[name]
    for entry, stage in zip(tree["stages"], plan.stages, strict=True):
        entry["segments"] = "; ".join(describe_segments(stage))
    return tree


def _op_group(key: str) -> str:
    """``layers.Block.tp.ops`` for an op's entry; empty for any other."""
    before, separator, _ = key.partition(".ops.")
    return f"{before}.ops" if separator and key.startswith("layers.") else ""


def _entries(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        if not tree:
            yield path, "none"
        for key, value in tree.items():
            yield from _entries(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)) and any(isinstance(v, (Mapping, list)) for v in tree):
        for index, value in enumerate(tree):
            yield from _entries(value, f"{path}[{index}]")
    else:
        yield path, tree
