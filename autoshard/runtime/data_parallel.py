"""Data parallelism: gradients become their sum over the ``dp`` ranks, once per step.

| mode | parameters | gradients | optimizer state | reduction |
|---|---|---|---|---|
| ``ddp`` | whole | whole | whole | all-reduce after the last micro-batch |
| ``zero1`` | split between steps | whole in a step | split | reduce-scatter after the last |
| ``zero2`` | split between steps | split | split | reduce-scatter after each micro-batch |
| ``zero3`` | split but where they run | split | split | reduce-scatter after each micro-batch |

The three ZeRO modes (Rajbhandari et al. 2020) are FSDP2's ``fully_shard``. Gradients are summed,
never averaged: each rank's loss is an addend of the global one. ``ddp`` reduces buckets as soon
as the last micro-batch's backward has filled them; torch's ``replicate`` would do the same but
holds every parameter twice.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from autoshard.errors import OptionError
from autoshard.plan.plan import BUCKET_BYTES
from autoshard.runtime.mesh import Mesh
from autoshard.runtime.parameters import local_part, on_gradient, set_local_gradient

MODES = ("ddp", "zero1", "zero2", "zero3")


class DataParallel(Protocol):
    """How the engine and the pipeline talk to a mode."""

    def before_backward(self, *, last: bool) -> None:
        """Call before each micro-batch's backward; ``last`` for the last one of the step."""

    def finish(self) -> None:
        """Call after the last backward: then every ``grad`` holds (its part of) the sum."""

    def end_forward(self) -> None:
        """Call after forwards without backward: gives back what was gathered for them."""


def is_split_over_dp(tensor: Tensor, mesh: Mesh) -> bool:
    """FSDP2 has split the rows of this parameter."""
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    placements = dict(zip(names, tensor.placements, strict=True))
    own = placements.get(mesh.replicas)
    return own is not None and not own.is_replicate()


def data_parallel(
    stage: nn.Module,
    *,
    mode: str,
    size: int,
    group: dist.ProcessGroup | None,
    mesh: DeviceMesh | None,
    units: Sequence[nn.Module] = (),
    apart: Collection[nn.Parameter] = (),
    bucket_bytes: int = BUCKET_BYTES,
) -> DataParallel:
    """Prepare a stage for data parallelism; afterwards its parameters are what they are at rest.

    Args:
        size: degree of data parallelism; 1 leaves the stage as it is.
        mesh: the one-dimensional ``dp`` mesh (needed for the ZeRO modes).
        units: modules of the stage that are gathered one by one under ``zero3`` and reduced one by
            one under all ZeRO modes.
        apart: parameters that stay whole and that someone else reduces.
        bucket_bytes: of gradients that ``ddp`` reduces at once.

    Raises:
        OptionError: for an unknown mode.
    """
    if mode not in MODES:
        raise OptionError(
            f"expected data_parallel to be one of {', '.join(MODES)} but got {mode!r}; "
            "choose one of them"
        )
    apart = set(apart)
    trainable = [p for p in stage.parameters() if p.requires_grad and p not in apart]
    if size == 1 or not trainable:
        return Alone()
    if mode == "ddp":
        assert group is not None
        return Replicated(trainable, group, bucket_bytes)
    assert group is not None and mesh is not None
    return Sharded(stage, mode=mode, group=group, mesh=mesh, units=units, apart=apart)


class Alone:
    """One rank: nothing to reduce."""

    def before_backward(self, *, last: bool) -> None:
        pass

    def finish(self) -> None:
        pass

    def end_forward(self) -> None:
        pass


@dataclass(slots=True)
class _Bucket:
    parameters: list[nn.Parameter]
    missing: set[nn.Parameter] = field(default_factory=set)
    taken: list[nn.Parameter] = field(default_factory=list)
    flat: Tensor | None = None
    work: dist.Work | None = None


class Replicated:
    """All-reduce of gradients in buckets, overlapped with the last micro-batch's backward.

    A bucket takes the gradients out of its parameters when all of them are there; buckets start in
    the same order on every rank. A gradient that arrives after its bucket has started (a parameter
    used again by a nested backward) is reduced on its own in :meth:`finish`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._group = group
        self._buckets = _into_buckets(parameters, bucket_bytes)
        self._bucket_of = {p: b for b in self._buckets for p in b.parameters}
        self._armed = False
        self._next = 0
        # Weakly: hooks of a parameter that lead back to it are a cycle that is never collected, and
        # with the parameter the process groups would live on.
        arrived = weakref.WeakMethod(self._arrived)

        def hook(parameter: Tensor) -> None:
            if (method := arrived()) is not None:
                method(parameter)

        for parameter in self._bucket_of:
            on_gradient(parameter, hook)

    def before_backward(self, *, last: bool) -> None:
        self._armed = last
        if last:
            self._next = 0
            for bucket in self._buckets:
                bucket.missing = set(bucket.parameters)

    def _arrived(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        assert isinstance(parameter, nn.Parameter)
        self._bucket_of[parameter].missing.discard(parameter)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._start(self._buckets[self._next])
            self._next += 1

    def _start(self, bucket: _Bucket) -> None:
        bucket.taken = [p for p in bucket.parameters if p.grad is not None]
        if not bucket.taken:
            return
        gradients = [local_part(p.grad).reshape(-1) for p in bucket.taken if p.grad is not None]
        bucket.flat = torch.cat(gradients)
        for parameter in bucket.taken:
            parameter.grad = None
        bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)

    def finish(self) -> None:
        for bucket in self._buckets[self._next :]:
            self._start(bucket)
        self._armed = False
        late = _Bucket([p for p in self._bucket_of if p.grad is not None])
        self._start(late)
        for bucket in (*self._buckets, late):
            self._put_back(bucket)

    def _put_back(self, bucket: _Bucket) -> None:
        if bucket.flat is None or bucket.work is None:
            return
        bucket.work.wait()
        offset = 0
        for parameter in bucket.taken:
            like = local_part(parameter)
            gradient = bucket.flat[offset : offset + like.numel()].view(like.shape)
            offset += like.numel()
            if parameter.grad is None:
                set_local_gradient(parameter, gradient)
            else:
                local_part(parameter.grad).add_(gradient)
        bucket.flat = bucket.work = None

    def end_forward(self) -> None:
        pass


def _into_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[_Bucket]:
    """Parameters by dtype, last first: about the order in which their gradients arrive."""
    buckets: list[_Bucket] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[_Bucket, int]] = {}
    for parameter in reversed(list(parameters)):
        part = local_part(parameter)
        key = (part.dtype, part.device)
        bucket, size = open_.get(key, (None, 0))
        if bucket is None or size + part.nbytes > bucket_bytes:
            bucket, size = _Bucket([]), 0
            buckets.append(bucket)
        bucket.parameters.append(parameter)
        open_[key] = (bucket, size + part.nbytes)
    return buckets


class Sharded:
    """ZeRO by FSDP2.

    Parameters that FSDP2 cannot take (scalars, and those of another dtype than most of their
    module) stay whole and are reduced like ``ddp`` does.
    """

    def __init__(
        self,
        stage: nn.Module,
        *,
        mode: str,
        group: dist.ProcessGroup,
        mesh: DeviceMesh,
        units: Sequence[nn.Module],
        apart: Collection[nn.Parameter],
    ) -> None:
        self._mode = mode
        not_shardable = [p for p in _not_shardable([*units, stage]) if p not in apart]
        whole = {*not_shardable, *apart}
        for name in {type(module).__name__ for module in (*units, stage)}:
            # FSDP2 warns of outputs that are views; ops in place, its reason, are never emitted.
            warnings.filterwarnings("ignore", message=rf"FSDP2-wrapped module \(FSDP{name}\)")
        for unit in units:
            fully_shard(
                unit, mesh=mesh, reshard_after_forward=mode == "zero3", ignored_params=whole
            )
        fully_shard(stage, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
        assert isinstance(stage, FSDPModule)
        self._stage = stage
        self._modules = [m for m in stage.modules() if isinstance(m, FSDPModule)]
        for module in self._modules:
            # Without both, FSDP2 divides by the number of ranks (or by powers of two of it).
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self._rest = Replicated([p for p in not_shardable if p.requires_grad], group)

    def before_backward(self, *, last: bool) -> None:
        self._stage.set_is_last_backward(last)
        self._stage.set_requires_gradient_sync(last or self._mode != "zero1")
        self._stage.set_reshard_after_backward(last or self._mode == "zero3")
        self._rest.before_backward(last=last)

    def finish(self) -> None:
        self._rest.finish()
        self.end_forward()

    def end_forward(self) -> None:
        for module in self._modules:
            module.reshard()


def _not_shardable(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """FSDP2 wants one dtype among the trainable parameters of a group, and no scalars.

    In the same order on every rank.
    """
    taken: set[nn.Parameter] = set()
    whole: list[nn.Parameter] = []
    for module in modules:
        own = [p for p in module.parameters() if p not in taken]
        taken.update(own)
        bytes_of: dict[torch.dtype, int] = {}
        for parameter in own:
            bytes_of[parameter.dtype] = bytes_of.get(parameter.dtype, 0) + parameter.nbytes
        most = max(bytes_of, key=lambda dtype: bytes_of[dtype], default=None)
        whole += [p for p in own if p.ndim == 0 or p.dtype != most]
    return whole
