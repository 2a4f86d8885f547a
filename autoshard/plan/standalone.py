"""Cutting a step where samples interact, if the user allows it.

Batch norm over eight samples is another function than batch norm over four, twice. So a model whose
samples interact is not cut into micro-batches, unless the user says that each may be a batch of its
own, as gradient accumulation in a plain training loop makes them: the program is then captured on
one of them, and the loss of a step is the mean of theirs.
"""

from __future__ import annotations

import math

from autoshard.errors import OptionError
from autoshard.ir import Program
from autoshard.options import ASYNCHRONOUS, Constraints
from autoshard.plan.local_program import coupling


def standalone_batches(program: Program, constraints: Constraints, world_size: int) -> int:
    """Into how many batches of their own the pins cut a step; 1 where samples do not interact.

    Under ``pipedream`` and asynchronous data parallelism each minibatch is a batch of its own, with
    an update of its own.

    Raises:
        OptionError: the pins do not say how many, or the global batch cannot be cut so.
    """
    if constraints.data_parallel in ASYNCHRONOUS or constraints.schedule == "pipedream":
        return _minibatches(program.batch_size, constraints, world_size)
    if not constraints.allow_coupled_micro_batches or not coupling(program):
        return 1
    size, dp = constraints.micro_batch_size, 1 if constraints.replicated else constraints.dp
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


def _minibatches(samples: int, constraints: Constraints, world_size: int) -> int:
    """How many minibatches a step feeds: one per rank of the widest stage if the pins do not say.

    Raises:
        OptionError: they do not divide the global batch.
    """
    asynchronous = constraints.data_parallel in ASYNCHRONOUS
    replicas = constraints.replicas or ((world_size,) if asynchronous else (1,))
    count = math.lcm(*replicas)
    if constraints.micro_batch_size is not None and samples % constraints.micro_batch_size == 0:
        count = samples // constraints.micro_batch_size
    size = constraints.micro_batch_size or samples // count
    wrong = asynchronous and count != world_size
    if samples != size * count or any(count % r for r in replicas) or wrong:
        raise OptionError(
            f"replicas {replicas} take minibatches in turn, but a global batch of {samples} "
            f"samples with micro_batch_size={constraints.micro_batch_size} gives no number of them "
            f"that each can share{' (one per worker)' if asynchronous else ''}: choose a multiple "
            f"of {math.lcm(*replicas)} minibatches"
        )
    return count
