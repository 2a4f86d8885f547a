"""What ranks of replicated stages send each other: activations, gradients, losses."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from autoshard.errors import OptionError
from autoshard.ir import TensorType
from autoshard.runtime.engine import EngineConfig
from autoshard.runtime.mesh import DEFAULT_TIMEOUT, Mesh
from autoshard.runtime.pipeline import TransferError
from autoshard.versioned import Action, Rules


@dataclass(frozen=True, slots=True)
class Place:
    """Where this rank is in a replicated pipeline, and whom it talks to.

    Attributes:
        forward, backward, losses: groups of all ranks, one for each kind of message.
        replicas: the ranks of this stage; ``None`` if there is one.
        timeout: of all groups.
    """

    rules: Rules
    rank: int
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    losses: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    timeout: timedelta = DEFAULT_TIMEOUT

    @staticmethod
    def create(rules: Rules, timeout: timedelta = DEFAULT_TIMEOUT) -> Place:
        """Make the groups; every rank calls this with the same rules.

        Args:
            timeout: after which a rank that waits for another gives up.
        """
        rank = dist.get_rank()
        forward, backward, losses = (dist.new_group(timeout=timeout) for _ in range(3))
        replicas = None
        for stage, count in enumerate(rules.replicas):
            if count > 1:
                group = dist.new_group(list(rules.ranks_of(stage)), timeout=timeout)
                replicas = group if rank in rules.ranks_of(stage) else replicas
        return Place(rules, rank, forward, backward, losses, replicas, timeout)

    @property
    def stage(self) -> int:
        """The stage of this rank."""
        return self.rules.stage_of(self.rank)

    @property
    def mesh(self) -> Mesh:
        """One rank of a pipeline, which holds its stage whole."""
        sizes = {"pp": self.rules.num_stages, "dp": 1, "tp": 1}
        return Mesh(sizes, {"pp": self.stage})

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A block in which this rank waits for others.

        Raises:
            TransferError: one of them is gone, or does not answer within the groups' timeout.
        """
        try:
            yield
        except RuntimeError as error:
            raise TransferError(
                f"stage {self.stage} on rank {self.rank} waited in vain for {what} ({error}): that "
                "rank, or one that it waits for, has failed or hangs; see the first error of the "
                "others"
            ) from error


class Wire:
    """Activations and gradients between the replicas of neighbouring stages."""

    def __init__(self, place: Place, config: EngineConfig, device: torch.device) -> None:
        self._place, self._device = place, device
        self._inputs, self._outputs = config.inputs, config.outputs
        self._expected: dict[Action, list[tuple[Tensor, dist.Work]]] = {}
        self._sends: dict[tuple[int, str], deque[list[tuple[Tensor, dist.Work]]]] = {}

    def expect(self, action: Action) -> None:
        """Begin to receive what an action needs."""
        rules = self._place.rules
        if action.what == "S" or action in self._expected:
            return
        if action.what == "F":
            if action.stage == 0:
                return
            peer, types, group = action.stage - 1, self._inputs, self._place.forward
        else:
            if action.stage == rules.num_stages - 1:
                return
            types = tuple(t for t in self._outputs if t.dtype.is_floating_point)
            peer, group = action.stage + 1, self._place.backward
        source = rules.home(peer, action.micro_batch)
        with self._place.waiting(_message(action, source)):
            self._expected[action] = [self._receive(t, source, group) for t in types]

    def _receive(
        self, kind: TensorType, source: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, dist.Work]:
        buffer = torch.empty(kind.shape, dtype=kind.dtype, device=self._device)
        work = dist.irecv(buffer, group=group, group_src=source)
        assert work is not None
        return buffer, work

    def activations(self, action: Action) -> tuple[Tensor, ...]:
        """What the stage before has sent for a forward."""
        self.expect(action)
        received = self._arrived(action)
        return tuple(
            t.requires_grad_(kind.differentiable and torch.is_grad_enabled())
            for t, kind in zip(received, self._inputs if received else (), strict=True)
        )

    def gradients(self, action: Action) -> list[Tensor]:
        """Of a stage's floating-point outputs; none on the last stage."""
        return self._arrived(action)

    def _arrived(self, action: Action) -> list[Tensor]:
        received = self._expected.pop(action, [])
        if received:
            stage = action.stage + (-1 if action.what == "F" else 1)
            source = self._place.rules.home(stage, action.micro_batch)
            with self._place.waiting(_message(action, source)):
                _wait_all(received)
        return [buffer for buffer, _ in received]

    def send_activations(self, action: Action, outputs: Sequence[Tensor]) -> None:
        peer = self._place.rules.home(action.stage + 1, action.micro_batch)
        self._send([t.detach() for t in outputs], action, peer, self._place.forward)

    def send_gradients(self, action: Action, inputs: Sequence[Tensor]) -> None:
        """Of the floating-point inputs; one that nothing has used has a gradient of zeros."""
        if action.stage == 0:
            return
        peer = self._place.rules.home(action.stage - 1, action.micro_batch)
        floating = [t for t in inputs if t.dtype.is_floating_point]
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in floating]
        self._send(gradients, action, peer, self._place.backward)

    def _send(
        self, tensors: Sequence[Tensor], action: Action, peer: int, group: dist.ProcessGroup
    ) -> None:
        """Begin to send; waits for what must have arrived by now, so that it can be freed.

        That is what was sent more micro-batches ago than the earlier of the two stages has in
        flight: their backwards have run there, after the arrival of what they need.
        """
        open_ = self._sends.setdefault((peer, action.what), deque())
        held = [t.contiguous() for t in tensors]
        earlier = action.stage if action.what == "F" else action.stage - 1
        with self._place.waiting(f"rank {peer} to receive"):
            open_.append([(t, _isend(t, group, peer)) for t in held])
            while len(open_) > self._place.rules.in_flight(earlier) + 1:
                _wait_all(open_.popleft())

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for (peer, _), open_ in self._sends.items():
            with self._place.waiting(f"rank {peer} to receive"):
                while open_:
                    _wait_all(open_.popleft())


def _message(action: Action, source: int) -> str:
    """What an action needs from a rank."""
    what = "activations" if action.what == "F" else "gradients"
    return f"{what} of micro-batch {action.micro_batch} from rank {source}"


def _isend(tensor: Tensor, group: dist.ProcessGroup, peer: int) -> dist.Work:
    work = dist.isend(tensor, group=group, group_dst=peer)
    assert work is not None
    return work


def _wait_all(messages: Iterable[tuple[Tensor, dist.Work]]) -> None:
    for _, work in messages:
        work.wait()


class Losses:
    """The loss of each step, on every rank: the last stage's replicas send their parts to all.

    A fingerprint of the batch goes with it, so that ranks that were given different ones notice.
    """

    def __init__(self, place: Place, device: torch.device) -> None:
        self._place, self._device = place, device
        self._senders = place.rules.ranks_of(place.rules.num_stages - 1)
        self._own = 0.0
        self._fingerprint = 0
        self._parts: list[Tensor] = []
        self._open: deque[tuple[int, list[tuple[Tensor, dist.Work | None]]]] = deque()
        self._sends: deque[list[tuple[Tensor, dist.Work]]] = deque()

    def begin(self, batch: int) -> None:
        """A step begins, with a batch of this fingerprint."""
        self._fingerprint, self._parts = batch, []

    def add(self, loss: Tensor) -> None:
        """An addend of the step's loss, on the last stage."""
        self._parts.append(loss)

    def share(self) -> None:
        """Send what was added since the step began, and begin to receive the others' parts."""
        with self._place.waiting("the loss of a step"):
            self._share()

    def _share(self) -> None:
        own = float(sum(float(part) for part in self._parts))
        message = torch.tensor([own, self._fingerprint], dtype=torch.float64, device=self._device)
        arriving: list[tuple[Tensor, dist.Work | None]] = []
        for sender in self._senders:
            if sender == self._place.rank:
                arriving.append((message, None))
                continue
            buffer = torch.empty_like(message)
            arriving.append(
                (buffer, dist.irecv(buffer, group=self._place.losses, group_src=sender))
            )
        self._open.append((self._fingerprint, arriving))
        if self._place.rank in self._senders:
            peers = [p for p in range(self._place.rules.num_ranks) if p != self._place.rank]
            self._sends.append([(message, _isend(message, self._place.losses, p)) for p in peers])
        # A step's activations come from ranks that have ended the step before, and so have taken
        # the loss of ``delay`` steps before that.
        while len(self._sends) > self._place.rules.delay + 3:
            _wait_all(self._sends.popleft())

    def finish(self) -> None:
        """Wait until all that was sent has arrived: gloo drops what is freed before."""
        with self._place.waiting("all ranks to take the loss of a step"):
            while self._sends:
                _wait_all(self._sends.popleft())

    def take(self, delay: int) -> float:
        """The oldest loss, if more than ``delay`` steps' are to be had; else ``nan``."""
        return self._wait(self._open.popleft()) if len(self._open) > delay else math.nan

    def take_last(self) -> float:
        """The newest one."""
        return self._wait(self._open.pop())

    def take_all(self) -> list[float]:
        return [self._wait(self._open.popleft()) for _ in range(len(self._open))]

    def _wait(self, entry: tuple[int, list[tuple[Tensor, dist.Work | None]]]) -> float:
        own, arriving = entry
        total = 0.0
        for buffer, work in arriving:
            if work is not None:
                with self._place.waiting("the loss of a step"):
                    work.wait()
            loss, theirs = buffer.tolist()
            if int(theirs) != own:
                raise OptionError(
                    "expected the same global batch on all ranks but got different ones; a "
                    "replicated pipeline hands out micro-batches itself, so give every rank the "
                    "whole batch (local_batch and sampler do)"
                )
            total += loss
        return total
