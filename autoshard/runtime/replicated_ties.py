"""Weights that several stages of a replicated pipeline use: the first of them makes the updates.

The owner of a tied weight sums the gradients of all stages that use it, which these have summed
over their replicas, and sends them the new weights. So there is one optimizer state, every copy has
the same bits, and a stage may take the weights later than they are made
(:meth:`autoshard.versioned.Rules.tie_lag`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoshard.runtime.parameters import declared

if TYPE_CHECKING:
    from autoshard.runtime.replica_wire import Place


class ReplicatedTies:
    """The tied weights of this rank's stage; every rank makes one.

    Args:
        stages: name -> the stages that train it, ascending; only where they are several.

    Attributes:
        place: with the rules of a schedule that knows the ties.
        given: name -> the other stages, of weights that this stage owns.
        taken: name -> the owner, of the others.
    """

    def __init__(self, place: Place, stages: Mapping[str, tuple[int, ...]]) -> None:
        pairs = {(owner, other) for owner, *others in stages.values() for other in others}
        self.place = replace(place, rules=replace(place.rules, ties=tuple(sorted(pairs))))
        own = {name: held for name, held in sorted(stages.items()) if place.stage in held}
        self.given = {n: held[1:] for n, held in own.items() if held[0] == place.stage}
        self.taken = {n: held[0] for n, held in own.items() if held[0] != place.stage}
        self._group = dist.new_group(timeout=place.timeout) if pairs else None
        self._versions = dict.fromkeys(self.taken, 0)
        rules = self.place.rules
        # Of the updates that are under way between this stage and others: what they have sent.
        self._sends: deque[list[tuple[Tensor, dist.Work]]] = deque()
        self._open = 2 + max((rules.tie_lag(*p) for p in pairs if place.stage in p), default=0)

    @staticmethod
    def between_stages(stage: nn.Module, place: Place) -> ReplicatedTies:
        """Ask every rank for the names that it trains; collective."""
        mine = [n for n, d, tensor in declared(stage) if tensor.requires_grad and not d.buffer]
        every: list[list[str]] = [[]] * place.rules.num_ranks
        with place.waiting("the names of the weights of all stages"):
            dist.all_gather_object(every, mine, group=place.losses)
        stages: dict[str, list[int]] = {}
        for index in range(place.rules.num_stages):
            for name in dict.fromkeys(every[place.rules.ranks_of(index)[0]]):
                stages.setdefault(name, []).append(index)
        return ReplicatedTies(place, {n: tuple(s) for n, s in stages.items() if len(s) > 1})

    def sum_gradients(self, module: nn.Module) -> None:
        """Add those of all stages to the owner's; the others' are gone afterwards.

        Args:
            module: what the gradients of an update lie with.
        """
        if not self.given and not self.taken:
            return
        self._wait_for_sends(but_for=self._open)
        self._sends.append([])
        held = _trained(module)
        for name, owner in self.taken.items():
            gradient = held[name].grad
            own = torch.zeros_like(held[name]) if gradient is None else gradient.contiguous()
            self._send(own.detach(), owner)
            held[name].grad = None
        for name, others in self.given.items():
            for other in others:
                part = self._receive(held[name], other, f"the gradient of {name}")
                gradient = held[name].grad
                held[name].grad = part if gradient is None else gradient.add_(part)

    def give(self, module: nn.Module) -> None:
        """Send the new weights to the other stages that use them."""
        held = _trained(module) if self.given else {}
        for name, others in self.given.items():
            for other in others:
                self._send(held[name].detach().clone(), other)

    def take(self, module: nn.Module, version: int) -> None:
        """Put the weights into a module that goes with a version of this stage."""
        rules = self.place.rules
        for name, owner in self.taken.items():
            self._take(module, name, version - rules.tie_lag(owner, self.place.stage))

    def finish(self, module: nn.Module, version: int) -> None:
        """The pipeline is empty: take what is left, and count from 0 again."""
        for name in self.taken:
            self._take(module, name, version)
            self._versions[name] = 0
        self._wait_for_sends()

    def _take(self, module: nn.Module, name: str, version: int) -> None:
        while self._versions[name] < version:
            held = _trained(module)[name]
            held.data.copy_(self._receive(held, self.taken[name], f"{name}, which is tied,"))
            self._versions[name] += 1

    # -- messages ---------------------------------------------------------------------------------

    def _send(self, tensor: Tensor, stage: int) -> None:
        """To the replicas of a stage that receive from this one."""
        for peer in self._listeners(stage):
            with self.place.waiting(f"rank {peer} to receive a tied weight"):
                work = dist.isend(tensor, group=self._group, group_dst=peer)
            assert work is not None
            self._sends[-1].append((tensor, work))

    def _receive(self, like: Tensor, stage: int, what: str) -> Tensor:
        """From one replica of a stage."""
        ranks = self.place.rules.ranks_of(stage)
        source = ranks[self._index % len(ranks)]
        buffer = torch.empty_like(like, requires_grad=False)
        with self.place.waiting(f"{what} from rank {source}"):
            dist.recv(buffer, group=self._group, group_src=source)
        return buffer

    def _listeners(self, stage: int) -> Iterator[int]:
        count = self.place.rules.replicas[self.place.stage]
        ranks = self.place.rules.ranks_of(stage)
        return (rank for k, rank in enumerate(ranks) if k % count == self._index)

    @property
    def _index(self) -> int:
        """Of this rank among the replicas of its stage."""
        return self.place.rank - self.place.rules.ranks_of(self.place.stage)[0]

    def _wait_for_sends(self, *, but_for: int = 0) -> None:
        """Until the others have what this stage has sent, but for the last updates."""
        with self.place.waiting("other stages to take a tied weight"):
            while len(self._sends) > but_for:
                for _, work in self._sends.popleft():
                    work.wait()


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: cast(nn.Parameter, tensor)
        for name, d, tensor in declared(module)
        if tensor.requires_grad and not d.buffer
    }
