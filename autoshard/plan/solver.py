"""Integer programs as arrays, and the one place that knows which solver solves them.

A :class:`Milp` is ``min objective @ x`` subject to ``row_lower <= A x <= row_upper`` and
``lower <= x <= upper`` with some variables integer. :class:`Builder` collects one;
:func:`solve` hands it to HiGHS through OR-Tools' MathOpt as a protocol message made from arrays,
because for programs of this size building them expression by expression takes longer than
solving them.

The programs mix microseconds with minutes and bytes with terabytes, while a solver's tolerances
are absolute. So the objective and every row are scaled by powers of two first (which changes no
digit), and results are scaled back.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from autoshard.errors import InternalError
from autoshard.plan.quiet import without_stdout

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Status = Literal["optimal", "feasible", "infeasible", "unknown"]
"""``feasible`` and ``unknown``: the time limit ended the search, with or without a solution."""

INFINITY = float("inf")
_LARGEST_COST = 2.0**14
_LARGEST_COEFFICIENT = 2.0**10
_SEED = 1
_INTEGRAL = 1e-6
"""How far from an integer a value may be to count as one; that of the solver, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Milp:
    """A mixed-integer linear program; the matrix has one ``coefficients`` entry per non-zero.

    Attributes:
        objective, lower, upper, integer: one entry per variable.
        rows, columns, coefficients: the non-zeros, sorted by row then column, no pair twice.
        row_lower, row_upper: one entry per constraint.
    """

    objective: Floats
    lower: Floats
    upper: Floats
    integer: npt.NDArray[np.bool_]
    rows: Integers
    columns: Integers
    coefficients: Floats
    row_lower: Floats
    row_upper: Floats

    def violation(self, values: Floats) -> float:
        """By how much ``values`` break the worst row, relative to that row's largest term."""
        activity = np.zeros(len(self.row_lower))
        np.add.at(activity, self.rows, self.coefficients * values[self.columns])
        size = np.ones(len(self.row_lower))
        np.maximum.at(size, self.rows, np.abs(self.coefficients))
        excess = np.maximum(self.row_lower - activity, activity - self.row_upper) / size
        return max(0.0, float(excess.max(initial=0.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What the solver found.

    Attributes:
        objective: of ``values``; infinite if there are none.
        bound: no solution is better than this.
        values: one per variable, integers exactly integral; empty if none was found.
    """

    status: Status
    objective: float
    bound: float
    values: Floats

    @property
    def found(self) -> bool:
        return self.status in {"optimal", "feasible"}

    @property
    def gap(self) -> float:
        """How far ``objective`` may be above the optimum, relative to ``objective``."""
        if not self.found:
            return INFINITY
        return (self.objective - self.bound) / max(abs(self.objective), 1e-300)


@dataclass(slots=True)
class Builder:
    """Collects variables and rows in plain lists; :meth:`build` makes the arrays."""

    _objective: list[float] = field(default_factory=list)
    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _integer: list[bool] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)
    _columns: list[int] = field(default_factory=list)
    _coefficients: list[float] = field(default_factory=list)
    _row_lower: list[float] = field(default_factory=list)
    _row_upper: list[float] = field(default_factory=list)

    def variable(
        self,
        cost: float = 0.0,
        *,
        lower: float = 0.0,
        upper: float = 1.0,
        integer: bool = True,
    ) -> int:
        """A new variable's index; binary unless said otherwise."""
        self._objective.append(cost)
        self._lower.append(lower)
        self._upper.append(upper)
        self._integer.append(integer)
        return len(self._objective) - 1

    def add_cost(self, variable: int, cost: float) -> None:
        self._objective[variable] += cost

    def set_costs(self, costs: dict[int, float]) -> None:
        """Replace the whole objective."""
        self._objective = [0.0] * len(self._objective)
        for variable, cost in costs.items():
            self._objective[variable] = cost

    def fix(self, variable: int, value: float) -> None:
        self._lower[variable] = self._upper[variable] = value

    def row(
        self,
        columns: Sequence[int],
        coefficients: Sequence[float] | float = 1.0,
        *,
        lower: float = -INFINITY,
        upper: float = INFINITY,
    ) -> int:
        """``lower <= sum(coefficients * columns) <= upper``; a column may come more than once."""
        index = len(self._row_lower)
        self._rows.extend([index] * len(columns))
        self._columns.extend(columns)
        if isinstance(coefficients, (int, float)):
            self._coefficients.extend([float(coefficients)] * len(columns))
        else:
            self._coefficients.extend(coefficients)
        self._row_lower.append(lower)
        self._row_upper.append(upper)
        return index

    def build(self) -> Milp:
        rows = np.array(self._rows, dtype=np.int64)
        columns = np.array(self._columns, dtype=np.int64)
        coefficients = np.array(self._coefficients, dtype=np.float64)
        keys, inverse = np.unique(rows * (len(self._objective) + 1) + columns, return_inverse=True)
        merged = np.bincount(inverse, weights=coefficients, minlength=len(keys))
        nonzero = merged != 0.0
        keys, merged = keys[nonzero], merged[nonzero]
        return Milp(
            objective=np.array(self._objective, dtype=np.float64),
            lower=np.array(self._lower, dtype=np.float64),
            upper=np.array(self._upper, dtype=np.float64),
            integer=np.array(self._integer, dtype=np.bool_),
            rows=keys // (len(self._objective) + 1),
            columns=keys % (len(self._objective) + 1),
            coefficients=merged,
            row_lower=np.array(self._row_lower, dtype=np.float64),
            row_upper=np.array(self._row_upper, dtype=np.float64),
        )


def solve(
    milp: Milp, *, time_limit_s: float = 60.0, gap: float = 1e-6, relax_first: bool = False
) -> Solution:
    """The best solution within ``gap`` (relative) of the optimum.

    Single-threaded and deterministic as long as the time limit does not strike. That a program
    is infeasible is a result, not an error.

    Args:
        relax_first: try without integrality before: if the optimum of that is integral, it is the
            optimum. Faster for programs whose relaxation is nearly always integral.

    Raises:
        InternalError: if the program is unbounded or malformed, or the solver's answer breaks a
            constraint.
    """
    if not len(milp.objective):
        slack = np.maximum(milp.row_lower, -milp.row_upper)
        return _nothing("infeasible") if (slack > 0).any() else _found("optimal", milp, [], 0.0)
    cost_scale = _power_of_two(_LARGEST_COST / max(float(np.abs(milp.objective).max()), 1e-300))
    proto = _proto(milp, cost_scale)
    if relax_first:
        relaxed = _relaxed(milp, proto, cost_scale, time_limit_s)
        if relaxed is not None:
            return relaxed
    result = _highs(proto, time_limit_s, gap)
    status = _status(result)
    if status in {"infeasible", "unknown"}:
        return _nothing(status)
    bound = float(result.termination.objective_bounds.dual_bound) / cost_scale
    found = result.solutions[0].primal_solution.variable_values
    return _found(status, milp, np.array(found.values, dtype=np.float64), bound)


def _relaxed(milp: Milp, proto: Any, cost_scale: float, time_limit_s: float) -> Solution | None:
    """The optimum if that of the linear relaxation is integral, else ``None``."""
    integers = list(proto.variables.integers)
    proto.variables.integers[:] = [False] * len(integers)
    try:
        result = _highs(proto, time_limit_s, 0.0)
    finally:
        proto.variables.integers[:] = integers
    if _status(result) != "optimal":
        return None
    values = np.array(result.solutions[0].primal_solution.variable_values.values, dtype=np.float64)
    if np.abs(values - np.round(values))[milp.integer].max(initial=0.0) > _INTEGRAL:
        return None
    bound = float(result.termination.objective_bounds.dual_bound) / cost_scale
    return _found("optimal", milp, values, bound)


def _found(status: Status, milp: Milp, values: Any, bound: float) -> Solution:
    exact = np.clip(np.asarray(values, dtype=np.float64), milp.lower, milp.upper)
    exact = np.where(milp.integer, np.round(exact), exact)
    if milp.violation(exact) > 1e-4:
        raise InternalError(f"solver: the solution breaks a row by {milp.violation(exact):.2e}")
    objective = float(milp.objective @ exact)
    return Solution(status=status, objective=objective, bound=min(bound, objective), values=exact)


def _nothing(status: Status) -> Solution:
    bound = INFINITY if status == "infeasible" else -INFINITY
    return Solution(status=status, objective=INFINITY, bound=bound, values=np.zeros(0))


def _power_of_two(scale: float) -> float:
    return float(2.0 ** np.floor(np.log2(scale)))


def _proto(milp: Milp, cost_scale: float) -> Any:
    """The program as MathOpt's message, scaled.

    Rows whose largest coefficient lies within ``2**-10 .. 2**10`` stay as they are.
    """
    from ortools.math_opt import model_pb2

    num_variables, num_rows = len(milp.objective), len(milp.row_lower)
    largest = np.full(num_rows, 0.0)
    np.maximum.at(largest, milp.rows, np.abs(milp.coefficients))
    largest[largest == 0.0] = 1.0
    extreme = (largest > _LARGEST_COEFFICIENT) | (largest < 1 / _LARGEST_COEFFICIENT)
    exponent = np.floor(np.log2(_LARGEST_COEFFICIENT / largest))
    scale = np.where(extreme, np.exp2(exponent), 1.0)

    proto = model_pb2.ModelProto()
    variables = proto.variables
    variables.ids.extend(range(num_variables))
    variables.lower_bounds.extend(milp.lower.tolist())
    variables.upper_bounds.extend(milp.upper.tolist())
    variables.integers.extend(milp.integer.tolist())
    costs = proto.objective.linear_coefficients
    used = np.flatnonzero(milp.objective)
    costs.ids.extend(used.tolist())
    costs.values.extend((milp.objective[used] * cost_scale).tolist())
    constraints = proto.linear_constraints
    constraints.ids.extend(range(num_rows))
    constraints.lower_bounds.extend((milp.row_lower * scale).tolist())
    constraints.upper_bounds.extend((milp.row_upper * scale).tolist())
    matrix = proto.linear_constraint_matrix
    matrix.row_ids.extend(milp.rows.tolist())
    matrix.column_ids.extend(milp.columns.tolist())
    matrix.coefficients.extend((milp.coefficients * scale[milp.rows]).tolist())
    return proto


def _highs(proto: Any, time_limit_s: float, gap: float) -> Any:
    """MathOpt's own result message; the high-level result is slower to parse."""
    from ortools.math_opt.core.python import solver
    from ortools.math_opt.python import mathopt
    from ortools.math_opt.solvers import highs_pb2

    parameters = mathopt.SolveParameters(
        time_limit=datetime.timedelta(seconds=time_limit_s),
        relative_gap_tolerance=gap,
        absolute_gap_tolerance=0.0,
        random_seed=_SEED,
        highs=highs_pb2.HighsOptionsProto(string_options={"parallel": "off"}),
    )
    try:
        with without_stdout():
            return solver.solve(
                proto,
                mathopt.SolverType.HIGHS.value,
                mathopt.StreamableSolverInitArguments().to_proto(),
                parameters.to_proto(),
                mathopt.ModelSolveParameters().to_proto(),
                None,
                mathopt.CallbackRegistration().to_proto(),
                None,
                None,
            )
    except Exception as error:
        raise InternalError(f"solver: HiGHS refused the program: {error}") from error


def _status(result: Any) -> Status:
    from ortools.math_opt import result_pb2

    reason = result.termination.reason
    if reason == result_pb2.TERMINATION_REASON_OPTIMAL:
        return "optimal"
    if reason == result_pb2.TERMINATION_REASON_INFEASIBLE:
        return "infeasible"
    if reason == result_pb2.TERMINATION_REASON_FEASIBLE and result.solutions:
        return "feasible"
    if reason in {
        result_pb2.TERMINATION_REASON_NO_SOLUTION_FOUND,
        result_pb2.TERMINATION_REASON_FEASIBLE,
    }:
        return "unknown"
    if reason == result_pb2.TERMINATION_REASON_INFEASIBLE_OR_UNBOUNDED:
        # Every program here has a bounded objective, so it is the former.
        return "infeasible"
    raise InternalError(f"solver: HiGHS ended with {result.termination}")
