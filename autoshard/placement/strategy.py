"""From a signature in letters to every legal way to split an op over one mesh axis.

A signature names each dim of each tensor operand and output by a letter, such as
``bsi,oi,o->bso`` for ``linear``. On an axis of ``n`` ranks follow

* ``R``: everything replicated;
* ``V``: everything varying (a Jacobian that is the same on every rank maps addends to addends);
* per splittable letter: operands that have it are ``S`` there, operands that lack it are ``V``,
  outputs are ``S`` where they have it and ``P`` where it is summed away; an operand that is added
  to such a ``P`` (a bias) is ``P`` as well, or it would be counted once per rank;
* per group of operands in which the op is jointly linear: those are ``P``, the rest ``V``, the
  output ``P``.

Operands without a gradient are ``R`` where the list says ``V``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoshard.ir import Op, Value
from autoshard.placement.state import P, R, S, State, V, local_shape

Hints = Mapping[tuple[str, int], frozenset[tuple[int, ...]]]
"""Block structures worth trying, by (value name, dim); see :mod:`autoshard.placement.hints`."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run an op on one axis: the states it needs and gives.

    ``inputs`` are in the order of :attr:`Op.operands`. Prints as ``S(0), V -> S(0)``; the text is
    unique among an op's strategies and stands for it in plans. ``implementation`` names the way
    the op is written locally where that is not the op itself on local tensors.
    """

    inputs: tuple[State, ...]
    outputs: tuple[State, ...]
    implementation: str = ""

    def __str__(self) -> str:
        sides = (", ".join(map(str, side)) for side in (self.inputs, self.outputs))
        text = " -> ".join(sides)
        return f"{text} [{self.implementation}]" if self.implementation else text

    @property
    def splits_work(self) -> bool:
        """A rank does ``1/n`` of the op's work rather than all of it."""
        return any(s.is_split for s in (*self.inputs, *self.outputs))


@dataclass(frozen=True, slots=True)
class Signature:
    """The letters of an op's tensors and what may be done with them.

    Attributes:
        inputs: one letter per dim for every operand.
        outputs: the same for every output.
        fixed: letters that may not be split (a normalised dim).
        linear: groups of operand positions in which the op is jointly linear.
        padded: letters whose size need not divide, because padding does no harm there.
        implementations: letter -> how the op is written when that letter is split.
        addends: positions of operands that are added to the output (a bias).
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fixed: frozenset[str] = frozenset()
    linear: tuple[tuple[int, ...], ...] = ()
    padded: frozenset[str] = frozenset()
    implementations: Mapping[str, str] = field(default_factory=dict)
    addends: frozenset[int] = frozenset()

    @property
    def letters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys("".join((*self.inputs, *self.outputs))))


def signature(
    text: str,
    *,
    fixed: str = "",
    linear: Sequence[tuple[int, ...]] = (),
    padded: str = "",
    implementations: Mapping[str, str] | None = None,
    addends: Sequence[int] = (),
) -> Signature:
    """``signature("bi,oi->bo", linear=[(0,), (1,)])``; scalars are empty between commas."""
    ins, outs = text.split("->")
    return Signature(
        tuple(ins.split(",")), tuple(outs.split(",")), frozenset(fixed), tuple(linear),
        frozenset(padded), dict(implementations or {}), frozenset(addends),
    )  # fmt: skip


def _whole(value: Value, state: State) -> State:
    return state if value.type.differentiable else R


def uniform(op: Op, state: State) -> Strategy:
    """Everything replicated (``R``) or everything varying (``V``)."""
    return Strategy(
        tuple(_whole(v, state) for v in op.operands), tuple(_whole(v, state) for v in op.outputs)
    )


def strategies_of(sig: Signature, op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    """Every strategy that follows from the signature, in a fixed order, each text once."""
    seen: set[str] = set()
    for strategy in _candidates(sig, op, n, hints):
        if str(strategy) not in seen:
            seen.add(str(strategy))
            yield strategy


def _candidates(sig: Signature, op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    yield uniform(op, R)
    yield uniform(op, V)
    for letter in sig.letters:
        if letter not in sig.fixed:
            yield from _split(sig, op, n, letter, hints)
    for group in sig.linear:
        if all(op.operands[i].type.differentiable for i in group) and op.output.type.differentiable:
            yield Strategy(
                tuple(P if i in group else _whole(v, V) for i, v in enumerate(op.operands)),
                tuple(P for _ in op.outputs),
            )


def leaves_a_rank_empty(size: int, n: int) -> bool:
    """Parts of ``ceil(size / n)`` are used up before the last rank, which would hold nothing.

    Parameters cannot be sharded further then (FSDP2 takes no empty tensors).
    """
    return (n - 1) * -(-size // n) >= size


def _split(sig: Signature, op: Op, n: int, letter: str, hints: Hints) -> Iterator[Strategy]:
    places = [
        (value, letters.index(letter))
        for value, letters in zip(
            (*op.operands, *op.outputs), (*sig.inputs, *sig.outputs), strict=True
        )
        if letter in letters
    ]
    sizes = {value.type.shape[dim] for value, dim in places}
    size = max(sizes)
    if len(sizes) != 1 or leaves_a_rank_empty(size, n):
        return
    options: set[tuple[int, ...]] = {()}
    for value, dim in places:
        options |= hints.get((value.name, dim), frozenset())
    for blocks in sorted(options):
        if any(b % n for b in (blocks or (size,))) and (blocks or letter not in sig.padded):
            continue
        if blocks and sum(blocks) != size:
            continue
        summed = all(letter not in letters for letters in sig.outputs)
        yield Strategy(
            tuple(
                S(letters.index(letter), blocks)
                if letter in letters
                else P
                if summed and i in sig.addends
                else _whole(v, V)
                for i, (v, letters) in enumerate(zip(op.operands, sig.inputs, strict=True))
            ),
            tuple(
                S(letters.index(letter), blocks) if letter in letters else P
                for letters in sig.outputs
            ),
            sig.implementations.get(letter, ""),
        )


def local_value(value: Value, state: State, n: int) -> Value:
    """The same value as one rank holds it."""
    return replace(value, type=value.type.with_shape(local_shape(value.type.shape, state, n)))


def on_local_tensors(op: Op, strategy: Strategy, n: int) -> Op:
    """The op with operands and outputs replaced by their local parts; literals untouched."""
    states = iter(strategy.inputs)
    local = op.map(lambda v: local_value(v, next(states), n))
    outputs = tuple(local_value(v, s, n) for v, s in zip(op.outputs, strategy.outputs, strict=True))
    return replace(local, outputs=outputs)
