"""Work of a graph whose neighbouring elementwise ops run as one kernel.

Compilers and hand-written kernels (a scaled, masked softmax with dropout; an activation with its
bias; a residual with its norm) read what comes into a group of such ops once and write what leaves
it once, instead of passing every value in between through memory. Backward of a group is one kernel
as well: it reads the gradients of what left and what had come in, and writes the gradients of that.

A group is connected, and all its ops have equally many products, collectives and other ops that
end a kernel on their longest way from the inputs, so that no way leaves the group and comes back.
"""

from __future__ import annotations

from collections.abc import Iterable

from autoshard.cost_models.products import NOTHING, Way, Work, dtype_of
from autoshard.cost_models.work import is_elementwise, work_of
from autoshard.ir import Graph, Op, Value


def fused_works(graph: Graph) -> dict[str, Work]:
    """The work of each op by name; of a group, the last op has the kernel and all its traffic."""
    works = {op.name: work_of(op) for op in graph.ops}
    groups = [
        group for group in _groups(graph, works)
        if sum(works[op.name].forward != NOTHING for op in group) > 1
    ]  # fmt: skip
    consumers: dict[str, set[str]] = {}
    for op in graph.ops:
        for value in op.operands:
            consumers.setdefault(value.name, set()).add(op.name)
    leaving = {v.name for v in graph.outputs}
    for group in groups:
        merged = _merged(group, works, consumers, leaving)
        for op in group[:-1]:
            works[op.name] = Work(NOTHING, NOTHING, works[op.name].dtype)
        works[group[-1].name] = merged
    return works


def _groups(graph: Graph, works: dict[str, Work]) -> list[list[Op]]:
    """Elementwise ops and the views between them, by connection and level."""
    level: dict[str, int] = {}
    root: dict[str, str] = {}
    members: dict[str, list[Op]] = {}
    for op in graph.ops:
        own = max((level.get(v.name, 0) for v in op.operands), default=0)
        view = works[op.name].forward == NOTHING
        joins = view or is_elementwise(op)
        level.update((v.name, own if joins else own + 1) for v in op.outputs)
        if not joins:
            continue
        near = {root[v.name] for v in op.operands if v.name in root and level[v.name] == own}
        head = min(near, default=op.name, key=lambda name: (len(members[name]), name))
        members.setdefault(head, [])
        for other in near - {head}:
            members[head] += members.pop(other)
            root.update((name, head) for name, was in root.items() if was == other)
        members[head].append(op)
        root.update((v.name, head) for v in op.outputs)
    order = {op.name: i for i, op in enumerate(graph.ops)}
    return [sorted(found, key=lambda op: order[op.name]) for found in members.values()]


def _merged(
    group: list[Op], works: dict[str, Work], consumers: dict[str, set[str]], leaving: set[str]
) -> Work:
    names = {op.name for op in group}
    made = {v.name: v for op in group for v in op.outputs}
    real = [op for op in group if works[op.name].forward != NOTHING]
    used: dict[str, Value] = {}
    for op in group:
        used.update((v.name, v) for v in op.operands if v.name not in made)
    written = [
        v for name, v in made.items() if name in leaving or consumers.get(name, set()) - names
    ]
    inputs, outputs = _bytes(used.values()), _bytes(written)
    wanted = [v for v in used.values() if v.type.differentiable]
    moved = outputs + inputs + _bytes(wanted) if wanted and written else 0.0
    backward = Way((), 0.0, moved, 1) if moved else NOTHING
    return Work(Way((), 0.0, inputs + outputs, 1), backward, dtype_of(real[-1], real[-1].operands))


def _bytes(values: Iterable[Value]) -> float:
    return float(sum(v.type.nbytes for v in values))
