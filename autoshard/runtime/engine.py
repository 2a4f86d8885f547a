"""One training step: the local batch in, the loss of the global batch out.

A step is, on every rank: clear the gradients; cut the local batch in micro-batches; compute what
they share (the stage's prologue); run forward and backward by the schedule; sum the gradients over
data-parallel ranks, over tensor-parallel ranks where they are addends, and over the stages that
hold one tied parameter; clip; step the optimizer and the scheduler; add up the loss.

Every rank's loss is an addend of the global one, so nothing is ever averaged.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoshard.errors import InternalError, OptionError
from autoshard.ir import TensorType, Value
from autoshard.plan.plan import BUCKET_BYTES
from autoshard.runtime import data, launch, recorder
from autoshard.runtime import mesh as meshes
from autoshard.runtime import optimizer as optimizers
from autoshard.runtime.agreement import fingerprint
from autoshard.runtime.collectives import stack_over
from autoshard.runtime.data_parallel import (
    DataParallel,
    Replicated,
    data_parallel,
    is_split_over_dp,
)
from autoshard.runtime.local_stages import Chunks, LocalStage
from autoshard.runtime.mesh import Mesh
from autoshard.runtime.parameters import (
    Layer,
    Parameter,
    declared,
    local_part,
    sum_partial_gradients,
)
from autoshard.runtime.pipeline import Pipeline, Runner, SingleStage
from autoshard.runtime.random import make_key
from autoshard.runtime.ties import Ties
from autoshard.schedule import Schedule
from autoshard.schedules import by_name, check_data_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What a plan says about running, as plain data.

    Attributes:
        batch: the batch tensors as captured, at the global batch size.
        num_micro_batches: per data-parallel rank and step.
        standalone: the step is cut into so many batches of their own, each of
            ``num_micro_batches / standalone`` micro-batches; their losses are averaged.
        schedule: a name of :data:`autoshard.schedules.SCHEDULES` or an explicit schedule.
        inputs, outputs: local types of the activations that this rank's stage receives and sends,
            if it has one.
        bucket_bytes: of gradients that ``ddp`` reduces at once.
        max_norm: clip gradients to this global norm.
    """

    batch: tuple[Value, ...]
    num_micro_batches: int = 1
    standalone: int = 1
    schedule: str | Schedule = "none"
    data_parallel: str = "ddp"
    bucket_bytes: int = BUCKET_BYTES
    inputs: tuple[TensorType, ...] = ()
    outputs: tuple[TensorType, ...] = ()
    max_norm: float | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """A trainable parameter of this rank and the plain tensor that the optimizer steps.

    Attributes:
        name: the original qualified name.
        holder: what the stage holds at rest; a ``DTensor`` with tensor ranks or FSDP2.
        local: this rank's part, sharing memory with ``holder``.
        counted: this rank counts it in the global gradient norm.
    """

    name: str
    declaration: Parameter
    holder: nn.Parameter
    local: nn.Parameter
    counted: bool


class Engine:
    """Trains the stages of this rank; every rank of the mesh makes one and calls it alike.

    Args:
        stage: an emitted stage with its parameters loaded, on this rank's device; or, where the
            schedule gives a rank several, all of them.
        optimizer: a name, or a callable from a list of parameters to an optimizer.
        scheduler: makes the learning-rate scheduler; it is stepped once per step.

    Raises:
        OptionError: for unknown names, or a batch that the mesh and micro-batches do not divide.
    """

    def __init__(
        self,
        stage: nn.Module | Sequence[LocalStage],
        *,
        mesh: Mesh,
        config: EngineConfig,
        optimizer: str | optimizers.OptimizerFactory = "adamw",
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        self.stages = _local_stages(stage, config, mesh)
        modules = [own.module for own in self.stages]
        self.module = modules[0] if len(modules) == 1 else Chunks(modules)
        self.mesh = mesh
        self.config = config
        self.max_norm = config.max_norm
        self.device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        self.step_number = 0
        self._batch_fingerprint = 0
        _check_divides(config, mesh)
        with meshes.using(mesh):
            self._schedule = _schedule(config, mesh, self.stages)
            self._data_parallel = _prepare_data_parallel(
                self.module, config, mesh, splits=self._schedule.splits
            )
            self._ties = Ties.between_stages(self.module, mesh)
            self.slots = tuple(_slots(self.module, mesh, self._ties))
        self.optimizer = optimizers.build(
            optimizer,
            [slot.local for slot in self.slots],
            split=any(slot.local.shape != slot.declaration.shape for slot in self.slots),
        )
        self.scheduler: LRScheduler | None = None
        self.scheduler_state: dict[str, Any] | None = None
        if scheduler is not None:
            self.set_scheduler(scheduler)
        self._runner = _runner(self.stages, self._schedule, mesh, self._data_parallel, self.device)

    # -- what a user calls ------------------------------------------------------------------------

    def step(self, local_batch: object) -> float:
        """Train on this rank's part of the global batch.

        Returns:
            The loss of the global batch before the update; the same number on every rank.

        Raises:
            OptionError: if the batch is not what :func:`autoshard.runtime.data.local_batch` gives.
        """
        with launch.guarded(), meshes.using(self.mesh):
            if not self.module.training:  # going through all modules takes as long as some layers
                self.module.train()
            self.zero_grad()
            losses = self._run(local_batch, train=True)
            with recorder.span("reduce"):
                self._reduce_gradients()
            with recorder.span("step"):
                if self.max_norm is not None:
                    self.clip_gradients(self.max_norm)
                self._update()
            return self._global_loss(losses)

    def evaluate(self, local_batch: object) -> float:
        """The loss of the global batch in evaluation mode; changes nothing."""
        with launch.guarded(), meshes.using(self.mesh):
            was_training = self.module.training
            self.module.eval()
            try:
                losses = self._run(local_batch, train=False)
            finally:
                for reduction in self._data_parallel:
                    reduction.end_forward()
                self.module.train(was_training)
            return self._global_loss(losses)

    def zero_grad(self) -> None:
        for slot in self.slots:
            slot.holder.grad = slot.local.grad = None

    def set_max_norm(self, max_norm: float | None) -> None:
        """Clip gradients to this global norm from the next step on; ``None``: do not."""
        self.max_norm = max_norm

    def set_scheduler(self, scheduler: Callable[[Optimizer], LRScheduler]) -> LRScheduler:
        """Step a scheduler once per step, from where a checkpoint that was loaded before left it.

        Args:
            scheduler: makes it for the engine's optimizer.
        """
        self.scheduler = optimizers.make_scheduler(scheduler, self.optimizer, self.scheduler_state)
        return self.scheduler

    def gradient_norm(self) -> float:
        """The norm of the gradients of the last step over all parameters, each element once."""
        mine = [
            local_part(slot.holder.grad)
            for slot in self.slots
            if slot.counted and slot.holder.grad is not None
        ]
        return math.sqrt(self._sum_over_ranks(optimizers.squared_norm(mine)))

    def clip_gradients(self, max_norm: float) -> float:
        """What ``torch.nn.utils.clip_grad_norm_`` does to the plain model; returns the norm."""
        norm = self.gradient_norm()
        coefficient = optimizers.clip_coefficient(norm, max_norm)
        for slot in self.slots:
            if slot.holder.grad is not None:
                local_part(slot.holder.grad).mul_(coefficient)
        return norm

    # -- parts of a step --------------------------------------------------------------------------

    def _run(self, batch: object, *, train: bool) -> list[Tensor]:
        config = self.config
        named = data.named_batch(batch, config.batch)
        data.check_batch(named, config.batch, self.mesh.size("dp"))
        local = {name: tensor.to(self.device) for name, tensor in named.items()}
        self._batch_fingerprint = fingerprint(local)
        arguments = [list(self._arguments(s.module, local, train=train)) for s in self.stages]
        losses = self._runner.run(arguments, train=train)
        return [loss / config.standalone for loss in losses]

    def _arguments(
        self, stage: nn.Module, local: data.Batch, *, train: bool
    ) -> Iterator[Mapping[str, Any]]:
        """Of each micro-batch, what a stage takes besides activations."""
        config = self.config
        wanted = tuple(getattr(stage, "BATCH", ()))
        count = config.num_micro_batches // config.standalone
        number = 0
        for batch_of_its_own in data.micro_batches(local, config.batch, config.standalone):
            with torch.set_grad_enabled(train):
                shared = prologue(stage, batch_of_its_own, count)
            parts = data.micro_batches(batch_of_its_own, config.batch, count)
            for part, values in zip(parts, shared, strict=True):
                key = make_key(config.seed, self.step_number, number)
                yield {"key": key, **{n: part[n] for n in wanted}, **values}
                number += 1

    def _reduce_gradients(self) -> None:
        for reduction in self._data_parallel:
            reduction.finish()
        sum_partial_gradients(self.module)
        self._ties.sum_gradients(self.slots)
        if self.config.standalone > 1:
            for slot in self.slots:
                if slot.holder.grad is not None:
                    local_part(slot.holder.grad).div_(self.config.standalone)

    def _update(self) -> None:
        for slot in self.slots:
            gradient = slot.holder.grad
            slot.local.grad = None if gradient is None else local_part(gradient)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        for slot in self.slots:
            slot.local.grad = None
        self.step_number += 1

    def _global_loss(self, losses: Sequence[Tensor]) -> float:
        """The sum of all addends, the same bits on every rank.

        Raises:
            OptionError: if ranks that work on the same samples were given different ones.
        """
        mesh = self.mesh
        mine = float(sum(float(loss) for loss in losses))
        numbers = torch.tensor([mine, self._batch_fingerprint], dtype=torch.float64)
        numbers = numbers.to(self.device)
        for axis in reversed(mesh.axes):
            if axis == "dp" or mesh.size(axis) == 1:
                continue
            stacked = stack_over(numbers, mesh, axis)
            if bool((stacked[:, 1] != numbers[1]).any()):
                raise OptionError(
                    f"expected the same batch on all ranks along {axis} (they work on the same "
                    "samples) but got different ones; take each rank's samples from "
                    "local_batch or sampler, which go by its data-parallel rank"
                )
            # Only the last stage has a loss; along other axes all have the same one.
            numbers = stacked[self._schedule.homes[-1] if axis == "pp" else -1]
        if mesh.size("dp") > 1:
            numbers = stack_over(numbers, mesh, "dp").sum(dim=0)
        return float(numbers[0])

    def _sum_over_ranks(self, value: float) -> float:
        """The sum over the whole mesh, the same bits on every rank."""
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        for axis in self.mesh.axes:
            if self.mesh.size(axis) > 1:
                # A fixed order of addition, whatever algorithm the backend reduces by.
                number = stack_over(number, self.mesh, axis).sum(dim=0)
        return float(number)


def _check_divides(config: EngineConfig, mesh: Mesh) -> None:
    parts = mesh.size("dp") * config.num_micro_batches
    for value in config.batch:
        if value.type.per_sample and value.type.shape[0] % parts:
            raise OptionError(
                f"expected a global batch that {mesh.size('dp')} data-parallel ranks with "
                f"{config.num_micro_batches} micro-batches each can share but got "
                f"{value.type.shape[0]} samples; choose a multiple of {parts}"
            )


def prologue(stage: nn.Module, local: Mapping[str, Tensor], count: int) -> list[data.Batch]:
    """What the stage computes once per step, as each of ``count`` micro-batches receives it."""
    names: tuple[str, ...] = tuple(getattr(stage, "PROLOGUE", ()))
    if not names:
        return [{} for _ in range(count)]
    values = cast(Any, stage).prologue(dict(local))
    missing = [name for name in names if name not in values]
    if missing:
        raise InternalError(f"the prologue of {type(stage).__name__} lacks {missing}")
    cut = set(getattr(stage, "CUT", ()))
    return [
        {n: data.run_of(values[n], index, count) if n in cut else values[n] for n in names}
        for index in range(count)
    ]


def _local_stages(
    stage: nn.Module | Sequence[LocalStage], config: EngineConfig, mesh: Mesh
) -> tuple[LocalStage, ...]:
    if not isinstance(stage, nn.Module):
        return tuple(stage)
    index = mesh.rank("pp")
    return (LocalStage(index=index, module=stage, inputs=config.inputs, outputs=config.outputs),)


def _schedule(config: EngineConfig, mesh: Mesh, stages: Sequence[LocalStage]) -> Schedule:
    """The schedule of this step, for the stages that the ranks have.

    Raises:
        OptionError: if it is for others, or cannot be combined with the data-parallel mode.
    """
    num_ranks, schedule = mesh.size("pp"), config.schedule
    if isinstance(schedule, str):
        schedule = by_name(schedule, num_ranks, config.num_micro_batches, len(stages))
    given = (len(schedule.ranks), schedule.num_micro_batches)
    if given != (num_ranks, config.num_micro_batches):
        raise OptionError(
            f"expected a schedule of {num_ranks} ranks and {config.num_micro_batches} "
            f"micro-batches but got one of {given[0]} and {given[1]}; write one for this plan"
        )
    mine = [index for index, home in enumerate(schedule.homes) if home == mesh.rank("pp")]
    if mine != [stage.index for stage in stages]:
        raise OptionError(
            f"expected a schedule under which pipeline rank {mesh.rank('pp')} has the stages "
            f"{[stage.index for stage in stages]} but got one that gives it {mine}; write one for "
            "this plan"
        )
    if num_ranks > 1 and mesh.size(mesh.replicas) > 1:
        check_data_parallel(schedule.splits, config.data_parallel)
    return schedule


def _runner(
    stages: Sequence[LocalStage],
    schedule: Schedule,
    mesh: Mesh,
    reductions: Sequence[DataParallel],
    device: torch.device,
) -> Runner:
    if schedule.num_stages == 1:
        return SingleStage(stages[0].module, reductions[0])
    return Pipeline(
        stages, schedule=schedule, syncs=reductions[: len(stages)], group=mesh.group("pp"),
        device=device, reduces=mesh.size(mesh.replicas) > 1,
    )  # fmt: skip


# -- parameters -----------------------------------------------------------------------------------


def _prepare_data_parallel(
    module: nn.Module, config: EngineConfig, mesh: Mesh, *, splits: bool
) -> tuple[DataParallel, ...]:
    """One per stage, and one for what several of them hold: it is complete when all are done.

    Collective over ``pp``. Where backward is split, a stage is one unit: FSDP2's autograd functions
    around the units inside would see gradients of weights that go from one to the next too early.
    """
    axis, size = mesh.replicas, mesh.size(mesh.replicas)
    device_mesh = mesh.device_mesh[axis] if mesh.device_mesh is not None and size > 1 else None
    group = mesh.group(axis) if size > 1 else None
    shared = _shared(module, mesh) if size > 1 else []
    stages = list(module.stages) if isinstance(module, Chunks) else [module]
    per_stage = [
        data_parallel(
            stage, mode=config.data_parallel, size=size, mesh=device_mesh, group=group,
            units=() if splits else tuple(gathered_units(stage)), apart=shared,
            bucket_bytes=config.bucket_bytes,
        )
        for stage in stages
    ]  # fmt: skip
    trained = [p for p in shared if p.requires_grad]
    together = (
        [Replicated(trained, group, config.bucket_bytes)] if group is not None and trained else []
    )
    return (*per_stage, *together)


def _shared(module: nn.Module, mesh: Mesh) -> list[nn.Parameter]:
    """Parameters that several stages of one rank hold, or of any other pipeline rank.

    All ranks keep them whole, whatever the mode: gradients of ties are summed part by part.
    """
    if mesh.size("pp") == 1:
        return []
    mine = set(module.shared) if isinstance(module, Chunks) else set()
    held = [(name, tensor) for name, _, tensor in declared(module)]
    names: list[set[str]] = [set()] * mesh.size("pp")
    dist.all_gather_object(names, {n for n, t in held if t in mine}, group=mesh.group("pp"))
    anywhere = set().union(*names)
    return [t for n, t in held if n in anywhere and isinstance(t, nn.Parameter)]


def gathered_units(stage: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered one at a time.

    Those are the outermost ones below the stage that have a ``forward`` of their own, run once per
    micro-batch, and whose parameters nothing else uses.
    """
    owners = Counter(p for m in stage.modules() for p in m.parameters(recurse=False))
    calls = Counter(layer for layer, _ in vars(stage).get("_calls", ()))
    borrowed = set(_borrowed(stage))

    def below(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if type(child).forward is nn.Module.forward:
                yield from below(child)
                continue
            inside = Counter(p for m in child.modules() for p in m.parameters(recurse=False))
            alone = all(owners[p] == uses and p not in borrowed for p, uses in inside.items())
            if inside and alone and calls[child] <= 1:
                yield child

    yield from below(stage)


def _borrowed(stage: nn.Module) -> Iterator[Tensor]:
    """Parameters that a layer finds elsewhere in the stage, under other names than its own."""
    layers = {m for m in stage.modules() if isinstance(m, Layer)}
    layers.update(layer for layer, _ in vars(stage).get("_calls", ()))
    for layer in layers:
        own = set(layer.parameters())
        for name in layer.PARAMETERS:
            tensor: Any = functools.reduce(getattr, name.split("."), layer)
            if tensor not in own:
                yield tensor


def _slots(stage: nn.Module, mesh: Mesh, ties: Ties) -> Iterator[Slot]:
    seen: set[Tensor] = set()
    for name, declaration, tensor in declared(stage):
        if declaration.buffer or not tensor.requires_grad or tensor in seen:
            continue
        assert isinstance(tensor, nn.Parameter)
        seen.add(tensor)
        counted = (
            (declaration.split is not None or mesh.rank("tp") == 0)
            and (is_split_over_dp(tensor, mesh) or mesh.rank(mesh.replicas) == 0)
            and mesh.rank("pp") == min(ties.stages.get(name, (mesh.rank("pp"),)))
        )
        yield Slot(name, declaration, tensor, nn.Parameter(local_part(tensor)), counted)
