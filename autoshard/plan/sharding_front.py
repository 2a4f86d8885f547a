"""The shardings of one axis that are worth trying: by micro-batches and by price of memory.

The fastest sharding is not always the one of the fastest plan: where it leaves no room, its plan
recomputes, and one that takes longer but holds less may win. So each problem is also solved with a
price on bytes: seconds per byte, from nothing to far above what recompute charges. The minima of
``seconds + price * bytes`` are the convex front of both.

[Note: parametric reuse] An assignment takes ``a + s / m + price * b``: seconds of a micro-batch,
sums once per step over ``m`` turns, bytes. Each is linear in ``(1 / m, price)`` with coefficients
that are not negative, so their minimum is concave and does not fall: what was proven at two points
bounds it from below on the line between them, and what was proven at one point bounds it wherever
both parameters are no less. Where the best assignment known attains such a bound, it is optimal,
and nothing is solved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from autoshard.plan.plan import Assignment
from autoshard.plan.sharding import evaluate
from autoshard.plan.sharding_problem import ShardingProblem
from autoshard.plan.sharding_program import ShardingProgram, formulate, tensor_of
from autoshard.plan.solver import Floats, Milp, solve

PRICES = (0.0, 0.1, 1.0, 10.0)
"""Of a byte, as multiples of what full recompute takes per byte that it frees."""
TOLERANCE = 1e-6
"""Relative; the gap to which programs are solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """An assignment of every class.

    Attributes:
        seconds: of one micro-batch through all segments, with the step's share of what is summed
            over the axis once per step; no assignment takes less if the price was 0.
        key: equal for equal assignments.
    """

    assignments: Mapping[str, Assignment]
    seconds: float
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """An assignment: seconds per micro-batch, seconds per step, bytes."""

    assignments: Mapping[str, Assignment]
    key: str
    micro_batch_s: float
    step_s: float
    num_bytes: float

    def seconds(self, share: float) -> float:
        return self.micro_batch_s + share * self.step_s


@dataclass(frozen=True, slots=True)
class _Proof:
    """No assignment has less than ``least`` where a micro-batch bears ``share`` of a step."""

    share: float
    price: float
    least: float


class Shardings:
    """The shardings of one program on one axis, by micro-batches and price of memory.

    The program is formulated once; only its objective differs between solves, of which there are
    as few as the note on parametric reuse allows.
    """

    def __init__(self, problem: ShardingProblem) -> None:
        if problem.num_micro_batches != 1:
            raise ValueError("the problem's sums per step must be those of one micro-batch")
        self._program = formulate(problem, ("activation_bytes",))
        self._milp: Milp = self._program.builder.build()
        self._step_s = _step_seconds(self._program)
        self._bytes = _bytes(self._program)
        self._known: dict[str, _Known] = {}
        self._proofs: list[_Proof] = []
        self.num_solved = 0

    def least_s(self) -> float:
        """No assignment takes less, over however many micro-batches; infinite if there is none."""
        proven = [p.least for p in self._proofs if p.share == p.price == 0.0]
        return proven[0] if proven else self._solve(0.0, 0.0)

    def at(self, num_micro_batches: int, price: float = 0.0) -> Sharding | None:
        """The least ``seconds + price * bytes``; ``None`` if the pins leave nothing.

        Args:
            num_micro_batches: over which sums once per step are spread. In a pipeline of ``p``
                stages with ``m`` micro-batches that is ``m + p - 1``: the step takes
                ``(m + p - 1) / p`` times the seconds of a micro-batch, and the sums of one stage.
        """
        share = 1 / num_micro_batches
        least = self._least(share, price)
        if not self._attained(least, share, price):
            least = self._solve(share, price)
        if not self._known or least == float("inf"):
            return None
        best = self._best(share, price)
        seconds = best.seconds(share)
        return Sharding(
            assignments=best.assignments, key=best.key,
            seconds=seconds if price else min(seconds, least),
        )  # fmt: skip

    def _best(self, share: float, price: float) -> _Known:
        return min(
            self._known.values(), key=lambda k: (k.seconds(share) + price * k.num_bytes, k.key)
        )

    def _attained(self, least: float, share: float, price: float) -> bool:
        """Whether an assignment that is known is as good as any can be."""
        if not self._known:
            return least == float("inf")
        best = self._best(share, price)
        return best.seconds(share) + price * best.num_bytes <= least * (1 + TOLERANCE)

    def _least(self, share: float, price: float) -> float:
        """What the proofs so far say of a point; 0 if nothing."""
        below = [p.least for p in self._proofs if p.share <= share and p.price <= price]
        lines = (
            _between(p, q, share, price) for p in self._proofs for q in self._proofs if p is not q
        )
        return max([0.0, *below, *lines])

    def _solve(self, share: float, price: float) -> float:
        """Add the optimum of a point to what is known; what it proves."""
        # Every coefficient of the objective has the whole of the step's sums in it.
        seconds = self._milp.objective + self._step_s * (share - 1)
        milp = replace(self._milp, objective=seconds + price * self._bytes)
        solution = solve(milp, gap=TOLERANCE, relax_first=True)
        self.num_solved += 1
        if solution.found:
            assignments = self._program.assignments(solution.values.tolist())
            key = repr(sorted(assignments.items()))
            step_s = float(self._step_s @ solution.values)
            self._known[key] = _Known(
                assignments=assignments, key=key, step_s=step_s,
                micro_batch_s=float(self._milp.objective @ solution.values) - step_s,
                num_bytes=evaluate(self._program.problem, assignments).total_bytes,
            )  # fmt: skip
        self._proofs.append(_Proof(share, price, solution.bound))
        return solution.bound


def _between(p: _Proof, q: _Proof, share: float, price: float) -> float:
    """What two proofs say of a point on the line between them, along one parameter."""
    if p.price == q.price == price and p.share < share < q.share:
        weight = (share - p.share) / (q.share - p.share)
    elif p.share == q.share == share and p.price < price < q.price:
        weight = (price - p.price) / (q.price - p.price)
    else:
        return 0.0
    return (1 - weight) * p.least + weight * q.least


def _step_seconds(program: ShardingProgram) -> Floats:
    """By variable: the seconds that its parameter state takes once per step."""
    found = np.zeros(len(program.builder.build().objective))
    for group, options in zip(program.problem.parameters, program.rest, strict=True):
        value = tensor_of(program.problem, group)
        for state, variable in options.items():
            found[variable] = group.count * program.problem.parameter_step_s(value, state)
    return found


def _bytes(program: ShardingProgram) -> Floats:
    """By variable: the bytes that it stands for."""
    found = np.zeros(len(program.builder.build().objective))
    for variable, size in program.budget_terms["total_bytes"]:
        found[variable] += size
    return found
