"""Checkpoints on DCP: original names and whole shapes, whatever plan wrote or reads them.

A folder of checkpoints looks like this::

    folder/
      latest                     the name of the newest complete checkpoint
      step-00000010/
        manifest.json            version, step, aliases of tied weights, what wrote it
        .metadata, __0_0.distcp, ...

Keys are ``model.<name>``, ``optimizer.<name>.<state>`` and a few small objects. Each rank tells
DCP which boxes of each whole tensor it holds (:class:`Pieces`); DCP writes every box once and
reads whatever boxes the reader wants. A checkpoint is written under a temporary name and renamed
when all ranks are done, so an interrupted save leaves the last good one as it was.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoshard.errors import CheckpointError
from autoshard.runtime import mesh as meshes
from autoshard.runtime.boxes import pieces
from autoshard.runtime.checkpoint_folder import (
    VERSION,
    find,
    latest_step,
    on_first_rank,
    publish,
    read_manifest,
    this_rank,
)
from autoshard.runtime.checkpoint_pieces import Pieces
from autoshard.runtime.engine import EngineConfig, Slot
from autoshard.runtime.mesh import Mesh
from autoshard.runtime.parameters import declared, local_part, pieces_of

__all__ = [
    "exists", "find", "latest_step", "load", "load_plain", "load_plain_optimizer",
    "read_manifest", "save",
]  # fmt: skip


class Training(Protocol):
    """What a checkpoint reads and restores; the engines have it."""

    mesh: Mesh
    config: EngineConfig
    slots: tuple[Slot, ...]
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scheduler_state: dict[str, Any] | None
    step_number: int

    @property
    def module(self) -> nn.Module:
        """The stages of this rank."""


# -- what is saved --------------------------------------------------------------------------------


def _model(engine: Training) -> Iterator[tuple[str, Pieces]]:
    for name, declaration, tensor in declared(engine.module):
        if declaration.persistent:
            held = pieces_of(tensor, declaration)
            yield f"model.{name}", Pieces(local_part(tensor), declaration.shape, held)


def _optimizer(engine: Training) -> Iterator[tuple[str, Any]]:
    for slot in engine.slots:
        for key, value in engine.optimizer.state.get(slot.local, {}).items():
            name = f"optimizer.{slot.name}.{key}"
            if not isinstance(value, Tensor):
                yield name, (value,)
            elif value.shape == slot.local.shape and value.ndim:
                held = pieces_of(slot.holder, slot.declaration)
                yield name, Pieces(value, slot.declaration.shape, held)
            else:  # a count, or the state of an optimizer that sees whole tensors
                yield name, Pieces(value, tuple(value.shape), pieces(tuple(value.shape), None))


def _constants(tensors: Mapping[str, Tensor] | None) -> dict[str, Pieces]:
    """State that no stage holds; every rank has the whole of it."""
    whole = {name: tensor.detach() for name, tensor in (tensors or {}).items()}
    return {
        f"model.{name}": Pieces(tensor, tuple(tensor.shape), pieces(tuple(tensor.shape), None))
        for name, tensor in whole.items()
    }


def _small(engine: Training, rank: int) -> dict[str, tuple[Any]]:
    """Objects; in tuples, because DCP takes dicts and lists apart."""
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups
    ]
    saved: dict[str, tuple[Any]] = {"groups": (options,), f"rng.{rank}": (_random_states(),)}
    if engine.scheduler is not None:
        saved["scheduler"] = (engine.scheduler.state_dict(),)
    return saved


def _random_states() -> dict[str, Any]:
    """Of the default generators; emitted code needs none of them, the user's data may."""
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# -- save -----------------------------------------------------------------------------------------


def save(
    engine: Training,
    folder: str | os.PathLike[str],
    *,
    aliases: Mapping[str, str] | None = None,
    constant: Mapping[str, Tensor] | None = None,
    about: Mapping[str, object] | None = None,
    keep: int | None = None,
) -> Path:
    """Write a checkpoint of this step; collective over all ranks.

    Args:
        folder: holds any number of checkpoints; created if missing.
        aliases: other names of tied weights -> the name under which a stage holds them.
        constant: state of the model that no stage holds (parameters it never uses).
        about: anything JSON for the manifest, such as the program's fingerprint.
        keep: remove all but so many of the newest checkpoints.

    Returns:
        The new checkpoint's own folder.

    Raises:
        CheckpointError: on every rank, if any rank cannot write.
    """
    root = Path(folder)
    name = f"step-{engine.step_number:08d}"
    unfinished = root / f".unfinished-{name}"

    def prepare() -> None:
        for left_behind in root.glob(".unfinished-*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        unfinished.mkdir(parents=True)

    on_first_rank(prepare)
    with meshes.using(engine.mesh):
        state = {
            **dict(_model(engine)),
            **_constants(constant),
            **dict(_optimizer(engine)),
            **_small(engine, this_rank()),
        }
        try:
            with _quiet():
                write_state(state, checkpoint_id=unfinished, no_dist=not dist.is_initialized())
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"expected to write a checkpoint below {root} but could not ({_cause(error)}); "
                "check that all ranks can write there and that there is room"
            ) from error
    manifest = {
        "version": VERSION,
        "step": engine.step_number,
        "mesh": {axis: engine.mesh.size(axis) for axis in engine.mesh.axes},
        "data_parallel": engine.config.data_parallel,
        "optimizer": type(engine.optimizer).__name__,
        "aliases": dict(aliases or {}),
        "about": dict(about or {}),
    }
    return on_first_rank(lambda: publish(root, unfinished, name, manifest, keep))


def exists(folder: str | os.PathLike[str]) -> bool:
    """There is a complete checkpoint, as rank 0 sees it; collective."""

    def found() -> bool:
        try:
            find(folder)
        except CheckpointError:
            return False
        return True

    return on_first_rank(found)


# -- load -----------------------------------------------------------------------------------------


def load(
    engine: Training,
    folder: str | os.PathLike[str],
    *,
    constant: Mapping[str, Tensor] | None = None,
) -> int:
    """Go on from a checkpoint, written under any plan and world size; collective.

    Restores parameters, buffers, optimizer, scheduler and step; random states if this rank has
    saved one.

    Args:
        constant: state of the model that no stage holds, as for :func:`save`; it is read into
            these tensors.

    Returns:
        The number of steps that were done.

    Raises:
        CheckpointError: on every rank, if there is no complete checkpoint, or it is of another
            model or optimizer.
    """
    place = on_first_rank(lambda: find(folder))
    manifest = read_manifest(place)
    mine = type(engine.optimizer).__name__
    if manifest["optimizer"] != mine:
        raise CheckpointError(
            f"expected a checkpoint of the optimizer {mine} in {place} but got "
            f"{manifest['optimizer']}; compile with that optimizer, or start from the weights "
            "alone (load_plain)"
        )
    metadata = read_metadata(place)
    with meshes.using(engine.mesh), torch.no_grad():
        state: dict[str, Any] = {**dict(_model(engine)), **_constants(constant)}
        _check_model(state, metadata, place)
        _allocate_optimizer_state(engine, metadata)
        state.update(_optimizer(engine))
        small = ("groups", "scheduler", f"rng.{this_rank()}")
        state.update((key, (None,)) for key in small if key in metadata.state_dict_metadata)
        _read(state, place)
    objects = {key: value[0] for key, value in state.items() if isinstance(value, tuple)}
    if len(objects.get("groups", ())) != len(engine.optimizer.param_groups):
        raise CheckpointError(
            f"expected {len(engine.optimizer.param_groups)} parameter groups of the optimizer in "
            f"{place} but got {len(objects.get('groups', ()))}; compile with the optimizer that "
            "wrote it"
        )
    _restore(engine, objects)
    engine.step_number = int(manifest["step"])
    return engine.step_number


def _restore(engine: Training, objects: Mapping[str, Any]) -> None:
    for group, options in zip(engine.optimizer.param_groups, objects["groups"], strict=True):
        group.update(options)
    engine.scheduler_state = objects.get("scheduler")
    if engine.scheduler is not None and engine.scheduler_state is not None:
        engine.scheduler.load_state_dict(engine.scheduler_state)
    if f"rng.{this_rank()}" in objects:
        _restore_random_states(objects[f"rng.{this_rank()}"])
    for slot in engine.slots:
        state = engine.optimizer.state[slot.local]
        for what, value in state.items():
            if not isinstance(value, Tensor):
                state[what] = objects[f"optimizer.{slot.name}.{what}"]


def load_plain(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's whole state dict, tied weights under all their names; needs no process group.

    Raises:
        CheckpointError: if there is no complete checkpoint.
    """
    place = find(folder)
    metadata = read_metadata(place)
    state = _empty_tensors(metadata, "model.")
    _read(state, place, alone=True)
    model = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    for alias, name in read_manifest(place)["aliases"].items():
        if name in model:
            model[alias] = model[name]
    return model


def load_plain_optimizer(folder: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by parameter name, whole; needs no process group.

    Raises:
        CheckpointError: if there is no complete checkpoint.
    """
    place = find(folder)
    state = _empty_tensors(read_metadata(place), "optimizer.")
    _read(state, place, alone=True)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, what = key.removeprefix("optimizer.").rpartition(".")
        found.setdefault(name, {})[what] = tensor
    return found


def read_metadata(place: Path) -> Metadata:
    """Raises:
    CheckpointError: if the checkpoint's index is not readable.
    """
    try:
        return FileSystemReader(place).read_metadata()
    except Exception as error:
        raise CheckpointError(
            f"expected a checkpoint in {place} but cannot read its index ({error}); "
            "choose another checkpoint"
        ) from error


def _empty_tensors(metadata: Metadata, prefix: str) -> dict[str, Any]:
    return {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
    }


def _read(state: dict[str, Any], place: Path, *, alone: bool = False) -> None:
    try:
        with _quiet():
            read_state(state, checkpoint_id=place, no_dist=alone or not dist.is_initialized())
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"expected a whole checkpoint in {place} but cannot read it ({_cause(error)}); "
            "choose another checkpoint"
        ) from error


def _check_model(state: Mapping[str, Any], metadata: Metadata, place: Path) -> None:
    """Every tensor of the model is in the checkpoint, and the other way round; collective.

    Raises:
        CheckpointError: on every rank, if it is not so on one.
    """
    mine = (_difference(state, metadata, place), list(state))
    every: list[tuple[str, list[str]]] = [mine]
    if dist.is_initialized():
        every = [mine] * dist.get_world_size()
        dist.all_gather_object(every, mine)
    for complaint, _ in every:
        if complaint:
            raise CheckpointError(complaint)
    known = {key for _, keys in every for key in keys}
    for key in metadata.state_dict_metadata:
        if key.startswith("model.") and key not in known:
            raise CheckpointError(
                f"expected a checkpoint of this model in {place} but it has another tensor "
                f"{key.removeprefix('model.')!r}; load a checkpoint of this model"
            )


def _cause(error: BaseException) -> str:
    """One line; DCP's exception, which is no ``Exception``, is the tracebacks of all ranks."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {cause}"
    return str(error)


def _difference(state: Mapping[str, Any], metadata: Metadata, place: Path) -> str:
    """What this rank's part of the model does not find in the checkpoint."""
    for key, mine in state.items():
        saved = metadata.state_dict_metadata.get(key)
        name = key.removeprefix("model.")
        if not isinstance(saved, TensorStorageMetadata):
            return (
                f"expected {name!r} in the checkpoint {place} but it has no such tensor; "
                "load a checkpoint of this model"
            )
        if saved.size != mine.size():
            return (
                f"expected {name!r} of shape {tuple(mine.size())} in the checkpoint {place} but "
                f"got {tuple(saved.size)}; load a checkpoint of this model"
            )
    return ""


def _allocate_optimizer_state(engine: Training, metadata: Metadata) -> None:
    """Give the optimizer the state that was saved, still to be filled; drops what it had."""
    saved: dict[str, dict[str, Any]] = {}
    for key, value in metadata.state_dict_metadata.items():
        if key.startswith("optimizer."):
            name, _, what = key.removeprefix("optimizer.").rpartition(".")
            saved.setdefault(name, {})[what] = value
    for slot in engine.slots:
        state = engine.optimizer.state[slot.local] = {}
        for what, value in saved.get(slot.name, {}).items():
            if not isinstance(value, TensorStorageMetadata):
                state[what] = None
            elif tuple(value.size) == slot.declaration.shape and what != "step":
                dtype = value.properties.dtype
                state[what] = torch.empty_like(slot.local, dtype=dtype, requires_grad=False)
            else:  # counts live on the CPU
                device = slot.local.device if value.size else torch.device("cpu")
                state[what] = torch.empty(value.size, dtype=value.properties.dtype, device=device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process")
        yield
