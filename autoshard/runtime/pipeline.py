"""Run stages under a schedule: a plain loop for one stage, torch's pipelining engine for more.

This is the only file that touches private names of ``torch.distributed.pipelining``. The engine is
fed with our own action lists and with static metadata, and every stage decides by itself when its
gradients are reduced (see :mod:`autoshard.runtime.data_parallel`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
from torch.distributed.pipelining.stage import _RecvInfo

from autoshard.ir import TensorType
from autoshard.lowering import Instruction, Lowered, lower
from autoshard.runtime import recorder
from autoshard.runtime.local_stages import LocalStage
from autoshard.runtime.mesh import wait_limit
from autoshard.runtime.split_backward import LateWeights, backward_of_inputs
from autoshard.schedule import Schedule

_MAX_OPEN_SENDS = 2
"""Sends of one direction that may be under way; older ones are waited for, so that what they send
can be freed. With two, a stage computes one micro-batch while the one before it is still sent."""


# It logs the whole schedule at every error; the error itself says what failed and where.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


class TransferError(RuntimeError):
    """Another rank of the pipeline did not send or receive."""


class GradientSync(Protocol):
    """What a runner tells data parallelism; see :mod:`autoshard.runtime.data_parallel`."""

    def before_backward(self, *, last: bool) -> None:
        """Called before each micro-batch's backward; ``last`` for the last one of the step."""


class Runner(Protocol):
    """Runs the micro-batches of one step through this rank's stages."""

    def run(self, arguments: Sequence[Sequence[Mapping[str, Any]]], *, train: bool) -> list[Tensor]:
        """Forward (and backward if ``train``) of every micro-batch.

        Args:
            arguments: per stage of this rank, per micro-batch, the stage's keyword arguments.

        Returns:
            On the rank of the last stage the detached loss addend of each micro-batch, in order;
            else nothing.
        """


class SingleStage:
    """Gradient accumulation: each micro-batch forward and backward before the next."""

    def __init__(self, stage: nn.Module, sync: GradientSync) -> None:
        self._stage = stage
        self._sync = sync

    def run(self, arguments: Sequence[Sequence[Mapping[str, Any]]], *, train: bool) -> list[Tensor]:
        (micro_batches,) = arguments
        losses = []
        with torch.set_grad_enabled(train):
            for index, keywords in enumerate(micro_batches):
                with recorder.span("F", 0, index):
                    loss: Tensor = self._stage(**keywords)
                if train:
                    self._sync.before_backward(last=index == len(micro_batches) - 1)
                    with recorder.span("B", 0, index):
                        loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
        return losses


class Pipeline:
    """Some stages of a pipeline, run by torch's engine.

    Args:
        stages: this rank's.
        syncs: one per stage.
        group: the ranks of the pipeline, in the order of the schedule's ranks.
        reduces: gradients are summed over data-parallel ranks.
    """

    def __init__(
        self,
        stages: Sequence[LocalStage],
        *,
        schedule: Schedule,
        syncs: Sequence[GradientSync],
        group: dist.ProcessGroup,
        device: torch.device,
        reduces: bool = False,
    ) -> None:
        self._stages = [
            _Stage(stage, schedule, device=device, group=group, sync=sync)
            for stage, sync in zip(stages, syncs, strict=True)
        ]
        self._runtime = _PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
            self._stages,
            schedule.num_micro_batches,
            loss_fn=lambda output, target: output,
            scale_grads=False,
        )
        self._training = _as_torch_has_it(lower(schedule, reduces=reduces))
        self._evaluation = _as_torch_has_it(lower(schedule, trains=False))
        self._runtime._prepare_schedule_with_comms(
            {rank: list(actions) for rank, actions in self._training.items()},
            format="compute_comms",
        )
        # Data parallelism gathers parameters itself, module by module, when they are used.
        self._runtime.unsharded_stages = {stage.index for stage in stages}

    def run(self, arguments: Sequence[Sequence[Mapping[str, Any]]], *, train: bool) -> list[Tensor]:
        runtime = self._runtime
        runtime._has_backward = train
        runtime.pipeline_order_with_comms = self._training if train else self._evaluation
        losses: list[Tensor] = []
        count = len(arguments[0])
        for stage, own in zip(self._stages, arguments, strict=True):
            stage.begin(own, train=train)
        try:
            with torch.set_grad_enabled(train):
                runtime._step_microbatches(
                    [()] * count, [{}] * count, [None] * count, losses, return_outputs=False
                )
                for stage in self._stages:
                    stage.finish_sends()
        except TransferError:
            raise
        except RuntimeError as error:
            # The engine wraps whatever a stage raises; the cause is what a user can act on.
            if error.__cause__ is not None:
                raise error.__cause__ from None
            raise
        return [loss.detach() for loss in losses]


_TORCH_NAMES = {"REDUCE": "REDUCE_GRAD"}
_NOT_IN_TORCH = frozenset({"GATHER", "STEP"})
"""Parameters gather themselves when they are used, and the engine steps after the schedule."""


def _as_torch_has_it(lowered: Lowered) -> dict[int, list[_Action]]:
    def action(i: Instruction) -> _Action:
        number = "" if i.micro_batch is None else i.micro_batch
        found: _Action = _Action.from_str(f"{i.stage}{_TORCH_NAMES.get(i.what, i.what)}{number}")
        return found

    return {
        rank: [action(i) for i in instructions if i.what not in _NOT_IN_TORCH]
        for rank, instructions in enumerate(lowered.ranks)
    }


def _examples(types: Sequence[TensorType]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=t.differentiable)
        for t in types
    )


def _empty(info: _RecvInfo, device: torch.device) -> Tensor:
    meta = info.tensor_meta
    assert meta is not None
    return torch.empty(meta.shape, dtype=meta.dtype, device=device)


class _Stage(PipelineStage):
    """Torch's stage, but it allocates receive buffers when they are needed, frees what it sent,
    splits backward in its own way (:mod:`autoshard.runtime.split_backward`), and leaves the
    reduction of gradients to ``sync``.

    Where activations are recomputed, the first half of a backward that is split is all of it: two
    halves would compute them twice.
    """

    def __init__(
        self,
        stage: LocalStage,
        schedule: Schedule,
        *,
        device: torch.device,
        group: dist.ProcessGroup,
        sync: GradientSync,
    ) -> None:
        loss = torch.empty((), device="meta", requires_grad=True)
        is_last = stage.index == schedule.num_stages - 1
        super().__init__(
            stage.module, stage.index, schedule.num_stages, device, group=group,
            input_args=_examples(stage.inputs) if stage.index else (),
            output_args=loss if is_last else _examples(stage.outputs),
        )  # fmt: skip
        self._limit = wait_limit(group)
        self._recomputes = stage.recomputes
        self._sync = sync
        self._sends: dict[str, deque[dist.Work]] = {"F": deque(), "B": deque()}
        self._arguments: Sequence[Mapping[str, Any]] = ()
        self._receives: dict[tuple[str, int], list[dist.Work]] = {}
        self._late: dict[int, LateWeights] = {}
        self._backwards_left = 0
        self._reduces_late = False

    def begin(self, arguments: Sequence[Mapping[str, Any]], *, train: bool) -> None:
        """Start a step of these micro-batches."""
        self.has_backward = train
        self.clear_runtime_states()
        self._arguments = arguments
        self._backwards_left = len(arguments)
        self._reduces_late = False

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
        return self._receive("F", fwd_chunk_id, super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.grad_recv_info[bwd_chunk_id])
        return self._receive("B", bwd_chunk_id, super().get_bwd_recv_ops(bwd_chunk_id))

    def _receive(
        self, direction: str, micro_batch: int, operations: list[dist.P2POp]
    ) -> list[dist.P2POp]:
        try:
            self._receives[direction, micro_batch] = [
                operation.op(
                    operation.tensor, group=operation.group, group_src=operation.group_peer
                )
                for operation in operations
            ]
        except RuntimeError as error:
            raise self._not_received(direction, micro_batch, error) from error
        return []

    def _await(self, direction: str, micro_batch: int) -> None:
        """Until what another rank sends has come; nothing for a stage of this rank."""
        try:
            for work in self._receives.pop((direction, micro_batch), ()):
                self._wait(work)
        except RuntimeError as error:
            raise self._not_received(direction, micro_batch, error) from error

    def _wait(self, work: dist.Work) -> None:
        work.wait(self._limit) if self._limit else work.wait()

    def _not_received(self, direction: str, micro_batch: int, error: Exception) -> TransferError:
        what, peer = ("activations", -1) if direction == "F" else ("gradients", 1)
        return self._in_vain(f"{what} of micro-batch {micro_batch} from", peer, error)

    def _not_sent(self, direction: str, error: Exception) -> TransferError:
        return self._in_vain("a transfer to", 1 if direction == "F" else -1, error)

    def _in_vain(self, what: str, peer: int, error: Exception) -> TransferError:
        stage = self.stage_index + peer
        return TransferError(
            f"stage {self.stage_index} on pipeline rank {self.group_rank} waited in vain for "
            f"{what} stage {stage} on pipeline rank {self.stage_index_to_group_rank[stage]} "
            f"({error}): that rank, or one that it waits for, has failed or hangs; see the "
            "first error of the others"
        )

    def _allocate(self, infos: Sequence[_RecvInfo]) -> None:
        for info in infos:
            if info.tensor_meta is not None and not info.is_root_arg:
                info.buffer = _empty(info, self.device)

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
        try:
            for operation in operations:
                tensor, peer = operation.tensor.contiguous(), operation.group_peer
                work = operation.op(tensor, group=operation.group, group_dst=peer)
                self._sends[direction].append(work)
        except RuntimeError as error:
            raise self._not_sent(direction, error) from error
        self._wait_for_sends(direction, _MAX_OPEN_SENDS * len(operations))

    def _wait_for_sends(self, direction: str, but_for: int = 0) -> None:
        try:
            while len(self._sends[direction]) > but_for:
                self._wait(self._sends[direction].popleft())
        except RuntimeError as error:
            raise self._not_sent(direction, error) from error

    def finish_sends(self) -> None:
        for direction in self._sends:
            self._wait_for_sends(direction)

    # Computation

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Any:
        self._await("F", fwd_chunk_id)
        with recorder.span("F", self.stage_index, fwd_chunk_id):
            output = super().forward_one_chunk(
                fwd_chunk_id, args, dict(self._arguments[fwd_chunk_id]), save_forward_output
            )
        if not self.is_first:
            self._release(self.args_recv_info[fwd_chunk_id])
        return output

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Torch would clear a receive buffer where there is no gradient; we have none yet."""
        for info, gradient in zip(
            self.grad_recv_info[mb_index], next_stage_bwd_outputs, strict=True
        ):
            if info.tensor_meta is not None:
                if gradient is None:
                    gradient = _empty(info, self.device).zero_()
                info.buffer = gradient

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: Any = None,
    ) -> None:
        self._await("B", bwd_chunk_id)
        with recorder.span("B" if full_backward else "I", self.stage_index, bwd_chunk_id):
            if full_backward or self._recomputes:
                super().backward_one_chunk(bwd_chunk_id, loss=loss)
            else:
                self._backward_of_inputs(bwd_chunk_id, loss)
        if not self.is_last:
            self._release(self.grad_recv_info[bwd_chunk_id])

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], None]:
        self._backwards_left -= 1
        self._sync.before_backward(last=not self._backwards_left)
        outputs = bwd_kwargs["stage_output"]
        if not any(
            t.requires_grad for t in ((outputs,) if isinstance(outputs, Tensor) else outputs)
        ):
            return (None,) * len(bwd_kwargs["input_values"]), None  # everything so far is frozen
        gradients = stage_backward(outputs, bwd_kwargs["output_grads"], bwd_kwargs["input_values"])
        return gradients, None

    def _backward_of_inputs(self, micro_batch: int, loss: Tensor | None) -> None:
        outputs, inputs = self.fwd_cache.pop(micro_batch)
        if self.is_last:
            assert loss is not None
            outputs, arrived = (loss,), (torch.ones_like(loss),)
        else:
            arrived = self._retrieve_recv_grads(micro_batch)  # type: ignore[no-untyped-call]
        received = inputs[: len(self.args_recv_info[micro_batch])]
        self._sync.before_backward(last=False)
        found, self._late[micro_batch] = backward_of_inputs(outputs, arrived, received)
        self.bwd_cache[micro_batch] = found
        if loss is not None:
            loss.detach_()  # torch keeps it until the end of the step, and the graph with it

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        late = self._late.pop(bwd_chunk_id, None)
        if late is None:  # the first half has done it
            return
        self._backwards_left -= 1
        self._reduces_late = isinstance(self.submod, FSDPModule)
        self._sync.before_backward(last=not self._backwards_left and not self._reduces_late)
        with recorder.span("W", self.stage_index, bwd_chunk_id):
            late.run()

    def _post_metadata_inference_cleanup(self) -> None:
        """Nothing: static metadata ran no stage (and torch would drop the gradients)."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """FSDP2 reduces in a backward through a module's inputs, where a split backward has no
        gradients of weights yet: it is told afterwards. Otherwise the last backward has done it."""
        if self._reduces_late:
            super().perform_reduce_grad(grad_scale_factor)  # type: ignore[no-untyped-call]
