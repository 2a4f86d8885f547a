"""Parameters, gradients and optimizer state per rank, by data-parallel mode.

ZeRO's stages (Rajbhandari et al. 2020) as the runtime keeps them: ``ddp`` holds everything whole;
``zero1``, ``zero2`` and ``zero3`` keep parameters at rest sharded over the data-parallel ranks
(FSDP2), so the stages differ in what is whole *during* a step:

| mode | parameters in a step | gradients | optimizer |
|---|---|---|---|
| ``ddp`` | whole | whole | whole |
| ``zero1`` | shard and whole | whole, accumulated over micro-batches; shard | shard |
| ``zero2`` | shard and whole | shard; whole for two units, on their way to be reduced | shard |
| ``zero3`` | shard; whole for two units, one used and one prefetched | as ``zero2`` | shard |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoshard.errors import OptionError
from autoshard.ir import TensorType
from autoshard.placement.state import local_size
from autoshard.software import OWN, Software

OPTIMIZER_STATES: dict[str, int] = {
    "sgd": 0, "sgd-momentum": 1, "nesterov": 1, "adagrad": 1, "rmsprop": 1,
    "adam": 2, "adamw": 2, "radam": 2, "nadam": 2, "adamax": 2,
}  # fmt: skip
"""Tensors of a parameter's shape and dtype that an optimizer keeps per parameter."""
UNKNOWN_OPTIMIZER_STATES = 2
"""Of a user's own optimizer, which cannot be asked without running it."""
DATA_PARALLEL = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes on one rank at the peak of a step.

    Attributes:
        parameters: at rest, plus what stays whole during the step.
        gradients: accumulated over the step.
        optimizer: the optimizer's tensors.
        transient: whole parameters or gradients of the units in use.
    """

    parameters: int
    gradients: int
    optimizer: int
    transient: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.transient

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            parameters=self.parameters + other.parameters,
            gradients=self.gradients + other.gradients,
            optimizer=self.optimizer + other.optimizer,
            transient=self.transient + other.transient,
        )


def shard_bytes(types: Iterable[TensorType], dp: int) -> int:
    """What FSDP2 keeps of parameters on a rank: dim 0 in ``ceil(size / dp)`` rows, padded."""
    total = 0
    for kind in types:
        if kind.ndim == 0:
            total += kind.nbytes
        else:
            rows = max(1, kind.shape[0])
            total += kind.nbytes // rows * local_size(kind.shape[0], dp)
    return total


def state_bytes(
    parameters: Sequence[TensorType],
    *,
    data_parallel: str,
    dp: int,
    optimizer: str,
    unit_bytes: int | None = None,
    num_micro_batches: int = 1,
    software: Software = OWN,
) -> StateBytes:
    """State of one rank's trainable parameters.

    Args:
        parameters: their types, local on the tensor axis, as stored (float32 under ``bf16``
            precision: casts are ops of the graph and their results activations).
        data_parallel: ``ddp``, ``zero1``, ``zero2`` or ``zero3``.
        dp: data-parallel ranks.
        optimizer: a name of ``OPTIMIZER_STATES`` or any other for a user's own.
        unit_bytes: parameters that are gathered or reduced at once (the largest layer); ``None``:
            all.
        num_micro_batches: with one, ``zero1`` reduces its gradients as ``zero2`` does.
        software: whose precisions; with a master copy, that is what a shard at rest consists of.

    Raises:
        OptionError: for another mode or a ``dp`` below 1.
    """
    if data_parallel not in DATA_PARALLEL:
        raise OptionError(
            f"data_parallel expects one of {', '.join(DATA_PARALLEL)} but got {data_parallel!r}"
        )
    if dp < 1:
        raise OptionError(f"dp expects a positive number of ranks but got {dp!r}")
    whole = sum(kind.nbytes for kind in parameters)
    gradients = _as(software.gradient_bytes, parameters)
    copies = OPTIMIZER_STATES.get(optimizer.lower(), UNKNOWN_OPTIMIZER_STATES)
    states = copies * _as(software.state_bytes, parameters)
    states += _as(software.master_bytes, parameters)
    if data_parallel == "ddp" or dp == 1:
        return StateBytes(parameters=whole, gradients=gradients, optimizer=states, transient=0)
    at_rest = shard_bytes(parameters, dp)
    share = at_rest / whole if whole else 1.0
    if software.master_bytes:
        at_rest = 0
    units = min(whole, 2 * (whole if unit_bytes is None else unit_bytes))
    gradient_units = round(units * gradients / whole) if whole else 0
    gradients_whole = data_parallel == "zero1" and num_micro_batches > 1
    shard = round(share * gradients)
    return StateBytes(
        parameters=at_rest if data_parallel == "zero3" else at_rest + whole,
        gradients=shard + gradients if gradients_whole else shard,
        optimizer=round(share * states),
        transient=(units if data_parallel == "zero3" else 0)
        + (0 if gradients_whole else gradient_units),
    )


def _as(num_bytes: int | None, parameters: Iterable[TensorType]) -> int:
    """Bytes of tensors like these with so many bytes per element; ``None``: as they are."""
    if num_bytes is None:
        return sum(kind.nbytes for kind in parameters)
    return sum(kind.numel for kind in parameters) * num_bytes
