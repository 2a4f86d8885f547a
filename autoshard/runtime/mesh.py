"""The mesh of ranks: named axes over the process group, and the mesh that this thread runs on.

Axes are listed outermost first; ranks along the last axis (``tp``) are consecutive, so that it
lies on the fastest links. Emitted code names an axis, never a group.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from autoshard.errors import InternalError, LaunchError

DEFAULT_TIMEOUT = timedelta(minutes=10)
_REPLICAS = "dp_cp"
"""``dp`` and ``cp`` as one axis, where there is context parallelism."""


class Mesh:
    """Named axes, and for each the number of ranks, this rank's coordinate, and the group.

    Args:
        sizes: axis -> number of ranks, outermost first.
        ranks: axis -> this rank's coordinate; 0 where it is missing.
        groups: axis -> process group of the ranks that differ only along it; an axis of one rank
            needs none.
        device_mesh: the same as a ``DeviceMesh``, for parameters; ``None`` for a single process
            without process groups.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        ranks: Mapping[str, int] | None = None,
        groups: Mapping[str, dist.ProcessGroup] | None = None,
        device_mesh: DeviceMesh | None = None,
    ) -> None:
        self._sizes = dict(sizes)
        self._ranks = {axis: (ranks or {}).get(axis, 0) for axis in sizes}
        self._groups = dict(groups or {})
        self.device_mesh = device_mesh

    @staticmethod
    def create(
        sizes: Mapping[str, int],
        *,
        device_type: str = "cpu",
        timeout: timedelta = DEFAULT_TIMEOUT,
    ) -> Mesh:
        """The mesh over the default process group; every rank calls this with the same sizes.

        Args:
            timeout: after which a collective on any of the axes fails. Groups of a mesh do not
                inherit the timeout of the default group, so it is set on each.

        Raises:
            LaunchError: if the group does not have as many ranks as the mesh.
        """
        mesh = init_device_mesh_for(sizes, device_type)
        groups = {axis: mesh.get_group(axis) for axis in sizes}
        ranks = {axis: mesh.get_local_rank(axis) for axis in sizes}
        if sizes.get("cp", 1) > 1:
            replicas = mesh["dp", "cp"]._flatten(_REPLICAS)
            groups[_REPLICAS], ranks[_REPLICAS] = replicas.get_group(), replicas.get_local_rank()
            sizes = {**sizes, _REPLICAS: replicas.size()}
        if dist.get_backend() in ("gloo", "nccl"):  # thread-backed and fake ranks have no timeout
            for group in groups.values():
                _set_pg_timeout(timeout, group)
        return Mesh(sizes, ranks, groups, mesh)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self._sizes if axis != _REPLICAS)

    @property
    def replicas(self) -> str:
        """The axis of the ranks that hold the same parameters: ``dp``, joined with any ``cp``."""
        return _REPLICAS if _REPLICAS in self._sizes else "dp"

    def size(self, axis: str) -> int:
        """Number of ranks along ``axis``; an axis that the mesh lacks has one."""
        return self._sizes.get(axis, 1)

    def rank(self, axis: str) -> int:
        """This rank's coordinate along ``axis``."""
        return self._ranks.get(axis, 0)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one only along ``axis``.

        Raises:
            InternalError: if the axis has no group.
        """
        if axis not in self._groups:
            raise InternalError(f"mesh {self} has no process group for axis {axis!r}")
        return self._groups[axis]

    def __str__(self) -> str:
        return " x ".join(f"{axis}={size}" for axis, size in self._sizes.items())

    def __repr__(self) -> str:
        return f"Mesh({self._sizes}, ranks={self._ranks})"


def init_device_mesh_for(sizes: Mapping[str, int], device_type: str) -> DeviceMesh:
    """A ``DeviceMesh`` with these axes.

    Raises:
        LaunchError: if there is no process group or it has another number of ranks.
    """
    expected = 1
    for size in sizes.values():
        expected *= size
    if not dist.is_initialized():
        raise LaunchError(
            f"expected an initialised process group of {expected} ranks but there is none; "
            "start the program with torchrun"
        )
    if dist.get_world_size() != expected:
        raise LaunchError(
            f"expected {expected} ranks for the mesh "
            f"{' x '.join(f'{a}={s}' for a, s in sizes.items())} "
            f"but got {dist.get_world_size()}; start torchrun with {expected} processes in all"
        )
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def wait_limit(group: dist.ProcessGroup) -> timedelta | None:
    """How long to wait for a send or receive on a group of the mesh.

    Gloo's waits go by the timeout with which a group was made unless they are told otherwise.
    NCCL's only order work on the device, which its own watchdog ends: ``None``.
    """
    if dist.get_backend(group) != "gloo":
        return None
    backend = group._get_backend(torch.device("cpu"))
    limit: timedelta = backend.options._timeout
    return limit


class _Current(threading.local):
    mesh: Mesh | None = None


_current = _Current()


def current() -> Mesh:
    """The mesh of this thread.

    Raises:
        InternalError: if none was set.
    """
    if _current.mesh is None:
        raise InternalError("no mesh on this thread; use set_current(mesh) or `with using(mesh)`")
    return _current.mesh


def current_or_none() -> Mesh | None:
    return _current.mesh


def set_current(mesh: Mesh | None) -> None:
    """Make ``mesh`` the mesh of this thread; thread-backed ranks each have their own."""
    _current.mesh = mesh


@contextlib.contextmanager
def using(mesh: Mesh | None) -> Iterator[Mesh | None]:
    """Make ``mesh`` the mesh of this thread within the block."""
    previous = _current.mesh
    _current.mesh = mesh
    try:
        yield mesh
    finally:
        _current.mesh = previous
