"""Recomputation of activations in backward: of a whole layer, or of all but what is marked.

Emitted code calls ``recompute(layer, x, keep=True)``, and inside the layer marks the ops whose
results are kept::

    with keep():
        y = F.linear(x, w)

[Note: kept ops] While a kept op runs, a dispatch mode records what every kernel returns; when the
layer runs again, the same block replays the record instead. So a kept op runs once, collectives
and random ops included. torch's own selective checkpointing numbers all ops of the region and
requires the same ops both times; here only those inside ``keep`` count, so that updates of
statistics can be left out the second time (:func:`recomputing`), and code outside ``keep`` pays
nothing. Views are never recorded: they cost nothing, and one of a parameter would keep FSDP2's
unsharded weights alive.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from autoshard.errors import InternalError
from autoshard.runtime.mesh import Mesh, current_or_none, set_current

T = TypeVar("T")


@dataclass(slots=True)
class _Entry:
    """What one kernel returned, and the version its tensors had when the block was left."""

    kernel: Any
    result: Any
    versions: tuple[int, ...] = ()


@dataclass(slots=True)
class _Region:
    """One call of :func:`recompute`; ``records`` if it has kept ops."""

    records: bool
    entries: list[_Entry] = field(default_factory=list)
    position: int = 0


class _State(threading.local):
    region: _Region | None = None
    replaying: bool = False  # this is the second run of the region
    again: bool = False  # this is the second run of the region or of one around it
    keeping: bool = False
    suspended: bool = False


_state = _State()


def recomputing() -> bool:
    """Whether a layer is run the second time, so that what must happen once has happened."""
    return _state.again


def recompute(function: Callable[..., T], *args: Any, keep: bool = False, **kwargs: Any) -> T:
    """``function(*args, **kwargs)``, whose activations are dropped and computed again in backward.

    Args:
        keep: results of ops inside :func:`keep` are not dropped and not computed again. Otherwise
            :func:`keep` has no effect.
    """
    contexts = functools.partial(_contexts, keep, current_or_none())
    result: T = checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        **kwargs,
    )
    return result


def _contexts(
    records: bool, mesh: Mesh | None
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    region = _Region(records)
    return _Run(region, False, mesh), _Run(region, True, mesh)


class _Run(AbstractContextManager[None]):
    """The first or the second run of a region; the second comes once per backward through it."""

    def __init__(self, region: _Region, replaying: bool, mesh: Mesh | None) -> None:
        self._region, self._replaying, self._mesh = region, replaying, mesh

    def __enter__(self) -> None:
        self._outer = _state.region, _state.replaying, _state.again, _state.keeping
        # Backward may run on a thread of the device, which has no mesh.
        self._outer_mesh = current_or_none()
        _state.region, _state.replaying, _state.keeping = self._region, self._replaying, False
        _state.again |= self._replaying
        self._region.position = 0
        set_current(self._mesh)

    def __exit__(self, *exception: object) -> None:
        _state.region, _state.replaying, _state.again, _state.keeping = self._outer
        set_current(self._outer_mesh)


@contextlib.contextmanager
def keep() -> Iterator[None]:
    """Keep the results of the ops in this block for backward; see [Note: kept ops]."""
    region = _state.region
    if region is None or not region.records or _state.keeping:
        yield
        return
    start = len(region.entries)
    _state.keeping = True
    try:
        with _Replay(region) if _state.replaying else _Record(region):
            yield
    finally:
        _state.keeping = False
    if not _state.replaying:
        for entry in region.entries[start:]:
            entry.versions = _versions(entry.result)


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """For what only the first run executes inside :func:`keep`: it is left out of the record."""
    before, _state.suspended = _state.suspended, True
    try:
        yield
    finally:
        _state.suspended = before


@functools.cache
def _is_recorded(kernel: Any) -> bool:
    """Views and kernels that return no tensor run both times."""
    returns = (str(result.type) for result in kernel._schema.returns)
    return not kernel.is_view and any("Tensor" in text for text in returns)


def _versions(result: Any) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _recorded(leaf: Any) -> Any:
    """The tensor without its place in the autograd graph, which would own this record."""
    if not isinstance(leaf, Tensor):
        return leaf
    # With this key the alias shares the version counter, which shows later writes to the tensor.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return leaf.detach()


def _replayed(leaf: Any) -> Any:
    """An alias with versions of its own: replaying an in-place op counts as a write to it."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, region: _Region) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.region = region

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_recorded(func) and not _state.suspended:
            self.region.entries.append(_Entry(func, tree_map(_recorded, result)))
        return result


class _Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, region: _Region) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.region = region

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not _is_recorded(func):
            return func(*args, **(kwargs or {}))
        region = self.region
        entry = region.entries[region.position] if region.position < len(region.entries) else None
        if entry is None or entry.kernel is not func:
            raise InternalError(
                f"recomputation runs {func} inside keep() where the first run had "
                f"{entry.kernel if entry else 'nothing'}"
            )
        region.position += 1
        # Not released: a backward that is split in two goes through the region twice.
        if _versions(entry.result) != entry.versions:
            raise InternalError(f"the kept result of {func} was overwritten after keep()")
        return tree_map(_replayed, entry.result)
