"""Asynchronous data parallelism: workers do not wait for each other's gradients.

Every rank is a worker and serves a share of the weights. A worker sends the gradient of its
minibatch to the ranks that serve them, each of which makes one update per gradient, in the order of
arrival, and answers with its newest weights: on those the worker goes on (Dean et al. 2012, "Large
scale distributed deep networks", section 4.1). With a bound, a server answers a worker only when
the slowest one is at most so many minibatches behind (Ho et al. 2013, "More effective distributed
ML via a stale synchronous parallel parameter server"); with bound 0 all go in step, yet each
gradient is an update of its own.

A server is a thread per worker, which waits for that worker's gradients. Servers do not agree on an
order of arrival, so parameters of different servers may meet gradients in different orders.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoshard.errors import LaunchError, OptionError
from autoshard.runtime import data, launch
from autoshard.runtime import mesh as meshes
from autoshard.runtime import optimizer as optimizers
from autoshard.runtime.engine import EngineConfig, Slot, prologue
from autoshard.runtime.mesh import DEFAULT_TIMEOUT, Mesh
from autoshard.runtime.parameters import declared
from autoshard.runtime.random import make_key

_STOP = -1.0
"""The clock of a message that ends a server's thread."""

Order = Callable[[int, int], int]
"""From a worker and its clock to the place of that gradient among all updates."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One of the ranks, and the groups that it talks through.

    Attributes:
        bound: minibatches that a worker may be ahead of the slowest; ``None``: any number.
        requests, answers: groups of all ranks, for gradients and for weights.
        control: a group of all ranks for what they do together.
    """

    rank: int
    size: int
    bound: int | None
    requests: dist.ProcessGroup
    answers: dist.ProcessGroup
    control: dist.ProcessGroup
    timeout: timedelta = DEFAULT_TIMEOUT

    @staticmethod
    def create(bound: int | None, timeout: timedelta = DEFAULT_TIMEOUT) -> Worker:
        """Make the groups; every rank calls this alike.

        Args:
            timeout: after which a rank that waits for another gives up.
        """
        requests, answers, control = (dist.new_group(timeout=timeout) for _ in range(3))
        rank, size = dist.get_rank(), dist.get_world_size()
        return Worker(rank, size, bound, requests, answers, control, timeout)

    @property
    def mesh(self) -> Mesh:
        """One rank, which holds the model whole."""
        return Mesh({"pp": 1, "dp": 1, "tp": 1})


class AsynchronousEngine:
    """Trains a model on this rank and serves a share of its weights; every rank makes one.

    Args:
        stage: the whole model, emitted, with its parameters loaded.
        order: makes all servers apply gradients in a given order, rather than as they arrive.

    Attributes:
        step_number: minibatches of this worker.
        clocks: the gradients that each worker's updates have been made of, as this server saw them.

    Raises:
        OptionError: for an unknown optimizer, or one that looks at whole tensors.
    """

    def __init__(
        self,
        stage: nn.Module,
        *,
        worker: Worker,
        config: EngineConfig,
        optimizer: str | optimizers.OptimizerFactory = "adamw",
        order: Order | None = None,
    ) -> None:
        self.module, self.worker, self.config, self.mesh = stage, worker, config, worker.mesh
        self.device = next((p.device for p in stage.parameters()), torch.device("cpu"))
        self.step_number = 0
        self.set_max_norm(config.max_norm)
        self.slots = tuple(_slots(stage))
        self.optimizer = optimizers.build(
            optimizer, [slot.local for slot in self.slots], split=False
        )
        self.scheduler: LRScheduler | None = None
        self.scheduler_state: dict[str, Any] | None = None
        self._shares = _deal([slot.local.numel() for slot in self.slots], worker.size)
        self._server = _Server(self, order)

    # -- what a user calls ------------------------------------------------------------------------

    def step(self, local_batch: object) -> float:
        """Train on this worker's minibatch.

        Returns:
            Its loss, by the weights that the worker had.

        Raises:
            OptionError: if the batch is not what :meth:`Parallel.local_batch` gives.
            LaunchError: another worker or server does not answer.
        """
        with launch.guarded(), meshes.using(self.mesh):
            self.module.train()
            self._server.start()
            loss = self._run(local_batch, train=True)
            self._exchange()
            self.step_number += 1
            return loss

    def evaluate(self, local_batch: object) -> float:
        """The mean of the losses of all workers' minibatches in evaluation mode, on the newest
        weights; the same on every rank."""
        self.empty()
        with launch.guarded(), meshes.using(self.mesh), torch.no_grad():
            was_training = self.module.training
            self.module.eval()
            try:
                mine = self._run(local_batch, train=False)
            finally:
                self.module.train(was_training)
            every: list[float] = [0.0] * self.worker.size
            with _waiting():
                dist.all_gather_object(every, mine, group=self.worker.control)
            return sum(every) / self.worker.size

    def drain(self) -> list[float]:
        """Wait until all workers are here, and take the newest weights; no loss is left."""
        self.empty()
        return []

    def empty(self) -> None:
        """All workers have made all updates and hold the newest weights and all of the optimizer's
        state; they must have made the same number of steps."""
        with launch.guarded(), torch.no_grad(), _waiting():
            steps: list[int] = [0] * self.worker.size
            dist.all_gather_object(steps, self.step_number, group=self.worker.control)
            if len(set(steps)) > 1:
                raise OptionError(
                    "expected all workers to have made the same number of steps before they "
                    f"drain, save or evaluate together but got {steps}; make the same calls on "
                    "every rank"
                )
            self._server.stop()
            for owner, share in enumerate(self._shares):
                for index in share:
                    self._spread(self.slots[index], owner)

    def _spread(self, slot: Slot, owner: int) -> None:
        """Give every rank a parameter and its state as its server has them."""
        source = dist.get_global_rank(self.worker.control, owner)
        dist.broadcast(slot.holder.data, source, group=self.worker.control)
        state = [self.optimizer.state.get(slot.local, {})]
        dist.broadcast_object_list(state, source, group=self.worker.control)
        if owner != self.worker.rank:
            self.optimizer.state[slot.local] = state[0]

    def zero_grad(self) -> None:
        """Forget this worker's gradient; that of an update in work is the server's own."""
        for slot in self.slots:
            slot.holder.grad = None

    def set_max_norm(self, max_norm: float | None) -> None:
        """Clip each minibatch's gradient to this norm from the next step on; ``None``: do not."""
        self.max_norm = max_norm

    def set_scheduler(self, scheduler: Callable[[Optimizer], LRScheduler]) -> LRScheduler:
        """Step a scheduler once per step of this rank's worker."""
        with self._server.lock:
            made = optimizers.make_scheduler(scheduler, self.optimizer, self.scheduler_state)
        self.scheduler = made
        return made

    @property
    def order_of_updates(self) -> list[tuple[int, int]]:
        """(worker, clock) of the updates that this server has made, in order."""
        return list(self._server.made)

    # -- a worker's step --------------------------------------------------------------------------

    def _run(self, batch: object, *, train: bool) -> float:
        config = self.config
        named = data.named_batch(batch, config.batch)
        data.check_batch(named, config.batch, self.worker.size)
        local = {name: tensor.to(self.device) for name, tensor in named.items()}
        count = config.num_micro_batches // config.standalone
        wanted = tuple(getattr(self.module, "BATCH", ()))
        with torch.set_grad_enabled(train):
            if train:
                self.zero_grad()
            shared = prologue(self.module, local, count)
            total = 0.0
            for index, part in enumerate(data.micro_batches(local, config.batch, count)):
                place = self.worker.rank * count + index
                arguments: Mapping[str, Any] = {
                    "key": make_key(config.seed, self.step_number, place),
                    **{name: part[name] for name in wanted},
                    **shared[index],
                }
                loss: Tensor = self.module(**arguments)
                if train:
                    loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total

    def _exchange(self) -> None:
        """Send the gradient to the servers, in parts, and take the weights that they answer with.

        Raises:
            LaunchError: one does not answer.
        """
        worker = self.worker
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_([s.holder for s in self.slots], self.max_norm)
        sent, answers = [], []
        for owner, share in enumerate(self._shares):
            if owner != worker.rank:
                message = self._gradient(share)
                buffer = torch.empty(message.numel() - 1, dtype=message.dtype, device=self.device)
                with self._server.waiting():
                    sent.append((message, _isend(message, worker.requests, owner)))
                    answers.append((share, buffer, _irecv(buffer, worker.answers, owner)))
        own = self._shares[worker.rank]
        weights = self._server.apply(worker.rank, self._gradient(own))
        with self._server.waiting():
            for _, work in sent:
                work.wait()
            for share, buffer, answer in answers:
                answer.wait()
                self._take(share, buffer)
        self._take(own, weights)
        if self.scheduler is not None:
            with self._server.lock:
                self.scheduler.step()

    def _gradient(self, share: Sequence[int]) -> Tensor:
        """This worker's clock, and the gradients of some parameters, flat, in float64 if any is."""
        kinds = [slot.local.dtype for slot in self.slots]
        kind = torch.float64 if torch.float64 in kinds else torch.float32
        parts = [torch.tensor([float(self.step_number)], dtype=kind, device=self.device)]
        for index in share:
            gradient = self.slots[index].holder.grad
            like = self.slots[index].local
            own = torch.zeros_like(like) if gradient is None else gradient
            parts.append(own.detach().reshape(-1).to(kind))
        return torch.cat(parts)

    def _take(self, share: Sequence[int], weights: Tensor) -> None:
        """Put weights that a server has answered with where forward finds them."""
        offset = 0
        with torch.no_grad():
            for index in share:
                holder = self.slots[index].holder
                own = weights[offset : offset + holder.numel()]
                holder.copy_(own.view(holder.shape))
                offset += holder.numel()


class _Server:
    """Makes updates of a share of the weights.

    The served weights are the slots' ``local`` tensors, apart from the worker's own ``holder``.
    """

    def __init__(self, engine: AsynchronousEngine, order: Order | None) -> None:
        self._engine, self._order = engine, order
        self._worker = engine.worker
        self._share = engine._shares[self._worker.rank]
        self.lock = threading.Condition()
        self.made: list[tuple[int, int]] = []
        self._clocks = [0] * self._worker.size
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begin to serve, if it does not yet: from the worker's present weights and clock."""
        if self._threads or self._worker.size == 1:
            return
        self._clocks = [self._engine.step_number] * self._worker.size
        with torch.no_grad():
            for slot in self._engine.slots:
                slot.local.copy_(slot.holder)
        peers = [peer for peer in range(self._worker.size) if peer != self._worker.rank]
        self._threads = [
            threading.Thread(target=self._serve, args=(peer,), daemon=True) for peer in peers
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End when all workers have said that they are done; the served weights become its own."""
        if not self._threads:
            return
        engine, open_ = self._engine, []
        with self.waiting():
            for owner, share in enumerate(engine._shares):
                if owner != self._worker.rank:
                    message = engine._gradient(share)
                    message[0] = _STOP
                    open_.append((message, _isend(message, self._worker.requests, owner)))
            for _, work in open_:
                work.wait()
        for thread in self._threads:
            thread.join(self._worker.timeout.total_seconds())
        self._raise_failure()
        if any(thread.is_alive() for thread in self._threads):
            raise LaunchError(
                "expected all workers to say that they are done but one does not; see its output"
            )
        self._threads = []
        with torch.no_grad():
            for index in self._share:
                engine.slots[index].holder.copy_(engine.slots[index].local)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which the worker talks to other servers: a send fails at once if its receiver
        is known to be gone, later if it goes.

        Raises:
            LaunchError: one is gone or does not answer, or this rank's server has failed.
        """
        try:
            with _waiting():
                yield
        except LaunchError:
            self._raise_failure()
            raise

    def apply(self, worker: int, message: Tensor) -> Tensor:
        """Make an update of a worker's gradient, and return the newest weights when it may go on.

        Raises:
            LaunchError: that takes longer than the timeout.
        """
        clock, engine = int(message[0].item()), self._engine
        with self.lock:
            if (order := self._order) is not None:
                self._await(lambda: len(self.made) == order(worker, clock), worker, clock)
            self._update(message[1:])
            self.made.append((worker, clock))
            self._clocks[worker] = clock + 1
            self.lock.notify_all()
            if self._worker.bound is not None:
                bound = self._worker.bound
                self._await(lambda: clock + 1 - min(self._clocks) <= bound, worker, clock)
            flat = [engine.slots[index].local.detach().reshape(-1) for index in self._share]
            return torch.cat([message[:0], *(part.to(message.dtype) for part in flat)])

    def _await(self, condition: Callable[[], bool], worker: int, clock: int) -> None:
        seconds = self._worker.timeout.total_seconds()

        def ready() -> bool:
            return self._failure is not None or condition()

        if not self.lock.wait_for(ready, seconds) or self._failure is not None:
            raise LaunchError(
                f"worker {worker} waits after minibatch {clock} for slower ones, which stand at "
                f"{self._clocks}, and they do not go on ({self._failure or f'{seconds:g} s'}); see "
                "their output"
            )

    def _update(self, gradient: Tensor) -> None:
        engine, offset = self._engine, 0
        for index in self._share:
            local = engine.slots[index].local
            own = gradient[offset : offset + local.numel()]
            local.grad = own.view(local.shape).to(local.dtype)
            offset += local.numel()
        engine.optimizer.step()
        for index in self._share:
            engine.slots[index].local.grad = None

    def _serve(self, peer: int) -> None:
        """Answer one worker until it stops."""
        size = sum(self._engine.slots[index].local.numel() for index in self._share)
        kind = self._engine._gradient([]).dtype
        try:
            while True:
                message = torch.empty(1 + size, dtype=kind, device=self._engine.device)
                _irecv(message, self._worker.requests, peer).wait()
                if float(message[0]) == _STOP:
                    return
                _isend(self.apply(peer, message), self._worker.answers, peer).wait()
        except Exception as error:
            with self.lock:
                self._failure = self._failure or error
                self.lock.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise LaunchError(
                f"expected gradients from all workers but one has failed ({self._failure}); see "
                "its output"
            ) from self._failure


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """A block in which a worker waits for others.

    Raises:
        LaunchError: one of them is gone, or does not answer within the groups' timeout.
    """
    try:
        yield
    except LaunchError:
        raise
    except RuntimeError as error:
        raise LaunchError(
            "expected another worker to take gradients, send weights or come to the end of its "
            f"steps but it did not ({error}); see its output"
        ) from error


def _isend(tensor: Tensor, group: dist.ProcessGroup, peer: int) -> dist.Work:
    work = dist.isend(tensor, group=group, group_dst=peer)
    assert work is not None
    return work


def _irecv(tensor: Tensor, group: dist.ProcessGroup, peer: int) -> dist.Work:
    work = dist.irecv(tensor, group=group, group_src=peer)
    assert work is not None
    return work


def _deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices in ``count`` shares of about equal size, whole parameters each, largest first."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = min(range(count), key=loads.__getitem__)
        shares[least].append(index)
        loads[least] += sizes[index]
    return [sorted(share) for share in shares]


def _slots(stage: nn.Module) -> Iterator[Slot]:
    """Parameters of the worker, each with a copy of its own that the server steps."""
    seen: set[Tensor] = set()
    for name, declaration, tensor in declared(stage):
        if not declaration.buffer and tensor.requires_grad and tensor not in seen:
            assert isinstance(tensor, nn.Parameter)
            seen.add(tensor)
            yield Slot(name, declaration, tensor, nn.Parameter(tensor.detach().clone()), True)
