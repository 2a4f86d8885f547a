"""A folder of checkpoints: names, the newest complete one, and what only rank 0 does.

A checkpoint is complete from the rename on that gives it its name. Nothing that is complete is ever
touched by a later save, but for removing old ones when asked to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist

from autoshard.errors import CheckpointError

VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"

T = TypeVar("T")


def publish(
    root: Path, unfinished: Path, name: str, manifest: Mapping[str, object], keep: int | None
) -> Path:
    """Give a written checkpoint its name. From the rename on it is complete."""
    _write(unfinished / MANIFEST, json.dumps(manifest, indent=2))
    place = root / name
    again = 1
    while place.exists():  # the same step saved again; never touch what may be the only one
        again += 1
        place = root / f"{name}.{again}"
    os.rename(unfinished, place)
    _write(root / ".latest", place.name)
    os.replace(root / ".latest", root / LATEST)
    _sync(root)
    if keep is not None:
        for old in sorted(_complete(root), key=_order)[: -max(1, keep)]:
            shutil.rmtree(old, ignore_errors=True)
    return place


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(root: Path) -> Iterator[Path]:
    return (p.parent for p in root.glob(f"step-*/{MANIFEST}") if (p.parent / ".metadata").exists())


def _order(place: Path) -> tuple[int, int]:
    step, _, again = place.name.removeprefix("step-").partition(".")
    return int(step), int(again or 1)


def find(folder: str | os.PathLike[str]) -> Path:
    """The newest complete checkpoint in a folder of checkpoints, or the folder if it is one.

    Raises:
        CheckpointError: if there is none.
    """
    root = Path(folder)
    if (root / MANIFEST).exists() and (root / ".metadata").exists():
        return root
    complete = list(_complete(root))
    pointer = root / LATEST
    if pointer.exists():
        for place in complete:
            if place.name == pointer.read_text(encoding="utf-8").strip():
                return place
    if not complete:
        raise CheckpointError(
            f"expected a checkpoint in {root} but found no complete one; "
            "pass the folder that was given to save"
        )
    return max(complete, key=_order)


def latest_step(folder: str | os.PathLike[str]) -> int | None:
    """The step of the newest complete checkpoint; ``None`` if there is none."""
    try:
        return int(read_manifest(find(folder))["step"])
    except CheckpointError:
        return None


def read_manifest(place: Path) -> dict[str, Any]:
    """Raises:
    CheckpointError: if it is not readable or of another version.
    """
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"expected a checkpoint in {place} but cannot read its manifest ({error}); "
            "choose another checkpoint"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"expected a checkpoint of version {VERSION} in {place} but got another; "
            "write it again with this version of autoshard"
        )
    return manifest


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def on_first_rank(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, on every rank, after it has run there.

    Raises:
        CheckpointError: on every rank, if it fails there.
    """
    answer: list[Any] = [None, None]
    if this_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = (
                f"{error}"
                if isinstance(error, CheckpointError)
                else (
                    f"expected to read and write checkpoints but could not ({error}); "
                    "check the folder, its permissions and the room that is left"
                )
            )
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1])
    return cast(T, answer[0])
