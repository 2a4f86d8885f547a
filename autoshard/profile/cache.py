"""Measurements on disk: one JSON line each, keyed by everything that matters."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

CACHE_VERSION = 2


def cache_folder() -> Path:
    """``AUTOSHARD_CACHE_DIR`` if it is set, else the user's cache folder of this platform."""
    chosen = os.environ.get("AUTOSHARD_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("autoshard"))


def key_of(kind: str, text: str, environment: Mapping[str, str]) -> str:
    """A hash of what was measured and where."""
    facts = [CACHE_VERSION, kind, text, sorted(environment.items())]
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


class Cache:
    """A file of measurements that several processes may append to.

    A line that cannot be read (a run that was killed while it wrote) is skipped; the last line of a
    key counts.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else cache_folder() / "measurements.jsonl"
        self._found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            entry = msgspec.json.decode(line)
            self._found[entry["key"]] = entry["value"]
        except (msgspec.DecodeError, KeyError, TypeError):
            return

    def get(self, key: str) -> dict[str, Any] | None:
        return self._found.get(key)

    def put(self, key: str, value: Mapping[str, Any], note: str = "") -> None:
        """Remember a measurement; ``note`` says in the file what it is of."""
        line = msgspec.json.encode({"key": key, "value": value, "note": note}) + b"\n"
        self._found[key] = dict(value)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: lines of several processes do not mix.
        with open(self.path, "ab", buffering=0) as file:
            file.write(line)

    def __len__(self) -> int:
        return len(self._found)
