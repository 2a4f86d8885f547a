"""Which rule belongs to which op.

A rule is a function from an op to its :class:`Signature`, registered with :func:`rule`. Where
local literals differ from global ones (``view`` sizes), or the op is written in another way on
local tensors, a second function rewrites it, registered with :func:`localises`. An op whose
strategies do not follow from one signature (``view``) registers :func:`strategies_for` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from autoshard.ir import Op
from autoshard.placement.state import R, V
from autoshard.placement.strategy import (
    Hints,
    Signature,
    Strategy,
    on_local_tensors,
    strategies_of,
    uniform,
)

SignatureRule = Callable[[Op], Signature | None]
_Rule = TypeVar("_Rule", bound=SignatureRule)  # keeps the type of a rule that is also called
StrategyRule = Callable[[Op, int, Hints], Iterable[Strategy]]
LocaliseRule = Callable[[Op, Op, Strategy, str, int], Op]

_signatures: dict[str, SignatureRule] = {}
_strategies: dict[str, StrategyRule] = {}
_localisers: dict[str, LocaliseRule] = {}


def rule(*targets: str) -> Callable[[_Rule], _Rule]:
    """Register ``f(op) -> Signature``; ``None`` for an op that may only be replicated."""

    def register(function: _Rule) -> _Rule:
        _signatures.update(dict.fromkeys(targets, function))
        return function

    return register


def strategies_for(*targets: str) -> Callable[[StrategyRule], StrategyRule]:
    """Register ``f(op, n, hints) -> strategies`` for ops that one signature cannot describe."""

    def register(function: StrategyRule) -> StrategyRule:
        _strategies.update(dict.fromkeys(targets, function))
        return function

    return register


def localises(*targets: str) -> Callable[[LocaliseRule], LocaliseRule]:
    """Register ``f(op, local, strategy, axis, n) -> op``.

    ``local`` is the op on local tensors with the literals of the global op; return it with the
    literals (or the target) that are right there.
    """

    def register(function: LocaliseRule) -> LocaliseRule:
        _localisers.update(dict.fromkeys(targets, function))
        return function

    return register


@functools.cache
def _load() -> None:
    from autoshard.placement import rules  # noqa: F401  registers every rule


def has_rule(op: Op) -> bool:
    """False for an op that can only be replicated because nobody wrote a rule for it."""
    _load()
    return op.target in _signatures or op.target in _strategies


def signature_of(op: Op) -> Signature | None:
    _load()
    make = _signatures.get(op.target)
    return make(op) if make else None


def strategies(op: Op, n: int, hints: Hints | None = None) -> tuple[Strategy, ...]:
    """Every legal way to run ``op`` on an axis of ``n`` ranks; at least replicated.

    Same op, same order and same texts on every call.
    """
    return tuple(_strategies_of(op, n, hints or {}))


def _strategies_of(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    _load()
    if make := _strategies.get(op.target):
        seen: set[str] = set()
        for strategy in make(op, n, hints):
            if str(strategy) not in seen:
                seen.add(str(strategy))
                yield strategy
    elif sig := signature_of(op):
        yield from strategies_of(sig, op, n, hints)
    else:
        yield from {str(s): s for s in (uniform(op, R), uniform(op, V))}.values()


def localise(op: Op, strategy: Strategy, axis: str, n: int) -> Op:
    """The op as one rank of ``axis`` runs it under ``strategy``."""
    _load()
    local = on_local_tensors(op, strategy, n)
    rewrite = _localisers.get(op.target)
    return rewrite(op, local, strategy, axis, n) if rewrite else local
