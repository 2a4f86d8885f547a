"""Optimizers by name, and the global gradient norm.

An optimizer works on what each rank holds of the parameters, as plain tensors. That is exact for
every optimizer that treats elements alike and apart (Adam and its kin, SGD, RMSprop, Adagrad);
those that look at a whole matrix are refused where a parameter is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoshard.errors import OptionError

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
OptimizerChoice = str | OptimizerFactory


def _fused(
    kind: Callable[..., Optimizer], *, on: tuple[str, ...], **options: Any
) -> OptimizerFactory:
    """An optimizer that reads and writes memory once per step where torch has such a kernel.

    The others pass over the parameters once per operation, on a CPU several times as long.

    Args:
        on: the kinds of device that the kernel exists for.
    """

    def made(parameters: list[nn.Parameter]) -> Optimizer:
        fits = all(p.is_floating_point() and p.device.type in on for p in parameters)
        return kind(parameters, fused=fits or None, **options)

    return made


_ANYWHERE = ("cpu", "cuda")
NAMED: dict[str, OptimizerFactory] = {
    "adamw": _fused(torch.optim.AdamW, on=_ANYWHERE),
    "adam": _fused(torch.optim.Adam, on=_ANYWHERE),
    "sgd": _fused(torch.optim.SGD, on=_ANYWHERE),
    "sgd-momentum": _fused(torch.optim.SGD, on=_ANYWHERE, momentum=0.9),
    "nesterov": _fused(torch.optim.SGD, on=_ANYWHERE, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": _fused(torch.optim.Adagrad, on=("cpu",)),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
}
"""Optimizers with torch's own default hyperparameters; the momentum ones use 0.9."""

_LOOK_AT_WHOLE_TENSORS = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


def factory(optimizer: OptimizerChoice) -> OptimizerFactory:
    """What makes the optimizer from a list of parameters.

    Raises:
        OptionError: for an unknown name.
    """
    if callable(optimizer):
        return optimizer
    if optimizer not in NAMED:
        raise OptionError(
            f"expected optimizer to be one of {', '.join(NAMED)} or a callable "
            f"(parameters -> torch.optim.Optimizer) but got {optimizer!r}; choose one of them"
        )
    return NAMED[optimizer]


def optimizer_name(optimizer: OptimizerChoice) -> str:
    """What a plan calls the optimizer.

    Raises:
        OptionError: for an unknown name.
    """
    made = factory(optimizer)
    if isinstance(optimizer, str):
        return optimizer
    return str(getattr(made, "__qualname__", type(made).__name__))


def build(
    optimizer: OptimizerChoice, parameters: Sequence[nn.Parameter], *, split: bool
) -> Optimizer:
    """The optimizer of one rank.

    Args:
        parameters: the local parts of the trainable parameters; a stage may have none.
        split: some parameter is held in parts.

    Raises:
        OptionError: for an unknown name, a callable that returns no optimizer, or an optimizer
            that needs whole tensors while some are split.
    """
    given = list(parameters)
    if not given:  # a stage without weights; torch refuses an empty list
        given = [nn.Parameter(torch.empty(0))]
    made = factory(optimizer)(given)
    if not isinstance(made, Optimizer):
        raise OptionError(
            f"expected optimizer(parameters) to return a torch.optim.Optimizer but got "
            f"{type(made).__name__}; return the optimizer"
        )
    known = {id(p) for p in given}
    if any(id(p) not in known for group in made.param_groups for p in group["params"]):
        raise OptionError(
            "expected an optimizer over the parameters it was given but got one over others; "
            "use the argument of the callable, not the parameters of the model"
        )
    if split and type(made).__name__ in _LOOK_AT_WHOLE_TENSORS:
        raise OptionError(
            f"expected an optimizer that treats elements apart but got {type(made).__name__}, "
            "which needs whole tensors, and this plan splits parameters; "
            "use adamw, or pin tp=1 and data_parallel='ddp'"
        )
    return made


def make_scheduler(
    scheduler: Callable[[Optimizer], LRScheduler],
    optimizer: Optimizer,
    state: Mapping[str, Any] | None,
) -> LRScheduler:
    """A learning-rate scheduler, going on from ``state`` if there is one.

    With a state, rates stay what they are until the next step.
    """
    groups = optimizer.param_groups
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    made = scheduler(optimizer)
    if state is not None:
        made.load_state_dict(dict(state))
        for group, before in zip(groups, options, strict=True):
            group.update(before)  # making a scheduler sets the rates of step 0
    return made


def state_bytes_per_parameter(optimizer: OptimizerChoice, itemsize: int = 4) -> int:
    """Bytes of optimizer state per parameter element, found out by one step on a small tensor.

    Args:
        itemsize: bytes per element of the parameters (2, 4 or 8).

    Raises:
        OptionError: as :func:`build`.
    """
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    with torch.random.fork_rng(devices=[]):
        probe = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
        probe.grad = torch.ones_like(probe)
        made = build(optimizer, [probe], split=False)
        made.step()
    state = made.state.get(probe, {})
    nbytes = sum(t.nbytes for t in state.values() if isinstance(t, Tensor) and t.ndim)
    return -(-nbytes // probe.numel())


def squared_norm(gradients: Iterable[Tensor]) -> float:
    """The sum of squares of all elements, of one tensor in float32 at least, of all in float64."""
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).double()
        for g in gradients
    ]
    return float(torch.stack(norms).square().sum()) if norms else 0.0


def clip_coefficient(total_norm: float, max_norm: float) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies gradients with."""
    return min(1.0, max_norm / (total_norm + 1e-6))
