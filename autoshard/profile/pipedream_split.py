"""Splits a measured profile into pipeline stages of several replicas each.

The objective is that of PipeDream's optimiser (Narayanan et al. 2019, section 3.1, as its published
program computes it): the time between minibatches is that of the slowest stage, and a stage with
``r`` replicas, compute ``C`` (forward and backward of a minibatch), parameters ``P`` bytes, and
activations ``A`` and ``Z`` bytes that cross its first and last cut takes the largest of::

    (C + 4 (r - 1) P / (r bandwidth)) / r     compute, and all-reduce of gradients
    2 A / (r bandwidth)                       activations in, their gradients back; not stage 0
    2 Z / (r bandwidth)                       activations out, gradients back; not the last or first

(what leaves stage 0 is charged to stage 1). Replicas need not be equal, and machines may be left
idle. A cut is a downset of the graph and may go through parallel branches. With all downsets that
can matter (:mod:`autoshard.profile.downsets`) the best split is exact, by dynamic programming over
(downset, machines used). Where a graph has too many of them, large activations are kept together,
the prefixes of random topological orders are tried, too, and the answer says that it is not proven.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoshard.errors import OptionError
from autoshard.profile.downsets import Bools, Floats, Graph, downsets, prefixes
from autoshard.profile.pipedream import Profile, read_pipedream

_MOST_FOUND = 20_000
"""Downsets that are listed: half a second."""
_MOST_TRIED = 16_000
"""Downsets times machines in one dynamic program: less than a second."""
_MOST_ROUNDS = 3
_MOST_PREFIXES = 16_000
"""Of random topological orders, tried where not all downsets can be."""
_ROUNDING = 1e-9
"""Relative; what is pruned is worse by more than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileStage:
    """One stage of a split.

    Attributes:
        nodes: names, in topological order.
        replicas: machines that run it, on different minibatches.
        compute_s: forward and backward of one minibatch on one machine.
        time_s: under the objective; between minibatches, all replicas together.
        activation_bytes: what crosses the cut after it; 0 after the last.
    """

    nodes: tuple[str, ...]
    replicas: int
    compute_s: float
    time_s: float
    parameter_bytes: float
    activation_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSplit:
    """A pipeline.

    Attributes:
        bottleneck_s: seconds per minibatch: the slowest stage's.
        optimal: proven to be the least possible.
        bound_s: no split can take less.
    """

    stages: tuple[ProfileStage, ...]
    bottleneck_s: float
    optimal: bool
    bound_s: float

    def __str__(self) -> str:
        lines = [
            f"stage {i}: {len(s.nodes)} nodes ({s.nodes[0]} ... {s.nodes[-1]}) x{s.replicas}, "
            f"{s.time_s:.6g} s, {s.parameter_bytes:.4g} B of parameters, sends "
            f"{s.activation_bytes:.4g} B"
            for i, s in enumerate(self.stages)
        ]
        proof = "optimal" if self.optimal else f"not proven optimal, at least {self.bound_s:.6g} s"
        return "\n".join([*lines, f"{self.bottleneck_s:.6g} s per minibatch, {proof}"])


def split_pipedream(
    profile: str | Path | Profile, machines: int = 4, bandwidth: float = 1e9
) -> ProfileSplit:
    """The pipeline with the highest throughput.

    Args:
        profile: a file in PipeDream's format, or what :func:`read_pipedream` made of one.
        machines: how many there are; all alike.
        bandwidth: of the links between them, bytes per second.

    Raises:
        OptionError: a malformed profile, fewer than one machine, or a bandwidth that is not
            positive.
    """
    if isinstance(machines, bool) or not isinstance(machines, int) or machines < 1:
        raise OptionError(f"machines expects a whole number, one or more, but got {machines!r}")
    if not (isinstance(bandwidth, int | float) and 0 < bandwidth < math.inf):
        raise OptionError(f"bandwidth expects positive bytes per second but got {bandwidth!r}")
    if not isinstance(profile, Profile):
        profile = read_pipedream(profile)
    problem = _Problem(Graph.of(profile), machines, float(bandwidth))
    chain, optimal = problem.solve()
    bound = chain.seconds if optimal else problem.balance_s
    return _described(profile, problem, chain, optimal, min(bound, chain.seconds))


@dataclass(frozen=True, slots=True)
class _Chain:
    """A split: the downset after each stage, [stages, nodes], and each stage's replicas."""

    seconds: float
    ends: Bools
    replicas: tuple[int, ...]


class _Problem:
    """One graph on so many machines."""

    def __init__(self, graph: Graph, machines: int, bandwidth: float) -> None:
        self.graph = graph
        self.machines = machines
        self.bandwidth = bandwidth
        self.total_s = float(graph.compute_s.sum())
        self.balance_s = self.total_s / machines

    def solve(self) -> tuple[_Chain, bool]:
        """The best split found, and whether it is proven to be the best."""
        incumbent = self.best_chain(self._thinned(prefixes(self.graph, 1)))
        if self.machines == 1 or incumbent.seconds <= self.balance_s:
            return incumbent, True
        for _ in range(_MOST_ROUNDS):
            before = incumbent.seconds
            members, complete = self._cuts(before)
            chain = self.best_chain(members)
            if chain.seconds < before:
                incumbent = chain
            if complete:
                return incumbent, True
            if incumbent.seconds == before:
                break
        members = prefixes(self.graph, max(2, _MOST_PREFIXES // len(self.graph)))
        members = members[self._useful(members, incumbent.seconds)]
        chain = self.best_chain(self._thinned(members))
        return min(incumbent, chain, key=lambda c: c.seconds), False

    def _most_cuts(self) -> int:
        return max(2, _MOST_TRIED // self.machines)

    def _thinned(self, members: Bools) -> Bools:
        """Those with the least to send, and the whole, if there are too many to try."""
        order = np.argsort(self.graph.crossing_bytes(members), kind="stable")
        kept = np.zeros(len(members), dtype=bool)
        kept[order[: self._most_cuts()]] = True
        return members[kept | members.all(axis=1)]

    def _sent_bytes(self, before_s: Floats, seconds: float) -> Floats:
        """The most that may cross a cut if no stage is to take longer than ``seconds``.

        Args:
            before_s: compute ahead of the cut, which takes some machines; at most the others
                receive.
        """
        machines = np.maximum(1.0, np.ceil(before_s / seconds - _ROUNDING))
        return (self.machines - machines) * seconds * self.bandwidth / 2 * (1 + _ROUNDING)

    def _cuts(self, seconds: float) -> tuple[Bools, bool]:
        """Downsets between stages of a split that takes no more than ``seconds``.

        Returns:
            As many as can be tried, and whether these are all.
        """
        limits = self._sent_bytes(self.graph.needed_s(), seconds)
        members = self._listed(limits, seconds, _MOST_FOUND)
        if members is not None:
            return members, True
        sizes = np.unique(self.graph.activation_bytes)
        low, high = 0, len(sizes)  # the largest limit with few enough downsets, by bisection
        best = np.ones((1, len(self.graph)), dtype=bool)
        while low < high:
            middle = (low + high) // 2
            members = self._listed(np.minimum(limits, sizes[middle]), seconds, self._most_cuts())
            if members is None:
                high = middle
            else:
                best, low = members, middle + 1
        return best, False

    def _listed(self, limits: Floats, seconds: float, most: int) -> Bools | None:
        most_s = (self.machines - 1) * seconds * (1 + _ROUNDING)
        members = downsets(self.graph, limits, most_s, most)
        if members is None:
            return None
        members = members[self._useful(members, seconds)]
        return members if len(members) <= self._most_cuts() else None

    def _useful(self, members: Bools, seconds: float) -> Bools:
        """Which downsets a split of at most so many seconds may have: what crosses is in time, and
        so are both sides on some division of the machines."""
        before_s = members @ self.graph.compute_s
        fewest = np.maximum(1.0, np.ceil(before_s / seconds - _ROUNDING))
        fits = self.total_s - before_s <= (self.machines - fewest + _ROUNDING) * seconds
        sent = self.graph.crossing_bytes(members) <= self._sent_bytes(before_s, seconds)
        useful: Bools = (fits & sent) | members.all(axis=1)
        return useful

    def best_chain(self, members: Bools) -> _Chain:
        """The best split whose cuts are among these downsets, exactly.

        Args:
            members: [downsets, nodes], the whole among them.
        """
        members = members[np.argsort(members.sum(axis=1), kind="stable")]
        table = _Table(self, members)
        for end in range(len(members)):
            table.fill(end)
        return table.chain()

    def stage_s(
        self,
        compute_s: Floats | float,
        parameter_bytes: Floats | float,
        entering: Floats | float,
        leaving: float,
        replicas: int,
    ) -> Floats:
        """The objective of the module's docstring for stages of several beginnings."""
        moved = replicas * self.bandwidth
        sync_s = 4 * (replicas - 1) * parameter_bytes / moved
        own_s = (compute_s + sync_s) / replicas
        moved_s = np.maximum(2 * entering / moved, 2 * leaving / moved)
        return np.asarray(np.maximum(own_s, moved_s))


class _Table:
    """The dynamic program: per downset and number of machines, the best split of that downset."""

    def __init__(self, problem: _Problem, members: Bools) -> None:
        graph = problem.graph
        self._problem = problem
        self._members = members
        self._words = _packed(members)
        self._compute_s = members @ graph.compute_s
        self._parameter_bytes = members @ graph.parameter_bytes
        self._crossing = graph.crossing_bytes(members)
        shape = (len(members), problem.machines + 1)
        self._best_s = np.full(shape, np.inf)
        self._start = np.full(shape, -1)
        self._replicas = np.zeros(shape, dtype=int)

    def fill(self, end: int) -> None:
        """The row of one downset; those of smaller ones are there."""
        problem, machines = self._problem, self._problem.machines
        compute_s, parameter_bytes = self._compute_s[end], self._parameter_bytes[end]
        for r in range(1, machines + 1):
            alone = problem.stage_s(compute_s, parameter_bytes, 0.0, 0.0, r)
            self._best_s[end, r], self._replicas[end, r] = alone, r
        starts = np.flatnonzero(~(self._words[:end] & ~self._words[end]).any(axis=1))
        if not len(starts):
            return
        before_s = self._best_s[starts]
        leaving = float(self._crossing[end])  # nothing crosses after the whole
        for r in range(1, machines):
            stage_s = problem.stage_s(
                compute_s - self._compute_s[starts],
                parameter_bytes - self._parameter_bytes[starts],
                self._crossing[starts], leaving, r,
            )  # fmt: skip
            both_s = np.maximum(before_s[:, 1 : machines - r + 1], stage_s[:, None])
            chosen = both_s.argmin(axis=0)
            least = both_s[chosen, np.arange(machines - r)]
            better = np.flatnonzero(least < self._best_s[end, r + 1 :])
            used = better + r + 1
            self._best_s[end, used] = least[better]
            self._start[end, used] = starts[chosen[better]]
            self._replicas[end, used] = r

    def chain(self) -> _Chain:
        """The best split of the whole, which is the last row."""
        end = len(self._members) - 1
        used = int(self._best_s[end].argmin())
        seconds = float(self._best_s[end, used])
        ends, replicas = [], []
        while end >= 0:
            ends.append(end)
            replicas.append(int(self._replicas[end, used]))
            end, used = int(self._start[end, used]), used - replicas[-1]
        return _Chain(seconds, self._members[ends[::-1]], tuple(replicas[::-1]))


def _packed(members: Bools) -> NDArray[np.uint64]:
    """Rows of bits as 64-bit words, for fast tests of inclusion."""
    width = -(-members.shape[1] // 64) * 64
    padded = np.zeros((len(members), width), dtype=bool)
    padded[:, : members.shape[1]] = members
    return np.packbits(padded, axis=1).view(np.uint64)


def _described(
    profile: Profile, problem: _Problem, chain: _Chain, optimal: bool, bound_s: float
) -> ProfileSplit:
    graph = problem.graph
    crossing = [0.0, *graph.crossing_bytes(chain.ends).tolist()]
    cuts = [np.zeros(len(graph), dtype=bool), *chain.ends]
    stages = []
    for i, (before, after) in enumerate(pairwise(cuts)):
        inside = after & ~before
        compute, parameters = inside @ graph.compute_s, inside @ graph.parameter_bytes
        leaving = crossing[i + 1] if i else 0.0
        time_s = problem.stage_s(compute, parameters, crossing[i], leaving, chain.replicas[i])
        stages.append(
            ProfileStage(
                nodes=tuple(profile.nodes[n].name for n in np.flatnonzero(inside)),
                replicas=chain.replicas[i], compute_s=float(compute), time_s=float(time_s),
                parameter_bytes=float(parameters), activation_bytes=crossing[i + 1],
            )
        )  # fmt: skip
    return ProfileSplit(
        stages=tuple(stages), bottleneck_s=max(s.time_s for s in stages), optimal=optimal,
        bound_s=bound_s,
    )  # fmt: skip
