"""Cutting a step where samples interact, if the user allows it.

Batch norm over eight samples is another function than batch norm over four, twice. So a model whose
samples interact is not cut into micro-batches, unless the user says that each may be a batch of its
own, as gradient accumulation in a plain training loop makes them: the program is then captured on
one of them, and the loss of a step is the mean of theirs.
"""

from __future__ import annotations

from autoshard.errors import OptionError
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.plan.local_program import coupling


def standalone_batches(program: Program, constraints: Constraints) -> int:
    """Into how many batches of their own the pins cut a step; 1 where samples do not interact.

    Raises:
        OptionError: the pins do not say how many, or the global batch cannot be cut so.
    """
    if not coupling(program):
        return 1
    size, dp = constraints.micro_batch_size, constraints.dp
    if size is None or dp is None:
        missing = " and ".join(n for n, v in (("micro_batch_size", size), ("dp", dp)) if v is None)
        raise OptionError(
            "allow_coupled_micro_batches=True changes the result by the size of the micro-batches, "
            f"so it is not for the planner to choose: pin {missing}, too"
        )
    if program.batch_size % (size * dp):
        raise OptionError(
            f"micro_batch_size={size} on dp={dp} ranks does not divide the global batch of "
            f"{program.batch_size}: change one of them"
        )
    return program.batch_size // (size * dp)
