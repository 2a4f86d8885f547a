"""Planning with measured costs: what a plan runs is measured, and planned again.

A search asks for the cost of many thousand local ops, most of which no good plan contains. So only
those of the best plan so far are measured; the analytic figures of all others are scaled by how far
they were off on measured ops of the same kind, so that what was not measured is neither favoured
nor shunned. This ends when the best plan contains nothing that was not tried, usually in the second
or third round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from autoshard.cluster import Cluster, core_share, num_cores
from autoshard.cost_models.compute import OpCost, op_cost
from autoshard.cost_models.costs import AnalyticCosts, CostModel, MeasuredCosts, op_key
from autoshard.errors import OptionError
from autoshard.ir import Graph, Op, Program
from autoshard.passes import stage_graphs
from autoshard.plan.plan import Plan
from autoshard.profile.cache import Cache
from autoshard.profile.profiler import Step, profile_ops
from autoshard.profile.timing import present_device, rank_threads, threads
from autoshard.runtime.host_memory import keep_freed_memory

MOST_ROUNDS = 5
"""Plans that are tried; the last one may then contain ops whose costs are scaled figures."""

MOST_AT_ONCE = 8
"""Processes that compute while ops are measured, at most: each holds a rank's layers."""

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
    own = cache if cache is not None else Cache()
    measured = _Measured(cluster, _sharing(present, world_size), own)
    plan = find(AnalyticCosts(cluster))
    for _ in range(MOST_ROUNDS):
        progress("measuring the ops of the best plan so far")
        if not measured.add(steps_of(program, plan)):
            return plan
        plan = find(measured.costs())
    return plan


def steps_of(program: Program, plan: Plan) -> list[list[Graph]]:
    """The layers of every stage in order, as one rank runs them; equal stages once."""
    passed = stage_graphs(program, plan)
    found: dict[tuple[tuple[str, ...], ...], list[Graph]] = {}
    for stage in passed.stages:
        names = tuple(call.layer for call in stage.calls)
        extra = [graph for graph in (stage.prologue, stage.shared) if graph is not None]
        layers = [passed.layers[name].graph for name in names]
        found.setdefault((names, stage.shared_outputs), [*extra, *layers])
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _Sharing:
    """How ranks share this machine.

    Attributes:
        threads: of each rank.
        at_once: ranks that have cores of their own while they compute, as far as that is tried.
        share: of a core's time that each rank has; below 1 if there are more ranks than that.
    """

    threads: int
    at_once: int
    share: float


def _sharing(device: str, world_size: int) -> _Sharing:
    if device != "cpu":
        return _Sharing(torch.get_num_threads(), 1, 1.0)
    keep_freed_memory()  # as ranks do
    threads = rank_threads(world_size)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    room = max(1, num_cores() // threads)
    return _Sharing(threads, min(ranks, room, MOST_AT_ONCE), core_share(ranks * threads))


class _Measured:
    """What was measured so far."""

    def __init__(self, cluster: Cluster, sharing: _Sharing, cache: Cache) -> None:
        self._cluster = cluster
        self._sharing = sharing
        self._cache = cache
        self._table: dict[str, OpCost] = {}
        self._tried: set[str] = set()
        self._seconds: dict[str, tuple[float, float]] = {}

    def add(self, steps: Sequence[Step]) -> bool:
        """Measure the ops that are new; whether any are."""
        ops = {op_key(op): op for step in steps for graph in step for op in graph.ops}
        new = {key: op for key, op in ops.items() if key not in self._tried}
        if not new:
            return False
        self._tried |= new.keys()
        sharing = self._sharing
        with threads(sharing.threads):
            found = profile_ops(steps, processes=sharing.at_once, cache=self._cache)
        for key in new.keys() & found.table.keys():
            self._take(new[key], key, found.table[key])
        return True

    def _take(self, op: Op, key: str, cost: OpCost) -> None:
        share = self._sharing.share
        slow = replace(
            cost, forward_s=cost.forward_s / share, backward_s=cost.backward_s / share
        )  # fmt: skip
        self._table[key] = slow
        computed_s = op_cost(op, self._cluster.device).total_s
        for kind in (op.target, ""):
            known, analytic = self._seconds.get(kind, (0.0, 0.0))
            self._seconds[kind] = (known + slow.total_s, analytic + computed_s)

    def costs(self) -> MeasuredCosts:
        paces = {kind: m / a for kind, (m, a) in self._seconds.items() if m and a}
        return MeasuredCosts(self._cluster, self._table, paces)
