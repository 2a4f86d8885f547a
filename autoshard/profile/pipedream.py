"""Reads the layer profiles that PipeDream's profiler writes.

A profile is text. First a line per node of the operator graph::

    node4 -- Linear(512, 10) -- forward_compute_time=0.073, backward_compute_time=0.2,
        activation_size=40.0, parameter_size=20520.000

(on one line; times are milliseconds and sizes bytes, both of a whole minibatch; the activation size
of a node with several outputs is a list, ``[40.0; 8.0]``), then a line per edge that starts with a
tab: ``source -- target``. What PipeDream's optimiser has split carries `` -- stage_id=N`` after the
figures, which is not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoshard.errors import OptionError

_FIGURES = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")
_FIGURE = re.compile(r"(\w+)=(\[[^\]]*\]|[^,\s]*)")
_NODE = f"NAME -- MODULE -- {', '.join(f'{name}=NUMBER' for name in _FIGURES)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileNode:
    """One operator, for one minibatch.

    Attributes:
        module: what it is, as PyTorch prints it.
        activation_bytes: of all its outputs.
    """

    name: str
    module: str
    forward_s: float
    backward_s: float
    activation_bytes: float
    parameter_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A measured operator graph without cycles.

    Attributes:
        nodes: in a topological order.
        edges: names of producer and consumer, each pair once.
    """

    nodes: tuple[ProfileNode, ...]
    edges: tuple[tuple[str, str], ...]


def read_pipedream(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        OptionError: the file cannot be read, or a line is not what the format has there (names the
            line), or the graph has a cycle.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"expected a profile of PipeDream at {path} but: {error}") from error
    return parse_pipedream(text, str(path))


def parse_pipedream(text: str, name: str = "profile") -> Profile:
    """The same from text; ``name`` is what errors call it."""
    nodes: dict[str, ProfileNode] = {}
    edges: dict[tuple[str, str], str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{name}, line {number}"
        if line.startswith("\t"):
            edges.setdefault(_edge(line.strip(), where), where)
        elif line.strip():
            node = _node(line.strip(), where)
            if node.name in nodes:
                raise OptionError(
                    f"{where}: expected every node once but {node.name} is there twice: remove one"
                )
            nodes[node.name] = node
    if not nodes:
        raise OptionError(f"{name}: expected lines such as {_NODE!r} but it has no nodes")
    for edge, where in edges.items():
        for end in edge:
            if end not in nodes:
                raise OptionError(
                    f"{where}: expected an edge between nodes of the profile but {end} is none: "
                    "add its line, or remove the edge"
                )
    order = _topological_order(list(nodes), list(edges), name)
    return Profile(nodes=tuple(nodes[n] for n in order), edges=tuple(edges))


def _edge(line: str, where: str) -> tuple[str, str]:
    ends = [end.strip() for end in line.split(" -- ")]
    if len(ends) != 2 or not all(ends):
        raise OptionError(f"{where}: expected an edge SOURCE -- TARGET but got {line!r}")
    return ends[0], ends[1]


def _node(line: str, where: str) -> ProfileNode:
    parts = [part.strip() for part in line.split(" -- ")]
    if len(parts) not in (3, 4) or not parts[0]:
        raise OptionError(f"{where}: expected {_NODE!r} (or an edge, after a tab) but got {line!r}")
    found = dict(_FIGURE.findall(parts[2]))
    if set(found) != set(_FIGURES):
        raise OptionError(
            f"{where}: expected the figures {', '.join(_FIGURES)} but got {parts[2]!r}"
        )
    forward, backward, activation, parameter = (
        _number(name, found[name], where) for name in _FIGURES
    )
    return ProfileNode(
        name=parts[0], module=parts[1], forward_s=forward / 1e3, backward_s=backward / 1e3,
        activation_bytes=activation, parameter_bytes=parameter,
    )  # fmt: skip


def _number(name: str, text: str, where: str) -> float:
    """A number, or the sum of a list of them where there may be several."""
    listed = name == "activation_size" and text.startswith("[")
    try:
        values = [float(part) for part in text.strip("[]").split(";")] if listed else [float(text)]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(v) and v >= 0 for v in values):
        raise OptionError(f"{where}: expected {name}=NUMBER, zero or more, but got {name}={text}")
    return sum(values)


def _topological_order(
    names: Sequence[str], edges: Sequence[tuple[str, str]], where: str
) -> list[str]:
    """Depth first, so that what follows one node stays together.

    Raises:
        OptionError: there is a cycle; names one.
    """
    following: dict[str, list[str]] = {name: [] for name in names}
    waits = dict.fromkeys(names, 0)
    for source, target in edges:
        following[source].append(target)
        waits[target] += 1
    ready = [name for name in reversed(names) if not waits[name]]
    order: list[str] = []
    while ready:
        order.append(ready.pop())
        for target in reversed(following[order[-1]]):
            waits[target] -= 1
            if not waits[target]:
                ready.append(target)
    if len(order) < len(names):
        cycle = _cycle({name for name in names if waits[name]}, edges)
        raise OptionError(
            f"{where}: expected a graph without cycles but got {' -> '.join(cycle)}: remove one "
            "of these edges"
        )
    return order


def _cycle(left: set[str], edges: Sequence[tuple[str, str]]) -> list[str]:
    """A cycle among nodes of which each has an edge from another of them."""
    before = {target: source for source, target in edges if source in left and target in left}
    path = [next(iter(left))]
    while before[path[-1]] not in path:
        path.append(before[path[-1]])
    first = path.index(before[path[-1]])
    return [path[first], *reversed(path[first:])]
