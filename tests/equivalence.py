"""The distributed run against the plain model on one process: loss, gradients, state.

:func:`reference` trains the plain model; :func:`distributed` trains the same model under a plan on
the ranks of a pool; :func:`difference` says how far apart the two are. Every rank has other
samples, since each takes its own part of the global batch.

Many models of Hugging Face cast parts to float32, whatever the dtype of their parameters; there
two correct runs differ by float32's rounding, behind which an error could hide. :func:`uncast`
lifts these casts, so that such models too are compared to the last digits of float64.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import zoo
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autoshard.capture import capture
from autoshard.capture.batch import layout_of
from autoshard.capture.export import loss_of as capture_loss
from autoshard.cluster import Cluster, Device, Tier
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.parallel import Parallel
from autoshard.plan import files
from autoshard.plan.plan import Plan
from autoshard.plan.search import find_plan
from autoshard.schedules import SCHEDULES
from autoshard.versioned import STALE

STEPS = 3

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "dp=4": {"dp": 4},
    "tp=4": {"tp": 4},
    "pp=4": {"pp": 4},
    "dp=2 tp=2": {"dp": 2, "tp": 2},
    "pp=2 tp=2": {"pp": 2, "tp": 2},
    "dp=2 pp=2": {"dp": 2, "pp": 2},
    "zero1": {"dp": 4, "data_parallel": "zero1"},
    "zero2": {"dp": 4, "data_parallel": "zero2"},
    "zero3": {"dp": 4, "data_parallel": "zero3"},
    "full recompute": {"dp": 2, "tp": 2, "recompute": "full"},
    "selective recompute": {"dp": 2, "pp": 2, "recompute": "selective"},
    "gpipe": {"dp": 2, "pp": 2, "schedule": "gpipe", "micro_batch_size": 1},
}
"""What is pinned in each column of the equivalence table, on 4 ranks."""

SCHEDULE_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    name: {"pp": 2, "dp": 2, "schedule": name, "virtual_stages": 2}
    if kind.least_virtual > 1
    else {"pp": 4, "schedule": name}
    for name, kind in SCHEDULES.items()
    if name not in ("none", *STALE)
}
"""Every synchronous schedule: four stages on as many ranks, or on two with two chunks each."""

FAST_LINKS = Cluster(
    name="links faster than compute",
    device=Device(
        name="slow device", memory_bytes=2**34, bytes_per_s=1e9, matmul_efficiency=1.0,
        flops_per_s={"f32": 1e9, "f64": 1e9, "bf16": 1e9}, memory_efficiency=1.0, launch_s=0.0,
    ),
    tiers=(Tier(name="fabric", size=0, bytes_per_s=1e12, latency_s=1e-9),),
)  # fmt: skip
"""Splitting always pays here, so that pins such as tp=4 lead to plans that split."""


@dataclass(frozen=True)
class Trained:
    """What training left: per step the loss and gradients, and the final state."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Largest differences between two runs, and the tensor where each occurs."""

    loss: float
    gradient: float
    state: float
    where: Mapping[str, str]

    @property
    def worst(self) -> float:
        return max(self.loss, self.gradient, self.state)


SMALL = 1e-3
"""Gradients that are smaller than this everywhere are compared as if one element had this size."""


class _Uncast(TorchFunctionMode):
    """Casts of float64 tensors to float32 do nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            if func is Tensor.float:
                return first
            if func is Tensor.to or kwargs.get("dtype") is torch.float32:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in kwargs.items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def uncast(active: bool = True) -> Iterator[None]:
    """The model keeps float64 throughout."""
    with _Uncast() if active else contextlib.nullcontext():
        yield


Source = str | Callable[[torch.dtype], zoo.Built]
"""A model of the zoo, or a function of a module that builds one."""


def build(source: Source, dtype: torch.dtype) -> zoo.Built:
    return zoo.build(source, dtype) if isinstance(source, str) else source(dtype)


def batches(batch: Any, steps: int = STEPS) -> list[Any]:
    """Other data for every step: the example's samples with their positions rotated."""

    def rolled(value: Any, k: int) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return value.roll(k, -1 if value.ndim > 1 else 0)

    if isinstance(batch, Mapping):
        return [{n: rolled(v, k) for n, v in batch.items()} for k in range(steps)]
    return [tuple(rolled(v, k) for v in batch) for k in range(steps)]


def loss_of(model: torch.nn.Module, batch: Any, loss_fn: Any) -> Tensor:
    layout = layout_of(model, batch, loss_fn, None)
    args, kwargs = layout.arguments(batch)
    return capture_loss(model(*args, **kwargs), batch, loss_fn)


def reference(
    source: Source, dtype: torch.dtype, *, lifted: bool = False, steps: int = STEPS
) -> Trained:
    """Plain training on one process with torch's default AdamW."""
    model, batch, loss_fn = build(source, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    losses, gradients = [], []
    for data in batches(batch, steps):
        optimizer.zero_grad()
        with uncast(lifted):
            loss = loss_of(model, data, loss_fn)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        optimizer.step()
    return Trained(losses, gradients, {n: t.clone() for n, t in model.state_dict().items()})


@functools.cache
def program_of(source: Source, dtype: torch.dtype, lifted: bool = False) -> Program:
    model, batch, loss_fn = build(source, dtype)
    name = source if isinstance(source, str) else source.__name__
    with uncast(lifted):
        return capture(model, example_inputs=batch, loss_fn=loss_fn, model_name=name)


def casts(program: Program) -> bool:
    """A float64 model that computes something with a gradient in less."""
    values = [v for layer in program.classes for v in layer.graph.values.values()]
    return any(v.type.differentiable and v.type.dtype != torch.float64 for v in values)


def plan_of(
    program: Program, world_size: int, pins: Mapping[str, Any], cluster: Cluster = FAST_LINKS
) -> Plan:
    return find_plan(
        program, cluster=cluster, world_size=world_size, constraints=Constraints.of(pins)
    )


def encoded(plan: Plan) -> bytes:
    """A plan as it passes to other processes."""
    return msgspec.json.encode(plan)


def distributed(
    source: Source, dtype: torch.dtype, program: Program, plan_text: bytes, steps: int = STEPS
) -> Trained | None:
    """Train under a plan; runs on every rank, and rank 0 returns whole tensors."""
    plan = files.loads(plan_text)
    model, batch, _ = build(source, dtype)
    parallel = Parallel(model, program, plan, optimizer="adamw")
    losses, gradients = [], []
    for data in batches(batch, steps):
        losses.append(parallel.step(parallel.local_batch(data)))
        gradients.append(parallel.full_grads())
    state = parallel.full_state_dict()
    if torch.distributed.get_rank():
        return None
    return Trained(losses, gradients, state)


def difference(one: Trained, other: Trained, *, rounded: bool = False) -> Difference:
    """How far ``one`` is from ``other``; tensors that only one has are infinitely far.

    Args:
        rounded: every element relative to ``1 + |element|``, as where float32 limits what can be
            had. Otherwise gradients relative to the largest element of their tensor (or
            :data:`SMALL`), and the loss and state absolute.
    """
    worst = {"loss": 0.0, "gradient": 0.0, "state": 0.0}
    where: dict[str, str] = {}

    def note(kind: str, name: str, a: Tensor | None, b: Tensor | None) -> None:
        error = _apart(kind, a, b, rounded)
        if error > worst[kind]:
            worst[kind], where[kind] = error, name

    for step, losses in enumerate(zip(one.losses, other.losses, strict=True)):
        note("loss", f"step {step}", *(torch.tensor(x, dtype=torch.float64) for x in losses))
    for mine, theirs in zip(one.gradients, other.gradients, strict=True):
        for name in {*mine, *theirs}:
            note("gradient", name, mine.get(name), theirs.get(name))
    for name in {*one.state, *other.state}:
        note("state", name, one.state.get(name), other.state.get(name))
    return Difference(worst["loss"], worst["gradient"], worst["state"], where)


def _apart(kind: str, a: Tensor | None, b: Tensor | None, rounded: bool) -> float:
    if a is None or b is None:
        present = a if a is not None else b
        # An unused parameter has no gradient on one side and may have zeros on the other.
        nothing = kind == "gradient" and present is not None and not present.any()
        return 0.0 if nothing else math.inf
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    if rounded:
        error = float(((a - b).abs() / (1 + b.abs())).max())
    else:
        scale = max(SMALL, float(b.abs().max())) if kind == "gradient" else 1.0
        error = float((a - b).abs().max()) / scale
    return math.inf if math.isnan(error) else error


def in_dtype(trained: Trained, dtype: torch.dtype) -> Trained:
    """With floating-point tensors rounded to ``dtype``."""

    def cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    return Trained(trained.losses, [cast(g) for g in trained.gradients], cast(trained.state))
