"""The one interface through which planners ask what things cost, and its two implementations.

:class:`AnalyticCosts` knows a cluster's figures; :class:`MeasuredCosts` looks ops up in a table of
measurements first (:mod:`autoshard.profile` makes them) and falls back on the analytic figure,
remembering how much of the time it gave out was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from autoshard.cluster import Cluster, Device, Link, link
from autoshard.cost_models.collective import (
    Collective,
    collective_s,
    conversion_s,
    inner_collectives_s,
)
from autoshard.cost_models.compute import OpCost, op_cost
from autoshard.ir import Arg, Op, TensorType, Value
from autoshard.placement.state import State

OpTable = Mapping[str, OpCost]
"""Measured costs by :func:`op_key`."""


class CostModel(Protocol):
    """What planners may ask. All seconds are of one rank."""

    @property
    def cluster(self) -> Cluster: ...

    @property
    def origin(self) -> Mapping[str, float]:
        """Share of the compute time given out so far that was ``measured`` and ``analytic``."""
        ...

    def op(self, op: Op) -> OpCost:
        """Forward and backward of one op on the (local) types that it has, without collectives."""
        ...

    def conversion(
        self, value_type: TensorType, source: State, target: State, axis_link: Link
    ) -> tuple[float, float]:
        """Forward and backward seconds of a conversion; ``value_type`` is whole on the axis."""
        ...

    def collective(self, kind: Collective, nbytes: float, axis_link: Link) -> float:
        """Seconds of one collective."""
        ...

    def inner_collectives(self, op: Op, links: Mapping[str, Link]) -> tuple[float, float]:
        """Forward and backward seconds of what an op communicates within itself, over ``links``."""
        ...


class AnalyticCosts:
    """Costs from a cluster's figures: roofline and alpha-beta."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    @property
    def device(self) -> Device:
        return self.cluster.device

    @property
    def origin(self) -> Mapping[str, float]:
        return {"measured": 0.0, "analytic": 1.0}

    def link(self, group_size: int, stride: int = 1) -> Link:
        """The links of groups of ``group_size`` ranks ``stride`` devices apart."""
        return link(self.cluster, group_size, stride)

    def op(self, op: Op) -> OpCost:
        return op_cost(op, self.cluster.device)

    def conversion(
        self, value_type: TensorType, source: State, target: State, axis_link: Link
    ) -> tuple[float, float]:
        n = axis_link.group_size
        return conversion_s(source, target, value_type, n, axis_link, self.cluster.device)

    def collective(self, kind: Collective, nbytes: float, axis_link: Link) -> float:
        return collective_s(kind, nbytes, axis_link)

    def inner_collectives(self, op: Op, links: Mapping[str, Link]) -> tuple[float, float]:
        return inner_collectives_s(op, links)


class MeasuredCosts(AnalyticCosts):
    """Costs of ops from measurements where there are any, else analytic.

    Args:
        cluster: for everything that was not measured; measured links belong in it
            (``autoshard profile`` writes such a file).
        table: measured costs by :func:`op_key`; failed measurements are absent.
        paces: by an op's target (``""``: any other) the factor from analytic to measured seconds,
            for ops that are not in the table.
    """

    def __init__(
        self, cluster: Cluster, table: OpTable, paces: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(cluster)
        self._table = table
        self._paces = paces or {}
        self._seconds = {"measured": 0.0, "analytic": 0.0}

    @property
    def origin(self) -> Mapping[str, float]:
        total = sum(self._seconds.values())
        if total == 0:
            return {"measured": 0.0, "analytic": 1.0}
        return {name: seconds / total for name, seconds in self._seconds.items()}

    def op(self, op: Op) -> OpCost:
        cost = self._table.get(op_key(op)) or self._scaled(op)
        self._seconds[cost.origin] += cost.total_s
        return cost

    def _scaled(self, op: Op) -> OpCost:
        cost = op_cost(op, self.cluster.device)
        pace = self._paces.get(op.target, self._paces.get("", 1.0))
        return replace(cost, forward_s=pace * cost.forward_s, backward_s=pace * cost.backward_s)


def op_key(op: Op) -> str:
    """Everything about an op that its time depends on: equal keys, equal times.

    Names are left out: the target, the types (with which of them need a gradient) and all literals
    remain. An operand that is passed twice is marked, since it is read once.
    """
    numbers: dict[str, int] = {}
    parts = [_key(a, numbers) for a in op.args]
    parts += [f"{name}={_key(a, numbers)}" for name, a in op.kwargs]
    outputs = ",".join(map(_type_key, (v.type for v in op.outputs)))
    return f"{op.target}({','.join(parts)})->{outputs}"


def _type_key(kind: TensorType) -> str:
    return f"{kind}{'*' if kind.differentiable else ''}"


def _key(arg: Arg, numbers: dict[str, int]) -> str:
    if isinstance(arg, Value):
        number = numbers.setdefault(arg.name, len(numbers))
        return f"{number}:{_type_key(arg.type)}"
    if isinstance(arg, tuple):
        return f"[{','.join(_key(a, numbers) for a in arg)}]"
    return repr(arg)
