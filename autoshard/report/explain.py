"""Why a parameter, op or layer is placed as it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from autoshard.errors import OptionError
from autoshard.placement.state import State
from autoshard.plan.plan import Assignment, Plan
from autoshard.report.units import nbytes, percent, seconds

_AXES = {
    "dp": "data axis", "micro": "micro-batches", "cp": "context axis", "tp": "tensor axis"
}  # fmt: skip
_PARAMETER = {
    "R": "whole on every rank, with the whole gradient everywhere",
    "V": "whole on every rank; each rank has an addend of the gradient, summed once per step",
    "P": "an addend on every rank; the value is their sum",
}


def explain(plan: Plan, name: str) -> str:
    """Everything that the plan says of ``name``.

    Args:
        name: a parameter (by its full name or relative to its layer), an op of a layer
            (``op`` or ``layer.op``), a layer class, or the path of a layer in the model.

    Raises:
        OptionError: unknown name, with the closest known ones.
    """
    lines: list[str] = []
    for layer in plan.layers:
        lines += _of_layer(plan, layer, name) or _inside(plan, layer, name)
    for op in plan.replicated:
        if name in {op.op, op.module}:
            lines.append(
                f"{op.target} at {op.source or op.module} runs whole on every tensor rank: "
                f"{op.reason}; it takes {percent(op.share_of_step)} of the compute"
            )
    if lines:
        return "\n".join(lines)
    close = difflib.get_close_matches(name, sorted(_known(plan)), 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise OptionError(f"the plan has no parameter, op or layer named {name!r}{hint}")


def _known(plan: Plan) -> set[str]:
    """Every name that :func:`explain` takes."""
    found = set(plan.layers)
    for layer, axes in plan.layers.items():
        paths = [path for path in _paths(plan, layer) if path]
        found.update(paths)
        for assignment in axes.values():
            found.update((*assignment.parameters, *assignment.ops))
            found.update(f"{path}.{name}" for path in paths for name in assignment.parameters)
    return found


def _paths(plan: Plan, layer: str) -> list[str]:
    return list(dict.fromkeys(s.path for k in plan.stages for s in k.segments if s.layer == layer))


def _of_layer(plan: Plan, layer: str, name: str) -> list[str]:
    """A layer as a whole, if that is what ``name`` means."""
    if name != layer and name not in _paths(plan, layer):
        return []
    lines = [f"layer {layer}"]
    for stage, held in enumerate(plan.stages):
        modes: dict[str, int] = {}
        for segment in held.segments:
            if segment.layer == layer and name in {layer, segment.path}:
                text = f"recompute {segment.recompute.mode}"
                if segment.recompute.mode == "selective":
                    text += f" (keeps {', '.join(segment.recompute.keep)})"
                modes[text] = modes.get(text, 0) + 1
        lines += [f"  on stage {stage}: {count} of it, {text}" for text, count in modes.items()]
    for axis, assignment in plan.layers[layer].items():
        lines.append(f"  {_axis(plan, axis)}:")
        lines += [f"    {n}: {state}" for n, state in assignment.parameters.items()]
        lines += [f"    {n}: {strategy}" for n, strategy in assignment.ops.items()]
    if (report := plan.prediction.layers.get(layer)) is not None:
        op_s, moved_s = sum(report.op_s.values()), sum(c.seconds for c in report.conversions)
        lines.append(
            f"  one of it takes {seconds(op_s + moved_s)} per micro-batch, {seconds(moved_s)} of "
            f"it conversions; {nbytes(sum(report.parameter_bytes.values()))} of parameters on a "
            f"rank, {nbytes(sum(report.saved_bytes.values()))} for backward without recompute"
        )
    return lines


def _inside(plan: Plan, layer: str, name: str) -> list[str]:
    """A parameter or op of a layer."""
    relative = _relative(name, [layer, *_paths(plan, layer)])
    lines: list[str] = []
    for axis, assignment in plan.layers[layer].items():
        lines += [f"  {line}" for line in _on_axis(plan, axis, assignment, relative)]
    if not lines:
        return []
    lines += [f"  {line}" for line in _costs(plan, layer, relative)]
    stages = [
        str(k)
        for k, held in enumerate(plan.stages)
        if any(
            s.layer == layer and _relative(name, [layer, s.path]) == relative for s in held.segments
        )
    ]
    return [f"{relative} of layer {layer}, on stage {', '.join(stages)}", *lines]


def _costs(plan: Plan, layer: str, name: str) -> Iterator[str]:
    """Bytes and seconds on one rank, and the conversions around an op or parameter."""
    report = plan.prediction.layers.get(layer)
    if report is None:
        return
    if name in report.parameter_bytes:
        spread = "" if plan.data_parallel == "ddp" else f", before {plan.data_parallel} spreads it"
        yield f"takes {nbytes(report.parameter_bytes[name])} on a rank{spread}"
    if name in report.op_s:
        yield (
            f"takes {seconds(report.op_s[name])} per micro-batch, forward and backward, in each of "
            f"{_number(plan, layer)}"
        )
        if kept := report.saved_bytes.get(name, 0):
            yield f"{nbytes(kept)} of it per micro-batch for backward: {_kept(plan, layer, name)}"
    for one in report.conversions:
        if name != one.value and name not in one.users:
            continue
        ways = f"{_way(one.forward)} forward, {_way(one.backward)} backward"
        yield (
            f"{one.value} passes from {one.source} to {one.target} on {one.axis} for "
            f"{', '.join(one.users) or 'the next layer'}: {ways}, {nbytes(one.num_bytes)}, "
            f"{seconds(one.seconds)} per micro-batch"
        )


def _way(motion: str) -> str:
    return "nothing" if motion == "none" else motion.replace("_", "-")


def _number(plan: Plan, layer: str) -> str:
    count = sum(s.layer == layer for k in plan.stages for s in k.segments)
    return f"{count} layers" if count > 1 else "1 layer"


def _kept(plan: Plan, layer: str, op: str) -> str:
    """In how many of its layers they are kept, and in how many made again."""
    modes: dict[str, int] = {}
    for segment in (s for k in plan.stages for s in k.segments if s.layer == layer):
        how = segment.recompute
        again = how.mode == "full" or (how.mode == "selective" and op not in how.keep)
        text = "made again" if again else "kept"
        modes[text] = modes.get(text, 0) + 1
    if len(modes) == 1:
        return next(iter(modes))
    return ", ".join(f"{text} in {count} layers" for text, count in modes.items())


def _on_axis(plan: Plan, axis: str, assignment: Assignment, name: str) -> Iterator[str]:
    if name in assignment.parameters:
        state = assignment.parameters[name]
        yield f"{_axis(plan, axis)}: {state}: {_meaning(state)}"
    if name in assignment.ops:
        yield f"{_axis(plan, axis)}: {assignment.ops[name]}"


def _axis(plan: Plan, axis: str) -> str:
    size = {"dp": plan.mesh.dp, "cp": plan.mesh.cp, "tp": plan.mesh.tp}.get(
        axis, plan.num_micro_batches
    )
    return f"{_AXES.get(axis, axis)} ({size})"


def _relative(name: str, paths: list[str]) -> str:
    for path in paths:
        if path and name.startswith(f"{path}."):
            return name[len(path) + 1 :]
    return name


def _meaning(text: str) -> str:
    state = State.parse(text)
    if not state.is_split:
        return _PARAMETER[text]
    blocks = f", each of the blocks {list(state.blocks)} on its own" if state.blocks else ""
    return f"each rank has its part along dim {state.dim}{blocks}"
