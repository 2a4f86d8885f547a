"""Planning with measured costs: what a plan runs is measured, and planned again.

A search asks for the cost of many thousand local ops, most of which no good plan contains. So only
those of the best plan so far are measured; the analytic figures of all others are scaled by how far
they were off on measured ops of the same kind, so that what was not measured is neither favoured
nor shunned. This ends when the best plan contains nothing that was not tried, usually in the second
or third round.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from autoshard.cluster import Cluster, core_share
from autoshard.cost_models.compute import OpCost, op_cost
from autoshard.cost_models.costs import AnalyticCosts, CostModel, MeasuredCosts, op_key
from autoshard.errors import OptionError
from autoshard.ir import Op, Program
from autoshard.passes import stage_graphs
from autoshard.plan.plan import Plan
from autoshard.profile.cache import Cache
from autoshard.profile.profiler import profile_ops
from autoshard.profile.timing import present_device

MOST_ROUNDS = 5
"""Plans that are tried; the last one may then contain ops whose costs are scaled figures."""

Progress = Callable[[str], None]


def plan_measured(
    find: Callable[[CostModel], Plan],
    program: Program,
    cluster: Cluster,
    world_size: int,
    *,
    cache: Cache | None = None,
    progress: Progress = lambda text: None,
) -> Plan:
    """The best plan by what its ops take on the present device.

    Processes that share this machine's cores are each measured as slow as that makes them.

    Args:
        find: the search, by costs.
        cluster: its device must be of the present kind; its links are used as they are.
        cache: of measurements; ``None``: the user's own on disk.

    Raises:
        OptionError: the cluster's devices are of another kind than the present one.
    """
    present = present_device().type
    if cluster.device.kind != present:
        raise OptionError(
            f"measured costs are those of the present device, which is of kind {present}, but the "
            f"cluster {cluster.name!r} has devices of kind {cluster.device.kind}: give a cluster "
            'such as "this-machine", or plan on a machine of that kind'
        )
    share = 1.0
    if present == "cpu":
        share = core_share(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    measured = _Measured(cluster, share, cache if cache is not None else Cache())
    plan = find(AnalyticCosts(cluster))
    for _ in range(MOST_ROUNDS):
        progress("measuring the ops of the best plan so far")
        if not measured.add(ops_of(program, plan)):
            return plan
        plan = find(measured.costs())
    return plan


def ops_of(program: Program, plan: Plan) -> list[Op]:
    """Every op of the plan's layers, as one rank runs it."""
    return [op for layer in stage_graphs(program, plan).layers.values() for op in layer.graph.ops]


class _Measured:
    """What was measured so far."""

    def __init__(self, cluster: Cluster, share: float, cache: Cache) -> None:
        self._cluster = cluster
        self._share = share
        self._cache = cache
        self._table: dict[str, OpCost] = {}
        self._tried: set[str] = set()
        self._seconds: dict[str, tuple[float, float]] = {}

    def add(self, ops: list[Op]) -> bool:
        """Measure the ops that are new; whether any are."""
        new = {op_key(op): op for op in ops}
        new = {key: op for key, op in new.items() if key not in self._tried}
        self._tried |= new.keys()
        device = self._cluster.device
        for key, cost in profile_ops(new.values(), device, cache=self._cache).table.items():
            slow = replace(
                cost,
                forward_s=cost.forward_s / self._share,
                backward_s=cost.backward_s / self._share,
            )
            self._table[key] = slow
            for kind in (new[key].target, ""):
                known, analytic = self._seconds.get(kind, (0.0, 0.0))
                computed_s = op_cost(new[key], device).total_s
                self._seconds[kind] = (known + slow.total_s, analytic + computed_s)
        return bool(new)

    def costs(self) -> MeasuredCosts:
        paces = {kind: m / a for kind, (m, a) in self._seconds.items() if m and a}
        return MeasuredCosts(self._cluster, self._table, paces)
