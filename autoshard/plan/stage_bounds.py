"""What no split of a program into stages can beat: the stage program with real numbers for counts.

Stages ``k`` lie in loops over ``p`` ranks, stage ``k`` on rank ``k mod p``; each takes ``t[k]``
seconds, forward and backward, of every one of ``m`` micro-batches.

[Note: time of a looped schedule] Let ``k`` be a stage of rank ``r``. The rank cannot run the first
forward of ``k`` before that micro-batch has passed all stages before ``k``; nor is the step over
before the micro-batch whose backward through ``k`` is the last has gone back through all of these.
In between the rank does all its work but what it did before (of its stages before ``k``, forwards
of the first group of ``q`` micro-batches) and what is left (backwards of the last group through
the same stages, for the rank's backwards go through its stages in reverse). So

    ``S >= sum(t[i] for i < k) + m sum(t[i] for i of r) - q sum(t[i] for i of r, i < k)``

where ``q`` is ``min(m, p)`` under interleaved 1F1B, whose warm-up of ``2 (p - 1 - r) + (v - 1) p``
forwards takes the first group through all ``v`` stages of the rank (Narayanan et al. 2021, section
2.2), and ``m`` under breadth-first loops. The seconds of transfers are left out, and so is what
follows the last backward.

Under schedules with a closed form, plans are compared by ``S = (m - 1) max t + sum t``.

[Note: memory in flight] When a rank's warm-up ends it holds ``n[k]`` micro-batches of its stages.
With ``x[k]`` the share of the repeated layers that stage ``k`` has, and ``z[k]`` the bytes per
micro-batch that it makes again in backward,

    ``sum(n[k] (saved x[k] - z[k]) + state x[k] for k of r) <= memory``

for every rank, and ``t[k] >= seconds x[k] + y[k] + g[k]``: what is no repeated layer (``y``) may be
anywhere, and ``g`` is the convex function of ``x`` and ``z`` that recomputation takes at least. Any
cut with any choice of recomputation is a solution of this linear program: its optimum is a bound.
Where there are hardly more layers than stages it helps to know that stages have at least one
(:class:`Ends`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile
from operator import mul

import numpy as np

from autoshard.cost_models.pipeline import StageSeconds
from autoshard.errors import InternalError
from autoshard.plan.solver import INFINITY, Builder, solve
from autoshard.schedules import SCHEDULES, by_name

_TOLERANCE = 1e-6
"""What the solver may be off by, relatively."""
_MOST_GROWTH = 20.0
"""Of the logarithm of weights from the first loop to the last, so that digits are left."""


@dataclass(frozen=True, slots=True)
class Looped:
    """A schedule by name, for so many ranks, micro-batches and stages per rank."""

    schedule: str
    num_ranks: int
    num_micro_batches: int
    virtual_stages: int = 1

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.virtual_stages

    @property
    def closed_form(self) -> bool:
        """Plans are compared by ``(m - 1) max t + sum t``."""
        return SCHEDULES[self.schedule].closed_form

    @property
    def waits(self) -> bool:
        """The note on time holds: stages lie in loops, and all ranks wait for the last one."""
        kind = SCHEDULES[self.schedule]
        return kind.flushes and not (kind.folds or kind.splits or kind.stale)

    @property
    def known(self) -> bool:
        """One of the notes on time holds, and that on memory."""
        return self.closed_form or self.waits

    @property
    def group(self) -> int:
        """Micro-batches that go through a stage before the first goes through the rank's next."""
        m, p = self.num_micro_batches, self.num_ranks
        return min(m, p) if self.schedule == "interleaved-1f1b" else m


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What data parallelism adds to the repeated layers together.

    Attributes:
        moved_s: collectives of one micro-batch, which run beside its compute.
        slowdown: compute that is lost per second of a collective that runs beside it; 1: none
            does.
        step_s: once per step, after the last backward.
    """

    moved_s: float = 0.0
    slowdown: float = 1.0
    step_s: float = 0.0

    def beside_s(self, seconds: float) -> float:
        """Of a micro-batch that computes for so many seconds, at least."""
        moved_s, slowdown = self.moved_s, self.slowdown
        return max(seconds + slowdown * moved_s, moved_s + slowdown * seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Where layers can be, if nothing is between them: a stage has one, or is all ends.

    Attributes:
        number: of layers.
        before, after: segments with parameters before and after all layers.
        first_s, last_s: seconds of a micro-batch in the first and the last segment of all, if
            these are no layers.
    """

    number: int
    before: int
    after: int
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The repeated layers of a program together, on a rank and for one micro-batch.

    Attributes:
        seconds: forward and backward.
        saved_bytes: without recomputation.
        pieces: (bytes freed, seconds to make them again), cheapest bytes first.
        state_bytes: parameters, gradients and optimizer state.
        ends: what is before and after them.
    """

    seconds: float
    saved_bytes: float
    pieces: tuple[tuple[float, float], ...]
    state_bytes: float
    ends: Ends | None = None

    @property
    def leanest_bytes(self) -> float:
        """Saved with all recomputation that there is."""
        return self.saved_bytes - sum(freed for freed, _ in self.pieces)


@cache
def turns(looped: Looped) -> float:
    """How often a step takes the seconds of one micro-batch over all stages, at least.

    ``(m + p - 1) / p`` where that is the closed form: stages are best equal. Else the least ``S``
    of the note on time for ``sum t = 1``, by duality: any weights ``w >= 0`` of its constraints
    prove the least coefficient that their sum has for a ``t[i]``. With the weights that make all
    coefficients equal it is the optimum; they follow from those of the first loop by
    ``(q - 1) w[k + p] = sum(w[i] for k < i < k + p)``. For few micro-batches they grow until only
    the last one counts, whose constraint says ``sum t``. Schedules whose ranks do not wait for each
    other may have no bubble: ``m / p``.
    """
    p, m, v = looped.num_ranks, looped.num_micro_batches, looped.virtual_stages
    if looped.closed_form:
        return (m + p - 1) / p
    if not looped.waits:
        return m / p
    least = max(1.0, m / p)
    if p == 1 or p * (v - 1) > _MOST_GROWTH * (looped.group - 1):
        return least
    weights = np.zeros((p * v, p))  # in terms of those of the first loop
    weights[:p] = np.eye(p)
    for k in range(p, p * v):
        weights[k] = weights[k - p + 1 : k].sum(axis=0) / (looped.group - 1)
    last = weights[-p:]
    after = last[::-1].cumsum(axis=0)[::-1] - last
    of_rank = weights.reshape(v, p, p).sum(axis=0)
    found = weights @ np.linalg.solve(after + m * of_rank, np.ones(p))
    return max(least, _proven(looped, np.maximum(found, 0.0).reshape(v, p)))


def _proven(looped: Looped, weights: np.ndarray) -> float:
    """What weights of the constraints, by loop and rank, prove."""
    flat = weights.ravel()
    later = flat[::-1].cumsum()[::-1].reshape(weights.shape) - weights
    of_rank = weights.sum(axis=0)
    later_of_rank = of_rank - weights.cumsum(axis=0)
    coefficients = later + looped.num_micro_batches * of_rank - looped.group * later_of_rank
    return float(coefficients.min() / flat.sum())


def held(looped: Looped) -> tuple[int, ...]:
    """Micro-batches of each stage that its rank holds when its warm-up ends.

    The warm-up of 1F1B, interleaved or not, has none but the first ``2 p`` of them.
    """
    few = min(looped.num_micro_batches, 2 * looped.num_ranks)
    return _warmed_up(looped.schedule, looped.num_ranks, few, looped.virtual_stages)


@cache
def _warmed_up(
    name: str, num_ranks: int, num_micro_batches: int, virtual_stages: int
) -> tuple[int, ...]:
    schedule = by_name(name, num_ranks, num_micro_batches, virtual_stages)
    found = [0] * schedule.num_stages
    for actions in schedule.ranks:
        for action in takewhile(lambda a: a.kind == "F", actions):
            found[action.stage] += 1
    return tuple(found)


def missing_bytes(looped: Looped, layers: Layers, memory_bytes: float) -> float:
    """What every rank lacks at least, with all recomputation; 0 if nothing.

    A rank has most layers if all are in the stage of which it holds least.
    """
    if not looped.known:
        return 0.0
    counts = np.array(held(looped)).reshape(-1, looped.num_ranks).min(axis=0)
    whole = counts * layers.leanest_bytes + layers.state_bytes
    if not whole.all():
        return 0.0
    return float(max(0.0, (1 - (memory_bytes / whole).sum()) / (1 / whole).sum()))


def least_step_s(
    looped: Looped,
    seconds: float,
    layers: Layers,
    memory_bytes: float,
    traffic: Traffic | None = None,
) -> float:
    """Seconds of a step that no cut beats, with any recomputation; infinite if nothing fits.

    Args:
        seconds: of one micro-batch computing through all stages, without recomputation.
    """
    traffic = traffic or Traffic()
    if not looped.known:
        return turns(looped) * traffic.beside_s(seconds)
    if not fits(looped, layers, memory_bytes):
        return INFINITY
    return seconds * _Relaxation(looped, seconds, layers, memory_bytes, traffic).least()


def fits(looped: Looped, layers: Layers, memory_bytes: float) -> bool:
    """Whether the linear program has a solution: all layers fit with all recomputation.

    A rank takes what its stages must have, and the rest in the stage of which it holds least.
    """
    counts, least = held(looped), _least_shares(looped, layers.ends)
    share = 0.0
    for rank in range(looped.num_ranks):
        own = range(rank, looped.num_stages, looped.num_ranks)
        whole = [counts[k] * layers.leanest_bytes + layers.state_bytes for k in own]
        taken = [least[k] for k in own]
        room = (1 + _TOLERANCE) * memory_bytes - sum(map(mul, whole, taken))
        if room < 0:
            return False
        share += sum(taken) + (room / min(whole) if min(whole) > 0 else 1.0)
    return share >= 1 - _TOLERANCE


def _least_shares(looped: Looped, ends: Ends | None) -> list[float]:
    """By stage the least share of all layers."""
    shares = [0.0] * looped.num_stages
    if ends is not None:
        between = max(0, looped.num_stages - ends.before - ends.after)
        shares[ends.before : ends.before + between] = [1 / ends.number] * between
    return shares


def least_of(looped: Looped, stages: Sequence[StageSeconds], tail_s: Sequence[float]) -> float:
    """Seconds of a step with these stages, at least: as the note on time says, with transfers.

    Args:
        tail_s: per rank what follows its last backward.
    """
    p, m, q = looped.num_ranks, looped.num_micro_batches, looped.group
    forward_s, backward_s = ([0.0] * p for _ in range(2))
    work_s = [m * sum(s.forward_s + s.backward_s for s in stages[r::p]) for r in range(p)]
    least = ahead_s = back_s = 0.0
    for k, stage in enumerate(stages):
        rank = k % p
        begun_s = ahead_s - q * forward_s[rank] + work_s[rank]
        through_s = back_s - q * backward_s[rank] + tail_s[0]
        least = max(least, begun_s + max(through_s, tail_s[rank]))
        forward_s[rank] += stage.forward_s
        backward_s[rank] += stage.backward_s
        ahead_s += stage.forward_s + stage.send_s
        back_s += stage.backward_s + stage.send_s
    return least


class _Relaxation:
    """The linear program of both notes, in units of the seconds and the memory that are given."""

    def __init__(
        self,
        looped: Looped,
        seconds: float,
        layers: Layers,
        memory_bytes: float,
        traffic: Traffic,
    ) -> None:
        self._looped, self._builder = looped, Builder()
        self._moved_s, self._step_s = traffic.moved_s / seconds, traffic.step_s / seconds
        self._slowdown = traffic.slowdown
        self._step = self._variables(1, objective=1.0)[0]
        shares, others_s = _least_shares(looped, layers.ends), self._others(seconds, layers.ends)
        self._share = [self._variable(lower=share) for share in shares]
        self._others_s = [self._variable(lower=other_s) for other_s in others_s]
        self._ahead = [*self._variables(1, upper=0.0), *self._variables(looped.num_stages)]
        again_s, freed = self._recomputation(seconds, layers, memory_bytes)
        self._rows_of_seconds(again_s, layers.seconds / seconds)
        self._rows_of_memory(freed, layers, memory_bytes)
        if looped.closed_form:
            self._rows_of_closed_form()
        else:
            self._rows_of_loops()

    def _others(self, seconds: float, ends: Ends | None) -> list[float]:
        """By stage the least seconds of what is no layer."""
        others_s = [0.0] * self._looped.num_stages
        if ends is not None:
            others_s[0] += ends.first_s / seconds
            others_s[-1] += ends.last_s / seconds
        return others_s

    def _variable(self, *, lower: float) -> int:
        return self._builder.variable(0.0, lower=lower, upper=INFINITY, integer=False)

    def least(self) -> float:
        solution = solve(self._builder.build())
        if solution.status == "infeasible":
            return INFINITY
        if solution.status != "optimal":
            raise InternalError(f"the relaxation of the stage program is {solution.status}")
        return min(solution.bound, solution.objective) * (1 - _TOLERANCE)

    def _variables(
        self, number: int, *, objective: float = 0.0, upper: float = INFINITY
    ) -> list[int]:
        return [
            self._builder.variable(objective, lower=0.0, upper=upper, integer=False)
            for _ in range(number)
        ]

    def _rows_of_seconds(self, again_s: Sequence[int], layers_s: float) -> None:
        """``ahead[k + 1] - ahead[k]`` is what stage ``k`` takes, with collectives beside."""
        moved_s, slowdown = self._moved_s, self._slowdown
        others_s, row = self._others_s, self._builder.row
        row(self._share, lower=1.0, upper=1.0)
        row(others_s, lower=max(0.0, 1.0 - layers_s))
        for k, (share, other, again) in enumerate(zip(self._share, others_s, again_s, strict=True)):
            takes = [self._ahead[k + 1], self._ahead[k], share, other, again]
            busy_s = layers_s + slowdown * moved_s
            row(takes, [1.0, -1.0, -busy_s, -1.0, -1.0], lower=0.0)
            if moved_s:
                busy_s = moved_s + slowdown * layers_s
                row(takes, [1.0, -1.0, -busy_s, -slowdown, -slowdown], lower=0.0)

    def _recomputation(
        self, seconds: float, layers: Layers, memory_bytes: float
    ) -> tuple[list[int], list[int]]:
        """By stage what recomputation takes, and the bytes that it frees."""
        again_s = self._variables(self._looped.num_stages)
        freed = self._variables(self._looped.num_stages)
        bytes_ = [b / memory_bytes for b, _ in layers.pieces]
        slopes = [s / seconds / b for (_, s), b in zip(layers.pieces, bytes_, strict=True)]
        corners = zip(
            accumulate(bytes_, initial=0.0),
            accumulate((s / seconds for _, s in layers.pieces), initial=0.0),
            strict=True,
        )
        lines = [(slope, s - slope * b) for slope, (b, s) in zip(slopes, corners, strict=False)]
        for share, again, free in zip(self._share, again_s, freed, strict=True):
            self._builder.row([free, share], [1.0, -sum(bytes_)], upper=0.0)
            for slope, intercept in lines:
                self._builder.row([again, free, share], [1.0, -slope, -intercept], lower=0.0)
        return again_s, freed

    def _rows_of_memory(self, freed: Sequence[int], layers: Layers, memory_bytes: float) -> None:
        counts, p = held(self._looped), self._looped.num_ranks
        saved, state = layers.saved_bytes / memory_bytes, layers.state_bytes / memory_bytes
        room = 1.0 + _TOLERANCE
        for rank in range(p):
            own = range(rank, self._looped.num_stages, p)
            self._builder.row(
                [*(self._share[k] for k in own), *(freed[k] for k in own)],
                [*(counts[k] * saved + state for k in own), *(-float(counts[k]) for k in own)],
                upper=room,
            )

    def _rows_of_closed_form(self) -> None:
        slowest, row = self._variables(1)[0], self._builder.row
        for k in range(self._looped.num_stages):
            row([self._ahead[k + 1], self._ahead[k], slowest], [1.0, -1.0, -1.0], upper=0.0)
        others = float(self._looped.num_micro_batches - 1)
        for share in self._share:
            columns = [self._step, self._ahead[-1], slowest, share]
            row(columns, [1.0, -1.0, -others, -self._step_s], lower=0.0)

    def _rows_of_loops(self) -> None:
        """``before[k]``: what the rank of stage ``k`` takes for its stages before ``k``.

        The first rank has the last backward of all, and then what follows it.
        """
        p, num_stages, ahead = self._looped.num_ranks, self._looped.num_stages, self._ahead
        before = [*self._variables(p, upper=0.0), *self._variables(num_stages)]
        m, q = float(self._looped.num_micro_batches), float(self._looped.group)
        for k in range(num_stages):
            with_own = [before[k + p], before[k], ahead[k + 1], ahead[k]]
            self._builder.row(with_own, [1.0, -1.0, -1.0, 1.0], lower=0.0, upper=0.0)
            columns = [self._step, ahead[k], before[num_stages + k % p], before[k]]
            self._builder.row(
                [*columns, *self._share[::p]],
                [1.0, -1.0, -m, q, *([-self._step_s] * len(self._share[::p]))],
                lower=0.0,
            )
        for rank in range(p):
            own = self._share[rank::p]
            self._builder.row(
                [self._step, before[num_stages + rank], *own],
                [1.0, -m, *([-self._step_s] * len(own))],
                lower=0.0,
            )
