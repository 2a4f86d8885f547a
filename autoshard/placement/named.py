"""Signatures by parameter name, so that rules need not care how a call was written.

A captured call may give ``bias`` by position, by keyword or not at all. :func:`arguments` binds it
to the target's parameters; :func:`named_signature` puts the letters of named tensors in the order
of :attr:`Op.operands`.
"""

from __future__ import annotations

import functools
import inspect
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from autoshard.ir import Arg, Op, Value, resolve, values_in
from autoshard.placement.strategy import Hints, Signature, Strategy, strategies_of

LETTERS = string.ascii_letters
"""Letters for dims by position; :func:`fresh_letters` never gives one of these."""


@functools.cache
def _parameters(target: str) -> tuple[tuple[str, Arg], ...]:
    """Name and default of each parameter of a target, keyword-only ones last."""
    function = resolve(target)
    if schema := getattr(function, "_schema", None):
        found = ((a.name, a.default_value) for a in schema.arguments)
    else:
        found = (
            (p.name, None if p.default is p.empty else p.default)
            for p in inspect.signature(function).parameters.values()
        )
    return tuple((name, tuple(d) if isinstance(d, list) else d) for name, d in found)


def arguments(op: Op) -> dict[str, Arg]:
    """Every parameter of the op's target by name, with its default where the call gives none."""
    bound = dict(_parameters(op.target))
    bound.update(zip(bound, op.args, strict=False))
    bound.update(op.kwargs)
    return bound


def operand_names(op: Op) -> tuple[str, ...]:
    """The parameter that each of ``op.operands`` is given for."""
    given = [*zip((name for name, _ in _parameters(op.target)), op.args, strict=False), *op.kwargs]
    return tuple(name for name, arg in given for _ in values_in(arg))


def with_arguments(op: Op, **changes: Arg) -> Op:
    """The call with some arguments replaced, each by position or keyword as it was given."""
    positions = {name: i for i, (name, _) in enumerate(_parameters(op.target))}
    args, kwargs = list(op.args), dict(op.kwargs)
    for name, value in changes.items():
        if positions[name] < len(args):
            args[positions[name]] = value
        else:
            kwargs[name] = value
    return replace(op, args=tuple(args), kwargs=tuple(kwargs.items()))


def fresh_letters() -> Iterator[str]:
    """Letters that stand for nothing else: for dims that may not be split."""
    return (chr(code) for code in range(0x100, 0x1000))


def ndim(op: Op, name: str) -> int:
    """Dims of a tensor argument that is known to be there."""
    value: Value = arguments(op)[name]
    return value.type.ndim


def named_signature(
    op: Op,
    tensors: Mapping[str, str],
    *outputs: str,
    fixed: Iterable[str] = (),
    linear: Sequence[Sequence[str]] = (),
    padded: str = "",
    implementations: Mapping[str, str] | None = None,
    addends: Sequence[str] = (),
) -> Signature:
    """A signature from the letters of named tensors.

    Args:
        op: the call.
        tensors: parameter name -> letters. Tensors that the call leaves out are skipped; tensors
            without an entry here are held whole.
        outputs: letters of each output.
        fixed: letters that may not be split.
        linear: groups of parameter names in which the op is jointly linear.
        padded: letters whose size need not divide.
        implementations: letter -> how the op is written when that letter is split.
        addends: parameters that are added to the output.
    """
    names = operand_names(op)
    fresh = fresh_letters()
    held_whole = set(fixed)
    inputs = []
    for name, value in zip(names, op.operands, strict=True):
        if name in tensors:
            inputs.append(tensors[name])
        else:
            inputs.append("".join(next(fresh) for _ in value.type.shape))
            held_whole.update(inputs[-1])
    groups = [tuple(i for i, name in enumerate(names) if name in group) for group in linear]
    return Signature(
        tuple(inputs),
        outputs,
        frozenset(held_whole),
        tuple(g for g in dict.fromkeys(groups) if g),
        frozenset(padded),
        dict(implementations or {}),
        frozenset(i for i, name in enumerate(names) if name in addends),
    )


def where(
    sig: Signature, op: Op, n: int, hints: Hints, legal: Callable[[Strategy], bool]
) -> Iterator[Strategy]:
    """The signature's strategies of which a condition on literals holds as well."""
    return (s for s in strategies_of(sig, op, n, hints) if legal(s))


def broadcast_letters(
    shapes: Sequence[Sequence[int]], output: Sequence[int]
) -> tuple[tuple[str, ...], str, frozenset[str]]:
    """Letters of operands that are broadcast to ``output``.

    A dim of size 1 that is broadcast stays in the shape on every rank, so it has a letter of its
    own that may not be split.

    Returns:
        Letters of each operand, of the output, and the letters that may not be split.
    """
    out = LETTERS[: len(output)]
    fresh = fresh_letters()
    fixed: set[str] = set()
    inputs = []
    for shape in shapes:
        offset = len(output) - len(shape)
        text = ""
        for i, size in enumerate(shape):
            if size == output[offset + i]:
                text += out[offset + i]
            else:
                text += next(fresh)
                fixed.add(text[-1])
        inputs.append(text)
    return tuple(inputs), out, frozenset(fixed)
