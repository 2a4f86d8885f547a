"""Which module calls are layers.

A layer is a module of some substance that comes in rows: equal calls, or siblings of one class
(blocks that differ by their index). The outermost such modules are taken, except where rows lie in
rows (the blocks of a stage): then the inner ones. What stands alone is looked into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from autoshard import ir
from autoshard.capture.lower import Call
from autoshard.capture.structure import form_of, stretch_of

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MATRICES_OF_A_ROW = 2


@dataclass(slots=True)
class CallNode:
    """One call of a module, with the indices of the ops made in it."""

    call: Call
    module: nn.Module | None
    parent: CallNode | None = None
    children: list[CallNode] = field(default_factory=list)
    ops: list[int] = field(default_factory=list)
    matrices: int = 0
    alone_in_list: bool = False

    @property
    def path(self) -> str:
        return self.call[0]

    @property
    def contiguous(self) -> bool:
        return bool(self.ops) and self.ops[-1] - self.ops[0] + 1 == len(self.ops)

    @property
    def is_candidate(self) -> bool:
        """Has weights of its own, is one stretch, and is more than a single torch layer."""
        if self.module is None or not self.path or not self.matrices or not self.contiguous:
            return False
        composite = next(self.module.children(), None) is not None
        return composite or not type(self.module).__module__.startswith("torch.nn.")

    def walk(self) -> Iterator[CallNode]:
        yield self
        for child in self.children:
            yield from child.walk()


def call_tree(
    ops: Sequence[ir.Op],
    calls: Mapping[str, tuple[Call, ...]],
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, ir.Value],
) -> CallNode:
    """The module calls of ``ops`` as a tree; the root is the model."""
    root = CallNode(("", 0), modules.get(""))
    known: dict[tuple[Call, ...], CallNode] = {}
    for i, op in enumerate(ops):
        weights = sum(v.name in parameters and v.type.ndim >= 2 for v in op.operands)
        node = root
        key: tuple[Call, ...] = ()
        _enter(root, i, weights)
        for call in calls[op.name]:
            if not call[0]:
                continue
            key = (*key, call)
            if key not in known:
                holder = modules.get(call[0].rpartition(".")[0])
                alone = isinstance(holder, nn.ModuleList) and len(holder) == 1
                known[key] = CallNode(call, modules.get(call[0]), node, alone_in_list=alone)
                node.children.append(known[key])
            node = known[key]
            _enter(node, i, weights)
    return root


def _enter(node: CallNode, index: int, weights: int) -> None:
    node.ops.append(index)
    node.matrices += weights


def layers_of(
    root: CallNode,
    ops: Sequence[ir.Op],
    parameters: Mapping[str, ir.Value],
    kind_of: Callable[[str], str],
) -> list[CallNode]:
    """The calls that are layers, in execution order; none lies in another."""
    candidates = [node for node in root.walk() if node.is_candidate]
    forms: dict[int, Hashable] = {}
    for node in candidates:
        inside = ops[node.ops[0] : node.ops[-1] + 1]
        stretch = stretch_of(inside, parameters, lambda name: False)
        forms[id(node)] = form_of(stretch, node.path, kind_of, loosely=True)
    counts = Counter(forms.values())
    repeated = {id(n) for n in candidates if counts[forms[id(n)]] > 1}
    rows = {id(n) for n in candidates if _in_row(n)}
    chosen = list(_outermost(root, repeated, rows))
    # An equal twin inside another layer does not make a row: equal calls must both be outermost.
    outer = Counter(forms[id(n)] for n in chosen)
    return [n for n in chosen if outer[forms[id(n)]] > 1 or id(n) in rows]


def _in_row(node: CallNode) -> bool:
    """Stands beside siblings of its class, or alone in a list made for them."""
    if node.parent is None or node.module is None or isinstance(node.module, _CONTAINERS):
        return False
    if node.matrices < _MATRICES_OF_A_ROW:
        return False
    same = [c for c in node.parent.children if type(c.module) is type(node.module)]
    return len(same) > 1 or node.alone_in_list


def _outermost(node: CallNode, repeated: set[int], rows: set[int]) -> Iterator[CallNode]:
    if id(node) in repeated or (id(node) in rows and not _has_row(node, rows)):
        yield node
        return
    for child in node.children:
        yield from _outermost(child, repeated, rows)


def _has_row(node: CallNode, rows: set[int]) -> bool:
    return any(id(inner) in rows for child in node.children for inner in child.walk())
