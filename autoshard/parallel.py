"""What :func:`autoshard.compile` returns: the plan, its source, and the training of this rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoshard.emit import CONSTANTS, MANIFEST, Emitted, emit, load_stage
from autoshard.emit.manifest import boundary_types
from autoshard.errors import OptionError
from autoshard.ir import Program, Value
from autoshard.options import ASYNCHRONOUS
from autoshard.plan.plan import Plan

if TYPE_CHECKING:
    from autoshard.runtime.asynchronous import AsynchronousEngine, Worker
    from autoshard.runtime.data import GlobalBatchSampler
    from autoshard.runtime.engine import Engine
    from autoshard.runtime.local_stages import LocalStage
    from autoshard.runtime.mesh import Mesh
    from autoshard.runtime.replica_wire import Place
    from autoshard.runtime.replicas import ReplicatedEngine
    from autoshard.timeline import Timeline

OptimizerChoice = str | Callable[[list[nn.Parameter]], Optimizer]


class Parallel:
    """A planned model; under ``torchrun`` with ``plan.world_size`` processes it trains.

    Everything that runs is collective: every rank makes the same calls in the same order.

    Attributes:
        model: the user's model, unchanged; its parameters are where training starts from.
        program: what was captured.
        plan: what was decided.
    """

    def __init__(
        self, model: nn.Module, program: Program, plan: Plan, *, optimizer: OptimizerChoice
    ) -> None:
        self.model = model
        self.program = program
        self.plan = plan
        self._optimizer = optimizer
        self._clip_norm: float | None = None

    # -- anywhere ---------------------------------------------------------------------------------

    @functools.cached_property
    def emitted(self) -> Emitted:
        """The distributed model as source files and a manifest."""
        return emit(self.program, self.plan)

    def emit(self, folder: str | Path, *, force: bool = False) -> list[Path]:
        """Write Python source, one file per distinct stage, and a manifest.

        Returns:
            The paths written.

        Raises:
            OptionError: the folder has such files already and ``force`` is false.
        """
        emitted, folder = self.emitted, Path(folder)
        emitted.write(folder, force=force)
        names = [*emitted.files, MANIFEST, *([CONSTANTS] if emitted.constants else [])]
        return [folder / name for name in names]

    def __repr__(self) -> str:
        mesh = self.plan.mesh
        replicas = f" replicas={self.plan.replicas}" if self.plan.is_replicated else ""
        return (
            f"Parallel({self.plan.model}: pp={mesh.pp} dp={mesh.dp} tp={mesh.tp}{replicas}, "
            f"{self.plan.schedule}, predicted {self.plan.prediction.step_s:.3g} s per step)"
        )

    # -- on a rank --------------------------------------------------------------------------------

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh of ranks; of one rank per stage where stages are replicated one by one.

        Raises:
            LaunchError: not under ``torchrun``, or with another number of processes than the plan
                has; prints the line to use.
        """
        from autoshard.runtime import launch
        from autoshard.runtime.mesh import Mesh

        device = launch.start(self.plan.world_size)
        if self.plan.is_replicated:
            return self._place.mesh
        plan = self.plan.mesh
        context = {"cp": plan.cp} if plan.cp > 1 else {}
        sizes = {"pp": plan.pp, "dp": plan.dp, **context, "tp": plan.tp}
        return Mesh.create(sizes, device_type=device.type)

    @functools.cached_property
    def _place(self) -> Place | Worker:
        """Of this rank, where stages are replicated one by one."""
        from autoshard.runtime import launch
        from autoshard.runtime.asynchronous import Worker
        from autoshard.runtime.replica_wire import Place

        launch.start(self.plan.world_size)
        if self.plan.data_parallel in ASYNCHRONOUS:
            return Worker.create(self.plan.ssp_bound)
        return Place.create(self.plan.rules)

    @functools.cached_property
    def engine(self) -> Engine | ReplicatedEngine | AsynchronousEngine:
        """This rank's training engine, with its parameters taken from the model."""
        from autoshard.runtime import launch, mesh
        from autoshard.runtime.agreement import check_model_alike
        from autoshard.runtime.asynchronous import AsynchronousEngine, Worker
        from autoshard.runtime.engine import Engine, EngineConfig
        from autoshard.runtime.parameters import load_parameters
        from autoshard.runtime.replicas import ReplicatedEngine

        with mesh.using(self.mesh), launch.device():
            tensors = self._initial_tensors()
            check_model_alike(tensors)
            stages = [self._local_stage(index) for index in self._stage_indices]
            for stage in stages:
                load_parameters(stage.module, tensors)
        config = EngineConfig(
            batch=self.batch,
            standalone=self.plan.standalone,
            num_micro_batches=self.plan.num_micro_batches,
            schedule=self.plan.schedule,
            data_parallel=self.plan.data_parallel,
            bucket_bytes=self.plan.bucket_bytes,
            max_norm=self._clip_norm,
            seed=self.plan.seed,
        )
        if not self.plan.is_replicated:
            return Engine(stages, mesh=self.mesh, config=config, optimizer=self._optimizer)
        (stage,) = stages
        config = replace(config, inputs=stage.inputs, outputs=stage.outputs)
        if isinstance(self._place, Worker):
            return AsynchronousEngine(
                stage.module, worker=self._place, config=config, optimizer=self._optimizer
            )
        return ReplicatedEngine(
            stage.module, place=self._place, config=config, optimizer=self._optimizer
        )

    @property
    def _stage_indices(self) -> list[int]:
        """The stages of this rank, in the order of the model."""
        return [k for k, home in enumerate(self.plan.homes) if home == self.mesh.rank("pp")]

    def _local_stage(self, index: int) -> LocalStage:
        from autoshard.runtime.local_stages import LocalStage

        spec = self.emitted.manifest["stages"][index]
        is_last = index == len(self.plan.stages) - 1
        return LocalStage(
            index=index,
            module=load_stage(self.emitted, index)(spec),
            inputs=boundary_types(spec["inputs"]),
            outputs=() if is_last else boundary_types(spec["outputs"]),
            recomputes=spec["recomputes"],
        )

    @property
    def batch(self) -> tuple[Value, ...]:
        """The tensors of a global batch; the program is captured on a part of it where a step is
        cut into batches of their own."""

        def whole(value: Value) -> Value:
            if not value.type.per_sample:
                return value
            samples, *rest = value.type.shape
            shape = (samples * self.plan.standalone, *rest)
            return replace(value, type=value.type.with_shape(shape))

        return tuple(whole(value) for value in self.program.batch)

    def _initial_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        tensors |= dict(self.model.named_buffers(remove_duplicate=False))
        tensors |= self.program.constants
        for name, tensor in tensors.items():
            if tensor.is_meta:
                raise OptionError(
                    f"training starts from the model's own parameters, but {name} is on the meta "
                    "device: pass a model with real parameters (planning alone needs none)"
                )
        return tensors

    @property
    def is_main(self) -> bool:
        """This is rank 0, the one that prints; so is a process that is not under ``torchrun``."""
        from autoshard.runtime import launch

        if dist.is_initialized():
            return dist.get_rank() == 0
        environment = launch.environment()
        return environment is None or environment.rank == 0

    @property
    def module(self) -> nn.Module:
        """This rank's stage, or stages."""
        return self.engine.module

    @property
    def optimizer(self) -> Optimizer:
        """This rank's optimizer, over its own parts of the parameters."""
        return self.engine.optimizer

    @property
    def steps_done(self) -> int:
        """Steps taken so far, those before a resume included."""
        return self.engine.step_number

    def set_scheduler(self, scheduler: Callable[[Optimizer], LRScheduler]) -> LRScheduler:
        """Step a learning-rate scheduler after every training step; it is checkpointed, too.

        After :meth:`load` it goes on from where the one that was saved stood.
        """
        return self.engine.set_scheduler(scheduler)

    @property
    def clip_norm(self) -> float | None:
        """Scale gradients down to this global norm before each update; ``None``: do not."""
        return self._clip_norm

    @clip_norm.setter
    def clip_norm(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise OptionError(f"clip_norm expects a positive number or None but got {value!r}")
        self._clip_norm = value
        if "engine" in self.__dict__:
            self.engine.set_max_norm(value)

    def step(self, batch: Mapping[str, Tensor] | tuple[Tensor, ...]) -> float:
        """One training step on this rank's part of the global batch.

        Args:
            batch: what :meth:`local_batch` or a loader over :meth:`sampler` gives.

        Returns:
            The loss of the global batch, the same on every rank. A pipeline without a flush
            (``pipedream``, ``pipedream-2bw``) returns that of the batch which leaves it meanwhile,
            fed ``plan.rules.delay`` steps ago, and ``nan`` before there is one: :meth:`drain` gives
            the last ones. An asynchronous worker (``asp``, ``ssp``) returns that of its own
            minibatch.

        Raises:
            LaunchError: see :attr:`mesh`.
            OptionError: a batch of the wrong size, names, shapes or dtypes.
        """
        return self.engine.step(batch)

    def trace(self, batch: Mapping[str, Tensor] | tuple[Tensor, ...]) -> tuple[float, Timeline]:
        """One training step, as :meth:`step` does it, and what every rank did when.

        Clocks are set to zero at a barrier. On a GPU every part of the step waits for the device,
        so it takes longer than usual.

        Returns:
            The loss, and the measured timeline of all ranks, the same on every rank.
        """
        from autoshard.runtime import recorder

        engine, mesh = self.engine, self.mesh
        with recorder.recording(engine.device) as recorded:
            loss = engine.step(batch)
        place = " ".join(f"{a}={mesh.rank(a)}" for a in mesh.axes if mesh.size(a) > 1)
        rank = dist.get_rank() if dist.is_initialized() else 0
        return loss, recorder.gathered(recorded, f"rank {rank}" + (f" ({place})" if place else ""))

    def evaluate(self, batch: Mapping[str, Tensor] | tuple[Tensor, ...]) -> float:
        """The loss of a global batch in evaluation mode, the same on every rank.

        Takes this rank's part of it, as :meth:`step` does; nothing changes.
        """
        return self.engine.evaluate(batch)

    def drain(self) -> list[float]:
        """Train on all that was fed to a pipeline without a flush, or wait for all workers.

        Weights are those of the same number of updates everywhere afterwards. Without effect where
        every step does that.

        Returns:
            The losses that no step has returned, in order.
        """
        drain = getattr(self.engine, "drain", None)
        return drain() if drain is not None else []

    def _settle(self) -> None:
        """As :meth:`drain`, but the losses that are left come with the next steps."""
        empty = getattr(self.engine, "empty", None)
        if empty is not None:
            empty()

    @property
    def _share(self) -> tuple[int, int]:
        """Which of how many runs of samples of a global batch are this rank's."""
        if self.plan.data_parallel in ASYNCHRONOUS:
            return self._place.rank, self.plan.world_size
        return self.mesh.rank("dp"), self.mesh.size("dp")

    def local_batch(
        self, global_batch: Mapping[str, Tensor] | tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """This rank's part of a global batch: its data-parallel rank's run of samples.

        Where stages are replicated one by one that is all of it: they take micro-batches in turn.
        """
        from autoshard.runtime import data

        rank, size = self._share
        return data.local_batch(global_batch, self.batch, rank=rank, size=size)

    def sampler(
        self, dataset: Sized, *, shuffle: bool = True, seed: int | None = None
    ) -> GlobalBatchSampler:
        """Indices of this rank's samples, for a ``DataLoader`` with
        ``batch_size=sampler.local_batch_size``.

        After :meth:`load`, ``sampler.resume_at(parallel.steps_done)`` goes on where training
        stood; ``sampler.set_epoch`` begins another epoch.
        """
        from autoshard.runtime.data import GlobalBatchSampler

        rank, size = self._share
        return GlobalBatchSampler(
            dataset, self.plan.global_batch_size, rank=rank, size=size, shuffle=shuffle,
            seed=self.plan.seed if seed is None else seed,
        )  # fmt: skip

    def _aliases(self) -> dict[str, str]:
        """Other names of tied tensors -> the canonical one."""
        return {
            alias: info.name
            for info in self.program.parameters.values()
            for alias in info.aliases
            if alias != info.name and info.persistent
        }

    @functools.cached_property
    def _unused_tensors(self) -> dict[str, Tensor]:
        """State that the program never uses, so no stage holds it: the model's, or what was
        loaded."""
        own = self.model.state_dict()
        return {
            entry["name"]: own[entry["name"]].cpu().clone()
            for entry in self.emitted.manifest["unused"]
            if entry["name"] in own
        }

    # -- whole tensors and checkpoints ------------------------------------------------------------

    def full_state_dict(self) -> dict[str, Tensor]:
        """On rank 0 every parameter and buffer whole, by original name, ties kept.

        It loads into the original model with ``strict=True``. Other ranks get an empty dict. A
        pipeline without a flush runs empty first, as it does for :meth:`save` and
        :meth:`evaluate`.
        """
        self._settle()
        tensors = self._gathered(gradients=False)
        if dist.get_rank() != 0:
            return {}
        tensors.update(self._unused_tensors)
        found = {
            alias: tensors[info.name]
            for info in self.program.parameters.values()
            if info.persistent
            for alias in (info.name, *info.aliases)
        }
        # What is not a parameter or buffer (a module's extra state) is as it was.
        return {name: found.get(name, own) for name, own in self.model.state_dict().items()}

    def full_grads(self) -> dict[str, Tensor]:
        """On rank 0 the gradients of the last step, whole, by original name."""
        return self._gathered(gradients=True)

    def _gathered(self, *, gradients: bool) -> dict[str, Tensor]:
        from autoshard.runtime import mesh
        from autoshard.runtime.parameters import declared, whole

        mine: dict[str, Tensor] = {}
        first = all(self.mesh.rank(axis) == 0 for axis in ("dp", "cp", "tp"))
        with mesh.using(self.mesh), torch.no_grad():
            for name, declaration, tensor in declared(self.engine.module):
                source = tensor.grad if gradients else tensor
                if source is not None and not (gradients and declaration.buffer):
                    value = whole(source, declaration)
                    if first:
                        mine[name] = value.detach().cpu()
        parts: list[dict[str, Tensor] | None] | None = None
        if dist.get_rank() == 0:
            parts = [None] * dist.get_world_size()
        dist.gather_object(mine, parts, dst=0)
        return {name: tensor for part in parts or () for name, tensor in (part or {}).items()}

    def save(self, folder: str | Path, *, keep: int | None = None) -> Path:
        """Checkpoint model, optimizer, scheduler, random states and step.

        An interrupted save never hides the last good one.

        Args:
            keep: remove all but so many of the newest checkpoints in ``folder``.

        Returns:
            The folder of this checkpoint.
        """
        from autoshard.runtime import checkpoint

        self._settle()
        return checkpoint.save(
            self.engine, Path(folder), aliases=self._aliases(), constant=self._unused_tensors,
            about={"program": self.program.fingerprint, "model": self.plan.model}, keep=keep,
        )  # fmt: skip

    def load(self, folder: str | Path, *, missing_ok: bool = False) -> bool:
        """Resume from the last checkpoint in ``folder``, whatever plan or world size wrote it.

        Args:
            missing_ok: start anew if the folder has no complete checkpoint, rather than fail. A
                program that is started again after a failure calls it so before its first step.

        Returns:
            There was a checkpoint, and training goes on from it.

        Raises:
            CheckpointError: there is none, or it is damaged or of another model or optimizer.
        """
        from autoshard.runtime import checkpoint

        engine = self.engine
        self._settle()
        if missing_ok and not checkpoint.exists(folder):
            return False
        checkpoint.load(engine, Path(folder), constant=self._unused_tensors)
        return True
