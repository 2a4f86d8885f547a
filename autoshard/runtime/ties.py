"""Parameters that live in several pipeline stages (tied weights): their gradients are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoshard.errors import InternalError
from autoshard.runtime.mesh import Mesh
from autoshard.runtime.parameters import declared, local_part, set_local_gradient


class Held(Protocol):
    """A named parameter; see :class:`autoshard.runtime.engine.Slot`."""

    @property
    def name(self) -> str: ...

    @property
    def holder(self) -> nn.Parameter: ...


@dataclass(frozen=True, slots=True)
class Ties:
    """Which trainable parameters several stages hold.

    Attributes:
        stages: qualified name -> the stages that hold it, ascending; only where they are several.
    """

    stages: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    mesh: Mesh | None = None

    @staticmethod
    def between_stages(stage: nn.Module, mesh: Mesh) -> Ties:
        """Ask every stage for the names it holds; collective over ``pp``.

        Raises:
            InternalError: if stages split a tied parameter differently.
        """
        if mesh.size("pp") == 1:
            return Ties()
        mine = {
            name: (declaration.shape, declaration.split)
            for name, declaration, tensor in declared(stage)
            if tensor.requires_grad and not declaration.buffer
        }
        held: list[dict[str, object]] = [{}] * mesh.size("pp")
        dist.all_gather_object(held, mine, group=mesh.group("pp"))
        stages: dict[str, tuple[int, ...]] = {}
        for name in sorted({name for names in held for name in names}):
            holders = tuple(s for s, names in enumerate(held) if name in names)
            if len(holders) > 1:
                stages[name] = holders
                ways = [held[s][name] for s in holders]
                if any(way != ways[0] for way in ways):
                    raise InternalError(f"stages {holders} hold {name!r} in different ways: {ways}")
        return Ties(stages, mesh)

    def sum_gradients(self, slots: Sequence[Held]) -> None:
        """Each holder sends its gradient to the others and adds all of them in order of stages, so
        that every copy gets the same bits and stays equal to the others."""
        if self.mesh is None:
            return
        stage, group = self.mesh.rank("pp"), self.mesh.group("pp")
        operations: list[dist.P2POp] = []
        parts: dict[str, dict[int, Tensor]] = {}
        tied = sorted((s for s in slots if s.name in self.stages), key=lambda s: s.name)
        for slot in tied:
            gradient = slot.holder.grad
            like = local_part(slot.holder)
            own = torch.zeros_like(like) if gradient is None else local_part(gradient).contiguous()
            parts[slot.name] = {stage: own}
            for peer in self.stages[slot.name]:
                if peer != stage:
                    parts[slot.name][peer] = torch.empty_like(own)
                    received = parts[slot.name][peer]
                    operations += [
                        dist.P2POp(dist.isend, own, group=group, group_peer=peer),
                        dist.P2POp(dist.irecv, received, group=group, group_peer=peer),
                    ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for slot in tied:
            first, *others = (parts[slot.name][s] for s in self.stages[slot.name])
            total = first.clone()
            for other in others:
                total += other
            set_local_gradient(slot.holder, total)
