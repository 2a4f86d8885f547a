"""The links that a group of ranks communicates over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoshard.cluster.hardware import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What one tier does for a group: it joins ``size`` units of ``members`` ranks each.

    Attributes:
        bytes_per_s: per rank of the group and direction.
        chained: trees are chains here, as NCCL's are within a node.
    """

    size: int
    members: int
    bytes_per_s: float
    latency_s: float
    efficiency: Mapping[str, float]
    latency_factor: Mapping[str, float] = field(default_factory=dict)
    chained: bool = False

    def latency(self, kind: str) -> float:
        """Seconds per message of a collective of this kind."""
        return self.latency_s * self.latency_factor.get(kind, 1.0)

    def rate(self, kind: str) -> float:
        """Bytes per second and rank that a collective of this kind reaches here."""
        return self.bytes_per_s * self.efficiency.get(kind, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The levels that a group's ranks communicate over, innermost first.

    Levels that join only one unit are left out, so the last one is the slowest that the group
    uses; the product of the sizes is the group's size (or just above, if it does not divide).

    Attributes:
        jitter_s: of the devices that it joins.
    """

    group_size: int
    levels: tuple[Level, ...]
    jitter_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """What a ring through all ranks carries: the narrowest level (infinite for one rank)."""
        return self.ring_rate("")

    @property
    def latency_s(self) -> float:
        """Of one message between the farthest ranks."""
        return self.levels[-1].latency_s if self.levels else 0.0

    def ring_rate(self, kind: str) -> float:
        """Bytes per second of rings through all ranks.

        ``members`` ranks of a node send over their own network card each, and a ring per card
        lets all of them carry the same collective, so a level's share is ``members`` times one
        rank's: strided groups of 2, 4 and 8 over two nodes reach 8, 16 and 21 GB/s (Galvatron's
        published hardware profile), proportional to their members per node.
        """
        return min((lv.rate(kind) * lv.members for lv in self.levels), default=math.inf)


def link(cluster: Cluster, group_size: int, stride: int = 1) -> Link:
    """The links of a group of ``group_size`` ranks that are ``stride`` devices apart.

    With mesh axes outermost first, ``stride`` is the product of the sizes of the axes further in.
    All groups of an axis communicate at once, so a node's network cards are shared by the groups
    that run through it: every rank has its own device's share.
    """
    cluster.tier_of(group_size * stride)
    levels: list[Level] = []
    covered = 1
    for tier in cluster.tiers:
        reach = group_size if tier.size == 0 else min(group_size, max(1, tier.size // stride))
        if reach > covered:
            levels.append(
                Level(
                    size=-(-reach // covered), members=covered,
                    bytes_per_s=tier.rate(reach, stride),
                    latency_s=tier.latency_s, efficiency=tier.efficiency,
                    latency_factor=tier.latency_factor,
                    chained=tier is not cluster.tiers[-1],
                )
            )  # fmt: skip
            covered = reach
        if covered >= group_size:
            break
    return Link(
        group_size=group_size, levels=tuple(levels), jitter_s=cluster.device.jitter_s
    )  # fmt: skip
