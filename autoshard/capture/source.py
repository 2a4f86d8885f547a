"""Where in the user's code something happened, and what the user calls the result there."""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_SITE = sysconfig.get_paths()["purelib"]
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')

Frames = tuple[tuple[str, int], ...]
"""File and first line of the statement for every frame of the user's code, innermost last."""


def _is_users(filename: str) -> bool:
    return not filename.startswith((_TORCH, _HERE, "<"))


def _short(filename: str) -> str:
    """Relative to site-packages or the working directory, where the file lies in one of them."""
    for base in (_SITE, str(Path.cwd())):
        if filename.startswith(base + "/"):
            return filename[len(base) + 1 :]
    return filename


@functools.lru_cache(maxsize=4096)
def source_of(stack_trace: str | None) -> str:
    """``file:line`` of the innermost frame outside torch in a node's recorded stack."""
    for filename, line, _ in reversed(_FRAME.findall(stack_trace or "")):
        if _is_users(filename):
            return f"{_short(filename)}:{line}"
    return ""


@functools.lru_cache(maxsize=4096)
def frames_of(stack_trace: str | None) -> Frames:
    """The user's statements that a node was made in."""
    found = []
    for filename, line, _ in _FRAME.findall(stack_trace or ""):
        if _is_users(filename):
            start, _ = _statements(filename).get(int(line), (int(line), ()))
            found.append((filename, start))
    return tuple(found)


def assigned_names(frames: Frames) -> tuple[str, ...]:
    """The variables that the innermost statement assigns to: ``q, k = f(x)`` gives two."""
    if not frames:
        return ()
    filename, line = frames[-1]
    return _statements(filename).get(line, (line, ()))[1]


@functools.cache
def _statements(filename: str) -> dict[int, tuple[int, tuple[str, ...]]]:
    """For every line of a simple statement: its first line, and the names it assigns to."""
    try:
        tree = ast.parse(Path(filename).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[int, tuple[int, tuple[str, ...]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            names = _targets(node)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                found[line] = (node.lineno, names)
    return found


def _targets(node: ast.stmt) -> tuple[str, ...]:
    if isinstance(node, ast.Assign):
        target = node.targets[0]
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        target = node.target
    else:
        return ()
    targets = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    return tuple(getattr(t, "id", getattr(t, "attr", "_")) for t in targets)


def location(frames: Iterable[traceback.FrameSummary]) -> str:
    """``file:line in function: "code"`` of the innermost frame outside torch; empty if none is."""
    users = [f for f in frames if _is_users(f.filename)]
    if not users:
        return ""
    frame = users[-1]
    return f'{_short(frame.filename)}:{frame.lineno} in {frame.name}: "{frame.line}"'


def location_of_error(error: BaseException) -> str:
    return location(traceback.extract_tb(error.__traceback__))


def current_location() -> str:
    return location(traceback.extract_stack())
