"""Versions of a stage's weights: a module for each version that something still uses.

A forward and its backward run in the same module, recomputation included, so they meet the same
weights whatever was stepped in between. An update is in place if nothing uses the weights before
it; else they stay where they are and the update goes to a copy. So there are never more copies than
versions in use. Buffers (running statistics) are those of the model: all copies share them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightVersions:
    """The modules of one stage by version.

    Args:
        stage: holds version 0.

    Attributes:
        newest: the last version that was made.
    """

    def __init__(self, stage: nn.Module) -> None:
        self._modules = {0: stage}
        self._free: list[nn.Module] = []
        self.newest = 0

    def __len__(self) -> int:
        """Versions that are held now."""
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        """All modules, those that wait for use included."""
        yield from (*self._modules.values(), *self._free)

    def module(self, version: int) -> nn.Module:
        """The stage with the weights of a version."""
        return self._modules[version]

    @property
    def current(self) -> nn.Module:
        """The stage with the newest weights."""
        return self._modules[self.newest]

    def release(self, oldest: int) -> None:
        """Nothing uses versions before ``oldest`` any more; the newest is kept in any case."""
        for version in [v for v in self._modules if v < min(oldest, self.newest)]:
            self._free.append(self._modules.pop(version))

    def advance(self, *, keep: bool) -> nn.Module:
        """Begin the next version: a module with the newest weights, to be stepped in place.

        Args:
            keep: something still uses the newest version.
        """
        current = self.current
        if keep:
            following = self._free.pop() if self._free else _like(current)
            with torch.no_grad():
                for mine, theirs in zip(following.parameters(), current.parameters(), strict=True):
                    mine.copy_(theirs)
        else:
            following = self._modules.pop(self.newest)
        self.newest += 1
        self._modules[self.newest] = following
        return following

    def restart(self) -> None:
        """Count from 0 again: no version but the newest is in use."""
        self.release(self.newest)
        self._modules, self.newest = {0: self.current}, 0


def _like(stage: nn.Module) -> nn.Module:
    """Another stage with parameters of its own and the same buffers."""
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in stage.buffers()}
    return copy.deepcopy(stage, shared)
