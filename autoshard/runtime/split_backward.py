"""Backward in two parts: gradients of a stage's inputs now, those of its weights later.

(Qi et al. 2023, "Zero bubble pipeline parallelism", section 2.) In the autograd graph of a stage,
call a node *inner* if a gradient of an input passes through it. The first part runs the inner nodes
alone, and keeps what arrives at *junctions*, those from which an edge leaves towards weights. The
second part runs each junction once more, for such edges alone, and goes on from there to the
weights.
Of a product ``y = x w`` the first part so computes ``dx`` and the second ``dw``; a node that cannot
compute one without the other (an autograd function written in Python) runs twice.

The second part accumulates as ``backward`` does: hooks on parameters run then. torch has a split
of its own (``torch.distributed.pipelining._backward``). It loses the gradient of a weight none of
whose uses meets an input, as of an embedding that enters the model in a later stage; and where one
weight is used twice it runs what lies in between once more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Gradients = tuple[Tensor | None, ...]
_Seed = tuple[GradientEdge, Tensor]


@dataclass(slots=True)
class _Junction:
    """An inner node with edges towards weights.

    Attributes:
        arrived: gradients of its outputs; ``None`` until the first part has come there.
        alone: from no other junction one gets to where its edges lead.
    """

    node: Node
    edges: list[GradientEdge]
    alone: bool = True
    arrived: Gradients | None = None

    def keep(self, arrived: Gradients) -> None:
        self.arrived = arrived

    def again(self, _: Gradients) -> Gradients | None:
        return self.arrived

    @property
    def roots(self) -> list[_Seed]:
        pairs = enumerate(self.arrived or ())
        return [(GradientEdge(self.node, i), g) for i, g in pairs if g is not None]


class LateWeights:
    """The second part of one backward.

    Args:
        junctions: in the order of the first part.
        found: edges towards weights whose gradients are known already.
    """

    def __init__(self, junctions: Sequence[_Junction], found: Sequence[_Seed]) -> None:
        self._junctions = list(junctions)
        self._found = list(found)

    def run(self) -> None:
        """Accumulate the gradients of weights; once."""
        reached = [j for j in self._junctions if j.roots]
        found = self._found
        self._junctions, self._found = [], []
        together = [j for j in reached if not j.alone]
        # What one of these passes on to another has arrived there before: it is not counted again.
        handles = [j.node.register_prehook(j.again) for j in together]
        try:
            found += _gradients_at(together, retain_graph=True)
        finally:
            for handle in handles:
                handle.remove()
        for junction in reached:
            if junction.alone:
                found += _gradients_at([junction])
        if found:
            torch.autograd.backward([edge for edge, _ in found], [g for _, g in found])


def _gradients_at(junctions: Sequence[_Junction], *, retain_graph: bool = False) -> list[_Seed]:
    """What arrives at the edges of junctions towards weights."""
    if not junctions:
        return []
    roots = [root for junction in junctions for root in junction.roots]
    edges = list(dict.fromkeys(edge for junction in junctions for edge in junction.edges))
    gradients = torch.autograd.grad(
        [edge for edge, _ in roots], edges, [g for _, g in roots],
        retain_graph=retain_graph, allow_unused=True,
    )  # fmt: skip
    return [(edge, g) for edge, g in zip(edges, gradients, strict=True) if g is not None]


def backward_of_inputs(
    outputs: Sequence[Tensor], output_gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> tuple[Gradients, LateWeights]:
    """The first part.

    Args:
        outputs: of the stage; those that need no gradient are left out.
        output_gradients: one per output; ``None`` where nothing comes back.
        inputs: leaves.

    Returns:
        One gradient per input (``None`` where it has none), and the rest.
    """
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    roots = [
        (get_gradient_edge(output), gradient)
        for output, gradient in zip(outputs, output_gradients, strict=True)
        if output.requires_grad and gradient is not None
    ]
    ends = dict.fromkeys(get_gradient_edge(tensor).node for tensor in wanted)
    inner = _leading_to(ends, [edge.node for edge, _ in roots])
    direct = [(edge, gradient) for edge, gradient in roots if edge.node not in inner]
    roots = [(edge, gradient) for edge, gradient in roots if edge.node in inner]
    if not roots:
        return (None,) * len(inputs), LateWeights([], direct)
    junctions = _junctions([node for node in inner if node not in ends], inner)
    handles = [junction.node.register_prehook(junction.keep) for junction in junctions]
    try:
        gradients = iter(
            torch.autograd.grad(
                [edge for edge, _ in roots], wanted, [g for _, g in roots],
                retain_graph=True, allow_unused=True,
            )
        )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    found = tuple(next(gradients) if tensor.requires_grad else None for tensor in inputs)
    return found, LateWeights(junctions, direct)


def _junctions(nodes: Sequence[Node], inner: Collection[Node]) -> list[_Junction]:
    found = []
    for node in nodes:
        below = ((n, i) for n, i in node.next_functions if n is not None and n not in inner)
        edges = list(dict.fromkeys(GradientEdge(n, i) for n, i in below))
        if edges:
            found.append(_Junction(node, edges))
    owner: dict[Node, _Junction | None] = {}
    for junction in found:
        stack = [edge.node for edge in junction.edges]
        while stack:
            node = stack.pop()
            known = owner.get(node, junction)
            if node in owner and (known is None or known is junction):
                continue
            owner[node] = None if node in owner else junction
            stack += [after for after, _ in node.next_functions if after is not None]
    for junction in found:
        junction.alone = all(owner[edge.node] is junction for edge in junction.edges)
    return found


def _leading_to(ends: Iterable[Node], roots: Sequence[Node]) -> dict[Node, None]:
    """The nodes below ``roots`` from which one of ``ends`` can be reached, those included; in an
    order that depends on nothing but the graph, for the order of additions follows it."""
    inner = dict.fromkeys(ends)
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:  # depth first; a node is decided when all that follow it are
        node, followed = stack.pop()
        if followed:
            if any(after in inner for after, _ in node.next_functions):
                inner[node] = None
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions if after is not None]
    return inner
