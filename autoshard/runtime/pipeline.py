"""Run one stage under a schedule: a plain loop for one stage, torch's pipelining engine for more.

This is the only file that touches private names of ``torch.distributed.pipelining``. The engine is
fed with our own action lists and with static metadata, and every stage decides by itself when its
gradients are reduced (see :mod:`autoshard.runtime.data_parallel`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining._utils import _make_tensor_from_meta
from torch.distributed.pipelining.schedules import (
    RESHARD,
    UNSHARD,
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _RecvInfo

from autoshard.ir import TensorType
from autoshard.runtime import recorder
from autoshard.schedule import Schedule, dry_run

_MAX_OPEN_SENDS = 2
"""Sends of one direction that may be under way; older ones are waited for, so that what they send
can be freed. With two, a stage computes one micro-batch while the one before it is still sent."""


class GradientSync(Protocol):
    """What a runner tells data parallelism; see :mod:`autoshard.runtime.data_parallel`."""

    def before_backward(self, *, last: bool) -> None:
        """Called before each micro-batch's backward; ``last`` for the last one of the step."""


class Runner(Protocol):
    """Runs the micro-batches of one step through this rank's stage."""

    def run(self, micro_batches: Sequence[Mapping[str, Any]], *, train: bool) -> list[Tensor]:
        """Forward (and backward if ``train``) of every micro-batch.

        Args:
            micro_batches: the stage's keyword arguments, one mapping per micro-batch.

        Returns:
            On the last stage the detached loss addend of each micro-batch, in order; else nothing.
        """


class SingleStage:
    """Gradient accumulation: each micro-batch forward and backward before the next."""

    def __init__(self, stage: nn.Module, sync: GradientSync) -> None:
        self._stage = stage
        self._sync = sync

    def run(self, micro_batches: Sequence[Mapping[str, Any]], *, train: bool) -> list[Tensor]:
        losses = []
        with torch.set_grad_enabled(train):
            for index, arguments in enumerate(micro_batches):
                with recorder.span("F", 0, index):
                    loss: Tensor = self._stage(**arguments)
                if train:
                    self._sync.before_backward(last=index == len(micro_batches) - 1)
                    with recorder.span("B", 0, index):
                        loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
        return losses


class Pipeline:
    """One stage of several, run by torch's engine.

    Args:
        stage: called with the activations of ``inputs`` and a micro-batch's keyword arguments;
            returns the activations of ``outputs``, or the loss addend on the last stage.
        inputs: local types of the activations from the stage before; none on the first stage.
        outputs: local types of the activations sent on; none on the last stage.
        group: the ranks of the pipeline, in the order of the schedule's ranks.
    """

    def __init__(
        self,
        stage: nn.Module,
        *,
        schedule: Schedule,
        stage_index: int,
        inputs: Sequence[TensorType],
        outputs: Sequence[TensorType],
        group: dist.ProcessGroup,
        device: torch.device,
        sync: GradientSync,
    ) -> None:
        dry_run(schedule)
        self._stage = _Stage(
            stage, stage_index, schedule.num_stages, device, group=group, sync=sync,
            input_args=_examples(inputs) if stage_index else (),
            output_args=_examples(outputs)
            if stage_index < schedule.num_stages - 1
            else torch.empty((), device="meta", requires_grad=True),
        )  # fmt: skip
        self._runtime = _PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
            [self._stage],
            schedule.num_micro_batches,
            loss_fn=lambda output, target: output,
            scale_grads=False,
        )
        self._runtime._prepare_schedule_with_comms(
            {
                rank: [_Action.from_str(str(action)) for action in actions]
                for rank, actions in enumerate(schedule.ranks)
            }
        )
        # Data parallelism gathers parameters itself, module by module, when they are used.
        self._runtime.register_custom_function(UNSHARD, _note_unsharded)
        self._runtime.register_custom_function(RESHARD, _note_resharded)

    def run(self, micro_batches: Sequence[Mapping[str, Any]], *, train: bool) -> list[Tensor]:
        runtime, stage = self._runtime, self._stage
        runtime._has_backward = stage.has_backward = train
        losses: list[Tensor] = []
        count = len(micro_batches)
        try:
            with torch.set_grad_enabled(train):
                stage.clear_runtime_states()
                runtime._step_microbatches(
                    [()] * count, [dict(m) for m in micro_batches], [None] * count,
                    losses, return_outputs=False,
                )  # fmt: skip
                stage.finish_sends()
        except RuntimeError as error:
            # The engine wraps whatever a stage raises; the cause is what a user can act on.
            if error.__cause__ is not None:
                raise error.__cause__ from None
            raise
        return [loss.detach() for loss in losses]


def _examples(types: Sequence[TensorType]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=t.differentiable)
        for t in types
    )


def _note_unsharded(action: _Action, ctx: _PipelineContext) -> None:
    cast(_PipelineScheduleRuntime, ctx.schedule_ref).unsharded_stages.add(action.stage_index)


def _note_resharded(action: _Action, ctx: _PipelineContext) -> None:
    cast(_PipelineScheduleRuntime, ctx.schedule_ref).unsharded_stages.discard(action.stage_index)


class _Stage(PipelineStage):
    """Torch's stage, but it allocates receive buffers when they are needed, frees what it sent, and
    leaves the reduction of gradients to ``sync``."""

    def __init__(self, *args: Any, sync: GradientSync, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sync = sync
        self._sends: dict[str, deque[dist.Work]] = {"F": deque(), "B": deque()}

    # Receive buffers: torch allocates one per micro-batch of the step and keeps them for ever.

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        device, self.device = self.device, torch.device("meta")
        try:
            super()._setup_forward_recv_info(num_microbatches, has_backward)
        finally:
            self.device = device

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        device, self.device = self.device, torch.device("meta")
        try:
            super()._setup_backward_recv_info(num_microbatches)
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _allocate(self, infos: Sequence[_RecvInfo]) -> None:
        for info in infos:
            if info.tensor_meta is not None and not info.is_root_arg:
                info.buffer = _make_tensor_from_meta(info.tensor_meta, self.device)

    def _release(self, infos: Sequence[_RecvInfo]) -> None:
        for info in infos:
            if info.tensor_meta is not None and not info.is_root_arg:
                info.buffer = None

    # Sends: torch holds all of a step's until its end.

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send("F", fwd_chunk_id, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send("B", bwd_chunk_id, super().get_bwd_send_ops(bwd_chunk_id))

    def _send(
        self, direction: str, micro_batch: int, operations: list[dist.P2POp]
    ) -> list[dist.P2POp]:
        if operations:
            with recorder.span("send", self.stage_index, micro_batch):
                self._start_sends(direction, operations)
        return []

    def _start_sends(self, direction: str, operations: list[dist.P2POp]) -> None:
        sends = self._sends[direction]
        for operation in operations:
            sends.append(
                operation.op(
                    operation.tensor.contiguous(),
                    group=operation.group,
                    group_dst=operation.group_peer,
                )
            )
        while len(sends) > _MAX_OPEN_SENDS * len(operations):
            sends.popleft().wait()

    def finish_sends(self) -> None:
        for sends in self._sends.values():
            while sends:
                sends.popleft().wait()

    # Computation

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with recorder.span("F", self.stage_index, fwd_chunk_id):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if not self.is_first:
            self._release(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        if not self.has_backward:
            self.fwd_cache.pop(bwd_chunk_id, None)  # evaluation: nothing needs it any more
            return
        with recorder.span("B", self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if not self.is_last:
            self._release(self.grad_recv_info[bwd_chunk_id])

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], None]:
        self._sync.before_backward(last=last_backward)
        outputs = bwd_kwargs["stage_output"]
        if not any(
            t.requires_grad for t in ((outputs,) if isinstance(outputs, Tensor) else outputs)
        ):
            return (None,) * len(bwd_kwargs["input_values"]), None  # everything so far is frozen
        gradients = stage_backward(outputs, bwd_kwargs["output_grads"], bwd_kwargs["input_values"])
        return gradients, None

    def _post_metadata_inference_cleanup(self) -> None:
        """Nothing: static metadata ran no stage (and torch would drop the gradients)."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing: the last micro-batch's backward has reduced them."""
