"""Python text: literals, and lines broken as a formatter breaks them."""

from __future__ import annotations

import keyword
import math
import re
import textwrap

import torch

WIDTH = 100
_OPEN, _CLOSE = "([{", ")]}"


def literal(value: object) -> str:
    """Source text of a number, string, dtype, ``None`` or a tuple of these."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, float):
        return repr(value).replace("e+", "e")
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    raise TypeError(f"no source text for {value!r}")


def identifier(text: str) -> str:
    """``text`` as a Python name in lower case."""
    name = re.sub(r"\W+", "_", text).strip("_").lower() or "value"
    name = f"v_{name}" if name[0].isdigit() else name
    return f"{name}_" if keyword.iskeyword(name) or keyword.issoftkeyword(name) else name


def class_name(text: str) -> str:
    """``text`` as the name of a class."""
    words = re.sub(r"\W+", " ", text).replace("_", " ").split()
    name = "".join(w[0].upper() + w[1:] for w in words) or "Layer"
    return f"Layer{name}" if name[0].isdigit() else name


def lines(statement: str, indent: int = 0) -> list[str]:
    """A one-line statement as indented lines of at most ``WIDTH`` characters where possible.

    What does not fit is broken at its last bracket: the contents on one line of their own if they
    fit there, else one item per line with a trailing comma.
    """
    pad = " " * indent
    if len(pad) + len(statement) <= WIDTH:
        return [pad + statement]
    start, end = _last_bracket(statement)
    if start < 0:
        return _in_parentheses(statement, indent)
    head, body, tail = statement[: start + 1], statement[start + 1 : end], statement[end:]
    if len(pad) + len(head) > WIDTH or not body:
        return [pad + statement]
    items = split_at_commas(body)
    joined = ", ".join(items)
    bare = len(items) == 1 and (" for " in joined or head[start] == "[")
    display = not (head[-2:-1].isidentifier() or head[-2:-1] in (")", "]")) and len(items) > 1
    if len(pad) + 4 + len(joined) <= WIDTH and not body.rstrip().endswith(",") and not display:
        return [pad + head, f"{pad}    {joined}", pad + tail]
    inner: list[str] = []
    for item in items:
        comma = "" if (item.startswith("**") and head.startswith("def")) or bare else ","
        inner += lines(item + comma, indent + 4)
    return [pad + head, *inner, pad + tail]


def _in_parentheses(statement: str, indent: int) -> list[str]:
    left, equals, right = statement.partition(" = ")
    if not equals:
        return [" " * indent + statement]
    pad = " " * indent
    return [f"{pad}{left} = (", f"{pad}    {right}", f"{pad})"]


def _last_bracket(statement: str) -> tuple[int, int]:
    """Positions of the last top-level bracket pair that only ``:`` or ``,`` may follow, or -1."""
    pairs = [p for p in _pairs(statement) if statement[p[1] + 1 :].strip() in {"", ":", ","}
             or statement[p[1] + 1 :].startswith(" ->")]  # fmt: skip
    pairs = [p for p in pairs if p[1] - p[0] > 1]
    if statement.startswith("def "):
        return pairs[0] if pairs else (-1, -1)
    return pairs[-1] if pairs else (-1, -1)


def _pairs(statement: str) -> list[tuple[int, int]]:
    """Top-level bracket pairs; brackets in strings do not count."""
    found, stack, quoted = [], [], False
    for i, c in enumerate(statement):
        if c == '"' and statement[i - 1 : i] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif c in _OPEN:
            stack.append(i)
        elif c in _CLOSE:
            start = stack.pop()
            if not stack:
                found.append((start, i))
    return found


def split_at_commas(text: str) -> list[str]:
    """The parts between top-level commas."""
    nested = _pairs(text)
    parts, start, quoted = [], 0, False
    for i, c in enumerate(text):
        if c == '"' and text[i - 1 : i] != "\\":
            quoted = not quoted
        if c == "," and not quoted and not any(a < i < b for a, b in nested):
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def docstring(text: str, indent: int) -> list[str]:
    """A docstring; paragraphs are wrapped, unless they have line breaks of their own."""
    pad = " " * indent
    first, *rest = text.strip("\n").split("\n\n")
    wrapped = textwrap.wrap(first, WIDTH - indent - 3) or [""]
    found = [f'{pad}"""{wrapped[0]}', *(pad + w for w in wrapped[1:])]
    for paragraph in rest:
        found.append("")
        if paragraph.startswith(" ") or "\n" in paragraph:
            found += [(pad + line).rstrip() for line in paragraph.split("\n")]
        else:
            found += [pad + w for w in textwrap.wrap(paragraph, WIDTH - indent)]
    if len(found) == 1 and len(found[0]) + 3 <= WIDTH:
        return [found[0] + '"""']
    return [*found, f'{pad}"""'] if len(found) > 1 else [found[0], f'{pad}"""']
