"""The sets of nodes after which a pipeline can be cut.

Everything before a cut is a downset of the graph: with a node it holds all that the node needs.
PipeDream (Narayanan et al. 2019) names downsets by their antichains of last nodes. Branches
multiply their number, so those that cannot matter are left out:

* **What never pays to cut.** If sending an activation takes longer than the best known answer, the
  node and its consumers are on the same side: they are merged. What may be sent is the caller's
  ``limit_bytes``. Nor need a downset be grown whose own compute is already too much (``most_s``).
* **What costs nothing to take along.** A node without compute and parameters, whose output is no
  larger than the inputs that only it reads, joins a downset as soon as it can. That can only shrink
  what crosses a cut, keeps every stage's compute and parameters, and keeps inclusion between
  downsets; so no answer is lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from autoshard.profile.pipedream import Profile, ProfileNode

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A profile by index; nodes are in topological order.

    Attributes:
        compute_s: forward and backward of each node, [nodes].
        parameter_bytes, activation_bytes: of each node, [nodes].
        inputs, consumers: per node the indices of the nodes before and after it.
    """

    compute_s: Floats
    parameter_bytes: Floats
    activation_bytes: Floats
    inputs: tuple[tuple[int, ...], ...]
    consumers: tuple[tuple[int, ...], ...]

    def needed_s(self) -> Floats:
        """Compute of each node and of all that it needs, [nodes]."""
        needed = np.eye(len(self), dtype=bool)
        for node, inputs in enumerate(self.inputs):
            needed[node] |= needed[list(inputs)].any(axis=0)
        return np.asarray(needed @ self.compute_s)

    def __len__(self) -> int:
        return len(self.inputs)

    @staticmethod
    def of(profile: Profile) -> Graph:
        """Inputs of the model cost nothing: as in PipeDream, they are read where they are used."""
        index = {node.name: i for i, node in enumerate(profile.nodes)}
        inputs: list[list[int]] = [[] for _ in profile.nodes]
        consumers: list[list[int]] = [[] for _ in profile.nodes]
        for source, target in profile.edges:
            inputs[index[target]].append(index[source])
            consumers[index[source]].append(index[target])
        counted = [
            0.0 if _is_input(node) and not inputs[i] else 1.0
            for i, node in enumerate(profile.nodes)
        ]
        kept = np.array(counted)
        nodes = profile.nodes
        return Graph(
            compute_s=kept * [n.forward_s + n.backward_s for n in nodes],
            parameter_bytes=kept * [n.parameter_bytes for n in nodes],
            activation_bytes=kept * [n.activation_bytes for n in nodes],
            inputs=tuple(map(tuple, inputs)), consumers=tuple(map(tuple, consumers)),
        )  # fmt: skip

    def crossing_bytes(self, members: Bools) -> Floats:
        """Activations that leave downsets: of nodes inside that are read outside, each once.

        Args:
            members: [downsets, nodes].
        """
        found = np.zeros(len(members))
        for node, consumers in enumerate(self.consumers):
            if consumers and self.activation_bytes[node]:
                leaves = members[:, node] & ~members[:, list(consumers)].all(axis=1)
                found += self.activation_bytes[node] * leaves
        return found


def _is_input(node: ProfileNode) -> bool:
    return node.module.startswith("Input")


def prefixes(graph: Graph, orders: int) -> Bools:
    """The downsets that some topological orders go through: the graph's own, and random ones.

    Returns:
        [downsets, nodes], each once, but for the empty one.
    """
    rng = random.Random(0)
    found = [np.tri(len(graph), dtype=bool)]
    for _ in range(orders - 1):
        rank = np.empty(len(graph), dtype=np.intp)
        rank[_random_order(graph, rng)] = np.arange(len(graph))
        found.append(rank[None, :] <= np.arange(len(graph))[:, None])
    members = np.concatenate(found)
    packed = np.packbits(members, axis=1)
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(packed)))}
    return members[sorted(first.values())]


def _random_order(graph: Graph, rng: random.Random) -> list[int]:
    waits = [len(inputs) for inputs in graph.inputs]
    ready = [node for node, count in enumerate(waits) if not count]
    order = []
    while ready:
        node = ready.pop(rng.randrange(len(ready)))
        order.append(node)
        for consumer in graph.consumers[node]:
            waits[consumer] -= 1
            if not waits[consumer]:
                ready.append(consumer)
    return order


def downsets(graph: Graph, limit_bytes: Floats, most_s: float, most: int) -> Bools | None:
    """All downsets but the empty one and those that need not be considered.

    Args:
        limit_bytes: per node, the largest activation that may cross a cut.
        most_s: of compute in a downset, but for the whole.

    Returns:
        [downsets, nodes], the whole last; ``None`` if there are more than ``most``.
    """
    groups = _Groups(graph, limit_bytes)
    every = range(len(groups.members))
    start = groups.closed(0, every)
    found = {start}
    stack = [(start, groups.ready(start, every), 0.0)]
    while stack:
        done, ready, spent_s = stack.pop()
        for group in ready:
            # Groups that join by themselves compute nothing.
            now_s = spent_s + groups.compute_s[group]
            bigger = groups.closed(done | 1 << group, groups.after[group])
            if now_s > most_s or bigger in found:
                continue
            if len(found) >= most:
                return None
            found.add(bigger)
            news = groups.ready(bigger, groups.reached(done, bigger))
            left = [g for g in ready if not bigger >> g & 1]
            stack.append((bigger, list(dict.fromkeys([*left, *news])), now_s))
    whole = (1 << len(groups.members)) - 1
    found -= {0, whole}
    return _bits([*found, whole], len(groups.members))[:, groups.of_node]


def _bits(sets: Sequence[int], width: int) -> Bools:
    """Sets of small numbers, written as the bits of integers, as rows: [sets, width]."""
    num_bytes = (width + 7) // 8
    raw = b"".join(s.to_bytes(num_bytes, "little") for s in sets)
    table = np.frombuffer(raw, dtype=np.uint8).reshape(len(sets), num_bytes)
    return np.unpackbits(table, axis=1, count=width, bitorder="little").astype(bool)


class _Groups:
    """Nodes that no cut separates, as a graph of their own; sets of groups are bits of integers.

    Attributes:
        of_node: group of every node, [nodes].
        members: per group its nodes.
        compute_s: per group.
        after: per group the groups that read it.
        eager: per group whether it joins as soon as it can.
    """

    def __init__(self, graph: Graph, limit_bytes: Floats) -> None:
        both = nx.DiGraph()
        both.add_nodes_from(range(len(graph)))
        for node, consumers in enumerate(graph.consumers):
            both.add_edges_from((node, c) for c in consumers)
            if graph.activation_bytes[node] > limit_bytes[node]:
                both.add_edges_from((c, node) for c in consumers)
        # Where consumers pull a node along, what lies on a path between them comes along, too:
        # that is a strongly connected component.
        self.members = sorted(sorted(c) for c in nx.strongly_connected_components(both))
        self.compute_s = [float(graph.compute_s[nodes].sum()) for nodes in self.members]
        self.of_node = np.empty(len(graph), dtype=np.intp)
        for group, nodes in enumerate(self.members):
            self.of_node[nodes] = group
        self._needs = [0] * len(self.members)
        self.after: list[list[int]] = [[] for _ in self.members]
        edges = {
            (int(self.of_node[a]), int(self.of_node[b]))
            for a, consumers in enumerate(graph.consumers)
            for b in consumers
        }
        for a, b in sorted(edges):
            if a != b:
                self._needs[b] |= 1 << a
                self.after[a].append(b)
        self.eager = [len(nodes) == 1 and _joins(graph, nodes[0]) for nodes in self.members]

    def _can(self, group: int, done: int) -> bool:
        return not done >> group & 1 and self._needs[group] & ~done == 0

    def closed(self, done: int, among: Iterable[int]) -> int:
        """``done`` with the eager groups that it allows, of which the first are ``among``."""
        waiting = list(among)
        while waiting:
            group = waiting.pop()
            if self.eager[group] and self._can(group, done):
                done |= 1 << group
                waiting += self.after[group]
        return done

    def reached(self, before: int, done: int) -> Iterator[int]:
        """The groups that read what is in ``done`` and was not ``before``."""
        new = done & ~before
        while new:
            low = new & -new
            new ^= low
            yield from self.after[low.bit_length() - 1]

    def ready(self, done: int, among: Iterable[int]) -> list[int]:
        """Groups that may come next."""
        return [g for g in among if self._can(g, done)]


def _joins(graph: Graph, node: int) -> bool:
    """Whether taking a node along as soon as its inputs are there costs nothing."""
    if graph.compute_s[node] or graph.parameter_bytes[node]:
        return False
    own = graph.activation_bytes[node] if graph.consumers[node] else 0.0
    freed = sum(
        graph.activation_bytes[i] for i in graph.inputs[node] if graph.consumers[i] == (node,)
    )
    return bool(own <= freed)
