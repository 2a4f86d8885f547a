"""Trains pipelines whose stages are replicated unevenly, or whose weights have versions.

Torch's engine has one rank per stage and a flush per step. This one runs the actions of
:mod:`autoshard.versioned` on plain sends and receives: a replica runs the micro-batches whose turn
it is, forward and backward in the module of their version (:mod:`.weight_versions`), and updates
are averaged over the replicas of a stage alone.

Without a flush, :meth:`ReplicatedEngine.step` feeds a batch and returns the loss of the one that
leaves the pipeline meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoshard.errors import OptionError
from autoshard.runtime import data, launch
from autoshard.runtime import mesh as meshes
from autoshard.runtime import optimizer as optimizers
from autoshard.runtime.agreement import fingerprint
from autoshard.runtime.data_parallel import Replicated
from autoshard.runtime.engine import EngineConfig, Slot, prologue
from autoshard.runtime.parameters import declared
from autoshard.runtime.random import make_key
from autoshard.runtime.replica_wire import Losses, Place, Wire
from autoshard.runtime.replicated_ties import ReplicatedTies
from autoshard.runtime.weight_versions import WeightVersions
from autoshard.versioned import Action, dry_run

_STEPS_CHECKED = 3
"""Steps of a schedule that are run without tensors before it is run with them."""


class ReplicatedEngine:
    """Trains one stage on this rank; every rank makes one and calls it alike.

    Args:
        stage: an emitted stage with its parameters loaded, on this rank's device.
        config: ``inputs`` and ``outputs`` are of whole micro-batches.
        optimizer: a name, or a callable from a list of parameters to an optimizer.

    Attributes:
        step_number: steps whose batch was fed.

    Raises:
        OptionError: for an unknown optimizer, or a schedule that cannot run.
    """

    def __init__(
        self,
        stage: nn.Module,
        *,
        place: Place,
        config: EngineConfig,
        optimizer: str | optimizers.OptimizerFactory = "adamw",
    ) -> None:
        self._ties = ReplicatedTies.between_stages(stage, place)
        self.place = place = self._ties.place
        rules = place.rules
        dry_run(rules.unrolled(_STEPS_CHECKED), rules)
        self.config, self.mesh = config, place.mesh
        self.device = next((p.device for p in stage.parameters()), torch.device("cpu"))
        self.step_number = 0
        self.max_norm: float | None = None
        self.set_max_norm(config.max_norm)
        self._versions = WeightVersions(stage)
        self._reductions: dict[nn.Module, Replicated] = {}
        counted = place.rank == rules.ranks_of(place.stage)[0]
        slots = tuple(_slots(stage, counted=counted))
        self.slots = tuple(s for s in slots if s.name not in self._ties.taken)
        self.optimizer = optimizers.build(optimizer, [s.local for s in self.slots], split=False)
        self.scheduler: LRScheduler | None = None
        self.scheduler_state: dict[str, Any] | None = None
        self._wire = Wire(place, config, self.device)
        self._losses = Losses(place, self.device)
        self._arguments: dict[int, Mapping[str, Any]] = {}
        self._flying: dict[int, _Flight] = {}
        self._fed = 0  # steps since the pipeline was empty
        self._last = Action(place.stage, "B", 0, 0)
        self._next_forward = place.rank - rules.ranks_of(place.stage)[0]

    # -- what a user calls ------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """This rank's stage with its newest weights."""
        return self._versions.current

    def step(self, batch: object) -> float:
        """Feed a batch, and do what the schedule does until the next.

        Args:
            batch: the whole global batch, the same on every rank.

        Returns:
            The loss of the batch that was fed ``place.rules.delay`` steps ago, from its own
            forward; ``nan`` in the first steps, when none has left the pipeline. The same number on
            every rank.

        Raises:
            OptionError: if the batch is not as captured, or not the same on all ranks.
        """
        rules = self.place.rules
        with launch.guarded(), meshes.using(self.mesh):
            self.module.train()
            if not rules.stale:
                self.zero_grad()
            self._arguments.update(self._prepare(batch, train=True))
            self._perform(rules.step(self.place.rank, self._fed))
            self._fed += 1
            self.step_number += 1
            self._losses.share()
            if not rules.stale:
                self._empty()
            return self._losses.take(rules.delay)

    def drain(self) -> list[float]:
        """Let the pipeline run empty: all that was fed is trained on.

        Returns:
            The losses of the batches that no step has returned, in order.
        """
        self._run_empty()
        with launch.guarded():
            return self._losses.take_all()

    def evaluate(self, batch: object) -> float:
        """The loss of a global batch in evaluation mode, after the pipeline has run empty."""
        self._run_empty()
        module = self.module
        with launch.guarded(), meshes.using(self.mesh), torch.no_grad():
            was_training = module.training
            module.eval()
            try:
                self._arguments = dict(self._prepare(batch, train=False))
                own = [i for i in range(self.config.num_micro_batches) if i in self._arguments]
                for micro_batch in own:
                    action = Action(self.place.stage, "F", micro_batch, 0)
                    self._forward(action)
                    self._flying.pop(micro_batch)
                self._empty()
            finally:
                module.train(was_training)
            self._losses.share()
            self._losses.finish()
            return self._losses.take_last()

    def empty(self) -> None:
        """As :meth:`drain`, but the losses that are left come with the next steps, in order."""
        self._run_empty()

    def zero_grad(self) -> None:
        for slot in self.slots:
            slot.holder.grad = slot.local.grad = None

    def set_max_norm(self, max_norm: float | None) -> None:
        """Clip gradients to this global norm from the next step on; ``None``: do not.

        Raises:
            OptionError: the pipeline has no flush, so no rank knows the norm over all stages.
        """
        if max_norm is not None and self.place.rules.stale:
            raise OptionError(
                f"expected no clip_norm with schedule {self.place.rules.schedule!r} but got "
                f"{max_norm}: its stages step at different times, so there is no norm over all of "
                "them; clip in the optimizer, or use 1f1b"
            )
        self.max_norm = max_norm

    def set_scheduler(self, scheduler: Callable[[Optimizer], LRScheduler]) -> LRScheduler:
        """Step a scheduler once per step, from where a checkpoint that was loaded before left it.

        Without a flush that is when a stage has made the last update of a step's batch.
        """
        self.scheduler = optimizers.make_scheduler(scheduler, self.optimizer, self.scheduler_state)
        return self.scheduler

    # -- the schedule -----------------------------------------------------------------------------

    def _run_empty(self) -> None:
        with launch.guarded(), meshes.using(self.mesh):
            self._perform(self.place.rules.rest(self.place.rank, self._fed))
            self._empty()

    def _empty(self) -> None:
        """The pipeline is: versions and micro-batches count from 0 again."""
        self._wire.finish()
        self._losses.finish()
        self._ties.finish(self.module, self._fed)
        self._versions.restart()
        if self.place.rules.stale and self.place.replicas is not None:
            self._share_buffers(self.place.replicas)
        self._fed = 0
        self._next_forward = self.place.rank - self.place.rules.ranks_of(self.place.stage)[0]

    def _share_buffers(self, replicas: dist.ProcessGroup) -> None:
        """Running statistics become those of the first replica, as in DDP."""
        with self.place.waiting(f"the other ranks of stage {self.place.stage}"):
            for buffer in self.module.buffers():
                dist.broadcast(buffer, group=replicas, group_src=0)

    def _perform(self, actions: Iterable[Action]) -> None:
        """Run actions in order; what the next one waits for is received meanwhile."""
        for action, following in pairwise((*actions, None)):
            assert action is not None
            self._wire.expect(action)
            if following is not None:
                self._wire.expect(following)
            if action.what == "F":
                self._forward(action)
            elif action.what == "B":
                updates = following is not None and following.what == "S"
                self._backward(action, updates=updates)
            else:
                self._update(action)

    def _forward(self, action: Action) -> None:
        inputs = self._wire.activations(action)
        module = self._versions.module(action.version)
        if all(flight.version != action.version for flight in self._flying.values()):
            self._ties.take(module, action.micro_batch)
        result = module(*inputs, **self._arguments.pop(action.micro_batch))
        outputs: tuple[Tensor, ...] = (result,) if isinstance(result, Tensor) else tuple(result)
        self._flying[action.micro_batch] = _Flight(action.version, inputs, outputs)
        self._next_forward = action.micro_batch + self.place.rules.replicas[action.stage]
        if action.stage == self.place.rules.num_stages - 1:
            self._losses.add(outputs[0].detach() / self.config.standalone)
        else:
            self._wire.send_activations(action, outputs)

    def _backward(self, action: Action, *, updates: bool) -> None:
        """The backward of a micro-batch; ``updates``: an update follows, so gradients are reduced
        as they arrive."""
        flight = self._flying.pop(action.micro_batch)
        self._last = action
        reduction = self._reduction(self._versions.module(action.version))
        if reduction is not None:
            reduction.before_backward(last=updates)
        gradients: Sequence[Tensor | None] = self._wire.gradients(action) or [None]
        differentiable = [t for t in flight.outputs if t.dtype.is_floating_point]
        pairs = [(t, g) for t, g in zip(differentiable, gradients, strict=True) if t.requires_grad]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        if reduction is not None and updates:
            with self.place.waiting(f"gradients of the other ranks of stage {action.stage}"):
                reduction.finish()
        self._wire.send_gradients(action, flight.inputs)

    def _reduction(self, module: nn.Module) -> Replicated | None:
        """What sums the gradients of a module over the replicas of the stage."""
        if self.place.replicas is None:
            return None
        if module not in self._reductions:
            own = [p for p in module.parameters() if p.requires_grad]
            apart = self._ties.parameters(module)
            self._reductions[module] = Replicated(
                [p for p in own if p not in apart], self.place.replicas, self.config.bucket_bytes
            )
        return self._reductions[module]

    def _update(self, action: Action) -> None:
        """Step the newest weights by the gradients of the last backward, which lie with the version
        that it used: the micro-batches of one update and rank have all met the same one."""
        rules, stage = self.place.rules, action.stage
        source = self._versions.module(self._last.version)
        self._ties.sum_gradients(source, self._last.micro_batch)
        gradients = [slot.holder.grad for slot in _slots_of(self.slots, source)]
        self._weigh(gradients)
        flying = [flight.version for flight in self._flying.values()]
        oldest = min([*flying, rules.version(stage, self._next_forward)])
        self._versions.release(oldest)
        module = self._versions.advance(keep=rules.stale and oldest < action.version)
        self.slots = _slots_of(self.slots, module)
        for slot, gradient in zip(self.slots, gradients, strict=True):
            slot.local.data = slot.holder.data
            slot.local.grad = gradient
        self.optimizer.step()
        self._ties.give(module)
        for slot in self.slots:
            slot.local.grad = None
        if rules.stale:
            for parameter in source.parameters():
                parameter.grad = None
        if self.scheduler is not None and action.version % rules.updates_per_step(stage) == 0:
            self.scheduler.step()

    def _weigh(self, gradients: Sequence[Tensor | None]) -> None:
        """The mean over the batches of their own that an update is of; clipped if asked for."""
        rules, stage = self.place.rules, self.place.stage
        own_batches = self.config.standalone * rules.per_update(stage) // rules.num_micro_batches
        known = [g for g in gradients if g is not None]
        for gradient in known if own_batches > 1 else ():
            gradient.div_(own_batches)
        if self.max_norm is None:
            return
        counted = known if self.place.rank == rules.ranks_of(stage)[0] else []
        mine = torch.tensor(optimizers.squared_norm(counted), dtype=torch.float64)
        every = [torch.empty_like(mine.to(self.device)) for _ in range(rules.num_ranks)]
        with self.place.waiting("the norms of the gradients of all ranks"):
            dist.all_gather(every, mine.to(self.device), group=self.place.losses)
        norm = math.sqrt(sum(float(part) for part in every))
        for gradient in known:
            gradient.mul_(optimizers.clip_coefficient(norm, self.max_norm))

    def _prepare(self, batch: object, *, train: bool) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """What this rank's micro-batches of a step take besides activations, by micro-batch."""
        config, stage, rules = self.config, self.module, self.place.rules
        named = data.named_batch(batch, config.batch)
        data.check_batch(named, config.batch, 1)
        local = {name: tensor.to(self.device) for name, tensor in named.items()}
        self._losses.begin(fingerprint(local))
        wanted = tuple(getattr(stage, "BATCH", ()))
        count = config.num_micro_batches // config.standalone
        for own, batch_of_its_own in enumerate(
            data.micro_batches(local, config.batch, config.standalone)
        ):
            with torch.set_grad_enabled(train):
                shared = prologue(stage, batch_of_its_own, count)
            parts = data.micro_batches(batch_of_its_own, config.batch, count)
            for index, (part, values) in enumerate(zip(parts, shared, strict=True)):
                in_step = own * count + index
                micro_batch = self._fed * config.num_micro_batches + in_step
                if rules.home(self.place.stage, micro_batch) == self.place.rank:
                    key = make_key(config.seed, self.step_number, in_step)
                    yield micro_batch, {"key": key, **{n: part[n] for n in wanted}, **values}


@dataclass(slots=True)
class _Flight:
    """A micro-batch between its forward and its backward."""

    version: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def _slots(stage: nn.Module, *, counted: bool) -> Iterator[Slot]:
    seen: set[Tensor] = set()
    for name, declaration, tensor in declared(stage):
        if not declaration.buffer and tensor.requires_grad and tensor not in seen:
            assert isinstance(tensor, nn.Parameter)
            seen.add(tensor)
            # Autograd counts changes of a tensor and of what it is detached from together; the
            # optimizer's steps must not count as changes of the versions that it has left behind.
            yield Slot(name, declaration, tensor, nn.Parameter(tensor.data), counted)


def _slots_of(slots: Sequence[Slot], module: nn.Module) -> tuple[Slot, ...]:
    """The same slots, held by another version's module."""
    holders = {name: cast(nn.Parameter, tensor) for name, _, tensor in declared(module)}
    return tuple(Slot(s.name, s.declaration, holders[s.name], s.local, s.counted) for s in slots)
