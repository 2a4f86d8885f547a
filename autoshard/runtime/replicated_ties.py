"""Weights that several stages of a replicated pipeline use: the first of them makes the updates.

The owner of a tied weight sums the gradients of all stages that use it, over all their replicas,
and sends them the new weights. So there is one optimizer state, and every copy has the same bits.
A stage takes a weight when it begins a micro-batch that needs it, in the version that the owner has
used for that one: then the owner has long made it, so nobody waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
        self._newest: dict[str, Tensor] = {}  # of the weights taken, by the version above
        # Of the last updates: what was sent. Others have taken what is older than all that is in
        # flight, twice where they hold micro-batches on one version of their own.
        self._sends: deque[list[tuple[Tensor, dist.Work]]] = deque()
        self._open = 2 + 2 * place.rules.num_ranks // place.rules.replicas[place.stage]

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

    def parameters(self, module: nn.Module) -> set[nn.Parameter]:
        """Those of a module that are tied to other stages': their gradients are summed here."""
        return {p for n, p in _trained(module).items() if n in self.given or n in self.taken}

    def sum_gradients(self, module: nn.Module, micro_batch: int) -> None:
        """Add those of all stages and replicas at the owner's; the others' are gone afterwards.

        Args:
            module: what the gradients of an update lie with.
            micro_batch: the last one of this rank.
        """
        if not self.given and not self.taken:
            return
        self._wait_for_sends(but_for=self._open)
        self._sends.append([])
        held = _trained(module)
        for name, owner in self.taken.items():
            gradient = held[name].grad
            own = torch.zeros_like(held[name]) if gradient is None else gradient.contiguous()
            self._send(own.detach(), self.place.rules.tie_home(owner, self.place.rank, micro_batch))
            held[name].grad = None
        for name, others in self.given.items():
            gradient = held[name].grad
            total = torch.zeros_like(held[name]) if gradient is None else gradient
            for source in self._senders(others, micro_batch):
                total += self._receive(held[name], source, f"the gradient of {name}")
            if self.place.replicas is not None:
                with self.place.waiting(f"gradients of {name} from the other owners"):
                    dist.all_reduce(total, group=self.place.replicas)
            held[name].grad = total

    def give(self, module: nn.Module) -> None:
        """Send the new weights to the other stages that use them."""
        held = _trained(module) if self.given else {}
        for name, others in self.given.items():
            made = held[name].detach().clone()
            for peer in (rank for other in others for rank in self._listeners(other)):
                self._send(made, peer)

    def take(self, module: nn.Module, micro_batch: int) -> None:
        """Put the weights that go with a micro-batch into what runs it."""
        for name, owner in self.taken.items():
            self._take(module, name, self.place.rules.version(owner, micro_batch))

    def finish(self, module: nn.Module, steps: int) -> None:
        """The pipeline is empty after so many steps: take what is left, and count from 0 again."""
        for name, owner in self.taken.items():
            self._take(module, name, steps * self.place.rules.updates_per_step(owner))
            self._versions[name] = 0
        self._newest.clear()
        self._wait_for_sends()

    def _take(self, module: nn.Module, name: str, version: int) -> None:
        held = _trained(module)[name]
        owners = self.place.rules.ranks_of(self.taken[name])
        source = owners[self._index % len(owners)]
        while self._versions[name] < version:
            self._newest[name] = self._receive(held, source, f"{name}, which is tied,")
            self._versions[name] += 1
        if name in self._newest:
            held.data.copy_(self._newest[name])

    # -- messages ---------------------------------------------------------------------------------

    def _send(self, tensor: Tensor, peer: int) -> None:
        with self.place.waiting(f"rank {peer} to receive a tied weight"):
            work = dist.isend(tensor, group=self._group, group_dst=peer)
        assert work is not None
        self._sends[-1].append((tensor, work))

    def _receive(self, like: Tensor, source: int, what: str) -> Tensor:
        buffer = torch.empty_like(like, requires_grad=False)
        with self.place.waiting(f"{what} from rank {source}"):
            dist.recv(buffer, group=self._group, group_src=source)
        return buffer

    def _senders(self, stages: Sequence[int], micro_batch: int) -> Iterator[int]:
        """The ranks of other stages that send this one the gradients of an update."""
        rules, own = self.place.rules, self.place.rank
        for stage in stages:
            if rules.schedule == "pipedream":
                yield rules.home(stage, micro_batch)
            else:
                ranks = rules.ranks_of(stage)
                yield from (r for r in ranks if rules.tie_home(self.place.stage, r, 0) == own)

    def _listeners(self, stage: int) -> Iterator[int]:
        """The ranks of another stage that take weights from this one."""
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
