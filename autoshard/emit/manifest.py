"""The manifest: what the runtime must know besides the source, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from autoshard.emit.layer import ParameterUse, parameter_uses
from autoshard.emit.stage import StageWriter
from autoshard.errors import InternalError
from autoshard.ir import ParameterInfo, TensorType
from autoshard.passes.base import Call, StageGraphs

MANIFEST_VERSION = 1


def manifest(
    graphs: StageGraphs, files: Iterable[str], writers: Iterable[StageWriter]
) -> dict[str, Any]:
    """Everything that JSON can hold; one entry in ``stages`` per pipeline stage."""
    program, plan = graphs.program, graphs.plan
    stages = [
        {"rank": home, **_stage(graphs, file, w)}
        for home, file, w in zip(plan.homes, files, writers, strict=True)
    ]
    used = {p["name"] for stage in stages for p in stage["parameters"]}
    return {
        "version": MANIFEST_VERSION,
        "program": program.fingerprint,
        "model": plan.model,
        "mesh": {"pp": plan.mesh.pp, "dp": plan.mesh.dp, "cp": plan.mesh.cp, "tp": plan.mesh.tp},
        "global_batch_size": plan.global_batch_size,
        "micro_batch_size": plan.micro_batch_size,
        "num_micro_batches": plan.num_micro_batches,
        "schedule": plan.schedule,
        "virtual_stages": plan.virtual_stages,
        "data_parallel": plan.data_parallel,
        "precision": plan.precision,
        "optimizer": plan.optimizer,
        "seed": plan.seed,
        "batch": [
            {"name": v.name, **_type(v.type), "per_sample": v.type.per_sample}
            for v in program.batch
        ],
        "constants": sorted(program.constants),
        "unused": [_info(i) for n, i in program.parameters.items() if n not in used],
        "stages": stages,
    }


def _stage(graphs: StageGraphs, file: str, writer: StageWriter) -> dict[str, Any]:
    stage = writer.stage
    layers = [
        {
            "path": call.path,
            "number": call.index,
            "class": writer._class_of(call).name,
            "names": _scattered_names(graphs, call),
        }
        for call in writer.layers
    ]
    return {
        "file": file,
        "layers": layers,
        "recomputes": any(call.recompute.mode != "none" for call in stage.calls),
        "inputs": [_boundary(writer, name) for name in stage.receives],
        "outputs": [_boundary(writer, name) for name in stage.sends],
        "parameters": [_use(use) for use in _uses(graphs, writer).values()],
    }


def _scattered_names(graphs: StageGraphs, call: Call) -> dict[str, str] | None:
    """Qualified names of a layer's parameters, unless all are the path and the declared name."""
    graph = graphs.layers[call.layer].graph
    names = {v.name: call.bindings[v.name] for v in graph.parameters}
    below = all(qualified == f"{call.path}.{name}" for name, qualified in names.items())
    return None if below else names


def _uses(graphs: StageGraphs, writer: StageWriter) -> dict[str, ParameterUse]:
    """Every parameter and buffer that the stage holds, by qualified name.

    Raises:
        InternalError: if two uses of one tensor want it in different states.
    """
    found = dict(writer.parameters)
    for call in writer.layers:
        for use in parameter_uses(graphs, call).values():
            known = found.setdefault(use.info.name, use)
            if known.state != use.state:
                raise InternalError(
                    f"emit: {use.info.name} lies as {known.state} and as {use.state} on tp"
                )
    return found


def _use(use: ParameterUse) -> dict[str, Any]:
    split = {"dim": use.state.dim, "blocks": list(use.state.blocks)} if use.state.is_split else None
    return {**_info(use.info), "state": str(use.state), "split": split}


def _info(info: ParameterInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        **_type(info.type),
        "aliases": list(info.aliases),
        "trainable": info.trainable,
        "buffer": info.buffer,
        "persistent": info.persistent,
    }


def _boundary(writer: StageWriter, name: str) -> Mapping[str, Any]:
    value = writer.types[name]
    return {"name": name, **_type(value.type), "differentiable": value.type.differentiable}


def _type(value: TensorType) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def boundary_types(entries: Iterable[Mapping[str, Any]]) -> tuple[TensorType, ...]:
    """Local types of the activations that a stage receives or sends, from its manifest entry."""
    return tuple(
        TensorType(
            tuple(entry["shape"]), getattr(torch, entry["dtype"]),
            differentiable=entry["differentiable"],
        )
        for entry in entries
    )  # fmt: skip
