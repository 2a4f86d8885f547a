"""What ranks on this machine take from each other, measured."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.pipelines.model import LENGTH, RANKS, WIDTH, model
from benchmarks.pipelines.shared_cores import Machine

if TYPE_CHECKING:
    import ranks


def transfer(repeats: int = 50) -> float:
    """Seconds to send a stage's output from rank 0 to rank 1; half of the least round trip."""
    x, best = torch.zeros(1, LENGTH, WIDTH), float("inf")
    for _ in range(repeats):
        dist.barrier()
        begun = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(x, 1)
            dist.recv(x, 1)
        elif dist.get_rank() == 1:
            dist.recv(x, 0)
            dist.send(x, 0)
        best = min(best, time.perf_counter() - begun)
    return best / 2


class Scale(nn.Module):
    """A stage that does next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def message(steps: int = 10, num_micro_batches: int = 16) -> float:
    """Processor seconds of this rank per end of a transfer, in torch's 1F1B of empty stages."""
    torch.set_num_threads(1)
    act = torch.empty(1, LENGTH, WIDTH, device="meta", requires_grad=True)
    rank, group = dist.get_rank(), dist.group.WORLD
    stage = PipelineStage(
        Scale(), rank, RANKS, torch.device("cpu"), group=group, input_args=act, output_args=act
    )
    schedule = Schedule1F1B(
        stage, num_micro_batches, loss_fn=lambda y, _: y.sum(), scale_grads=False
    )
    x = torch.ones(num_micro_batches, LENGTH, WIDTH)
    arguments = (x,) if rank == 0 else ()
    keywords: dict[str, Any] = {"target": x} if rank == RANKS - 1 else {}
    schedule.step(*arguments, **keywords)
    dist.barrier()
    used = time.process_time()
    for _ in range(steps):
        schedule.step(*arguments, **keywords)
    ends = 2 * num_micro_batches * ((rank > 0) + (rank < RANKS - 1))
    return (time.process_time() - used) / steps / ends


def seconds_of_a_block(busy: int, repeats: int = 20) -> float:
    """Of forward and backward while so many ranks do the same; 0 on the others."""
    torch.set_num_threads(1)
    block, x = model().blocks[0], torch.randn(1, LENGTH, WIDTH)
    times = []
    dist.barrier()
    if dist.get_rank() < busy:
        for _ in range(repeats):
            begun = time.perf_counter()
            block(x).sum().backward()
            times.append(time.perf_counter() - begun)
    dist.barrier()
    return statistics.mean(times[repeats // 4 :]) if times else 0.0


def this_machine(pool: ranks.Pool) -> Machine:
    send_s, message_s = pool.run(transfer)[0], statistics.mean(pool.run(message))
    seconds = [max(pool.run(seconds_of_a_block, busy)) for busy in range(1, RANKS + 1)]
    return Machine(tuple(min(1.0, seconds[0] / s) for s in seconds), send_s, message_s)
