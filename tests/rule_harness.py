"""Proof by execution that the strategies of an op are right.

:func:`prove` takes every strategy that the registry gives for an op, runs the op whole and on
``n`` ranks, and compares forward values, gradients and mutated operands with what the states of
:mod:`autoshard.placement.state` promise. What is checked is stronger than what one program would
show: addends are random, padding of inputs holds arbitrary finite numbers, and a gradient that
is zero in the padding of outputs must come out zero in the padding of inputs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from thread_ranks import run_on_threads

from autoshard.ir import Arg, Op, TensorType, Value, map_values, resolve
from autoshard.placement import registry
from autoshard.placement.state import R, State, V, local_shape, local_size, ranges
from autoshard.placement.strategy import Hints, Strategy, on_local_tensors, uniform
from autoshard.runtime import mesh

AXIS = "tp"
PROVEN: set[str] = set()
"""Targets of which :func:`prove` has passed a strategy that is more than "replicated"."""

MakeInputs = Callable[[torch.Generator], Sequence[torch.Tensor | None]]
"""Whole operands, parallel to ``Op.operands``; ``None`` leaves one to the harness."""


class RuleError(AssertionError):
    """A strategy does not do what its states promise."""


# --------------------------------------------------------------------------- building ops


def T(*shape: int, dtype: torch.dtype = torch.float64, grad: bool | None = None) -> TensorType:
    """A tensor operand; differentiable if its dtype can be, unless ``grad`` says otherwise."""
    differentiable = dtype.is_floating_point if grad is None else grad
    return TensorType(shape, dtype, differentiable=differentiable, parametric=differentiable)


def I(*shape: int) -> TensorType:  # noqa: E743  stands beside T
    """An integer operand."""
    return T(*shape, dtype=torch.int64)


_names = itertools.count()


def make_op(target: str, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Op:
    """The op ``target(*args, **kwargs)``; its output types are found by running it.

    Args:
        args: :class:`TensorType` (or :class:`Value`, to use one tensor twice) where tensors go.
    """
    named = _name(tuple(args))
    keywords = tuple((k, _name(v)) for k, v in (kwargs or {}).items())
    op = Op(f"op{next(_names)}", target, named, keywords, ())
    whole = _whole_operands(op, torch.Generator().manual_seed(0), None)
    with _default_dtype_float64(), mesh.using(mesh.Mesh({})):
        outputs, _, _ = _execute(op, whole, None)
    return replace(op, outputs=tuple(_value(op, o) for o in outputs))


def _name(arg: Any) -> Arg:
    if isinstance(arg, TensorType):
        return Value(f"x{next(_names)}", arg)
    if isinstance(arg, (list, tuple)):
        return tuple(_name(item) for item in arg)
    return arg


def _value(op: Op, tensor: torch.Tensor) -> Value:
    grad = tensor.requires_grad
    parametric = any(v.type.parametric for v in op.operands)
    kind = TensorType(tuple(tensor.shape), tensor.dtype, grad, parametric=parametric)
    return Value(f"y{next(_names)}", kind)


def integers(high: int, low: int = 0) -> Callable[[Op], MakeInputs]:
    """``make_inputs=integers(5)(op)``: integer operands are drawn from ``[low, high)``."""

    def for_op(op: Op) -> MakeInputs:
        def make(rng: torch.Generator) -> list[torch.Tensor | None]:
            return [
                torch.randint(low, high, v.type.shape, generator=rng, dtype=v.type.dtype)
                if not (v.type.dtype.is_floating_point or v.type.dtype == torch.bool)
                else None
                for v in op.operands
            ]

        return make

    return for_op


# --------------------------------------------------------------------------- the proof


def prove(
    op: Op,
    n: int,
    *,
    hints: Hints | None = None,
    make_inputs: MakeInputs | None = None,
    values: bool = True,
    whole_only: bool = False,
    seed: int = 0,
) -> tuple[Strategy, ...]:
    """Check every strategy of ``op`` on ``n`` ranks and return them.

    Args:
        make_inputs: draws the whole operands where random normal numbers will not do.
        values: false for random ops, of which only the types are compared.
        whole_only: the rule is meant to give nothing but replicated and varying.

    Raises:
        RuleError: if a strategy is wrong, naming it.
    """
    op = _in_float64(op, make_inputs)
    found = registry.strategies(op, n, hints)
    if found != registry.strategies(op, n, hints):
        raise RuleError(f"{op}: strategies differ from call to call")
    texts = [str(s) for s in found]
    if len(set(texts)) != len(texts) or not found:
        raise RuleError(f"{op}: strategies must be at least one and distinct, got {texts}")
    for strategy in found:
        _check_form(op, strategy, n)
        try:
            with _default_dtype_float64(), mesh.using(mesh.Mesh({})):
                _prove_strategy(op, strategy, n, make_inputs, values, seed)
        except Exception as error:
            raise RuleError(f"{op}\n under {strategy} on {n} ranks: {error}") from error
    if whole_only or {str(uniform(op, R)), str(uniform(op, V))} < set(texts):
        PROVEN.add(op.target)
    return found


def unproven() -> set[str]:
    """Targets that have a rule of which no test has proven a strategy yet."""
    registry._load()
    return (set(registry._signatures) | set(registry._strategies)) - PROVEN


def _prove_strategy(
    op: Op, strategy: Strategy, n: int, make_inputs: MakeInputs | None, values: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    whole = _whole_operands(op, rng, make_inputs)
    outputs = _execute(op, whole, None)[0]
    out_grads = [
        torch.randn(o.shape, generator=rng, dtype=o.dtype) if v.type.differentiable else None
        for o, v in zip(outputs, op.outputs, strict=True)
    ]
    truth = _Run(*_execute(op, whole, out_grads))
    _check_types("whole output", truth.outputs, op.outputs)

    local = registry.localise(op, strategy, AXIS, n)
    _check_local_op(op, local, strategy, n)
    spread = [_spread(w, s, n, rng) for w, s in zip(whole, strategy.inputs, strict=True)]
    spread_grads = [
        [None] * n if g is None else _spread_gradient(g, s, n, rng)
        for g, s in zip(out_grads, strategy.outputs, strict=True)
    ]

    def run(rank: int) -> _Run:
        grads = [parts[rank] for parts in spread_grads]
        return _Run(*_execute(local, [parts[rank] for parts in spread], grads))

    runs = run_on_threads(n, AXIS, run) if _communicates(local) else [run(r) for r in range(n)]
    for one in runs:
        _check_types("local output", one.outputs, local.outputs)
    if values:
        _compare(op, strategy, n, truth, runs)


@dataclass(frozen=True)
class _Run:
    outputs: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor | None, ...]  # parallel to the operands
    operands: tuple[torch.Tensor, ...]  # as the call left them


def _compare(op: Op, strategy: Strategy, n: int, truth: _Run, runs: list[_Run]) -> None:
    for i, state in enumerate(strategy.outputs):
        parts = [run.outputs[i].detach() for run in runs]
        _check_forward(f"output {i}", parts, truth.outputs[i].detach(), state, n)
    mutated = {v.name for v in op.mutates}
    for i, (value, state) in enumerate(zip(op.operands, strategy.inputs, strict=True)):
        if value.type.differentiable:
            grads = [_given(run.gradients[i]) for run in runs]
            _check_gradient(f"gradient of operand {i}", grads, _given(truth.gradients[i]), state, n)
        if value.name in mutated:
            parts = [run.operands[i].detach() for run in runs]
            _check_forward(f"mutated operand {i}", parts, truth.operands[i].detach(), state, n)


# --------------------------------------------------------------------------- running ops


def _execute(
    op: Op, operands: Sequence[torch.Tensor], out_grads: Sequence[torch.Tensor | None] | None
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...], tuple[torch.Tensor, ...]]:
    """Outputs, gradients of the operands (if output gradients are given), operands afterwards."""
    leaves = [
        t.detach().clone().requires_grad_(v.type.differentiable)
        for t, v in zip(operands, op.operands, strict=True)
    ]
    used = [leaf.clone() for leaf in leaves] if op.mutates else leaves
    feed: Iterator[torch.Tensor] = iter(used)
    args = map_values(lambda _: next(feed), op.args)
    kwargs = {k: map_values(lambda _: next(feed), v) for k, v in op.kwargs}
    result = resolve(op.target)(*args, **kwargs)
    outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    if out_grads is None:
        return outputs, (), tuple(used)
    pairs = [(o, g) for o, g in zip(outputs, out_grads, strict=True) if g is not None]
    roots = [(o, g) for o, g in pairs if o.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found: Sequence[torch.Tensor | None] = [None] * len(wanted)
    if roots and wanted:
        tensors, grads = zip(*roots, strict=True)
        found = torch.autograd.grad(tensors, wanted, grads, allow_unused=True)
    gradients = iter(found)
    return (
        outputs,
        tuple(_or_zeros(next(gradients), leaf) if leaf.requires_grad else None for leaf in leaves),
        tuple(used),
    )


@contextlib.contextmanager
def _default_dtype_float64() -> Iterator[None]:
    """For constructors without a dtype; the setting is one for all threads, so not set in one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _or_zeros(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def _communicates(op: Op) -> bool:
    given = op.keywords
    axes = (*(given.get("axes") or ()), given.get("axis"))
    return op.target.startswith("autoshard.") and AXIS in axes


def _whole_operands(
    op: Op, rng: torch.Generator, make_inputs: MakeInputs | None
) -> list[torch.Tensor]:
    given = list(make_inputs(rng)) if make_inputs else [None] * len(op.operands)
    by_name: dict[str, torch.Tensor] = {}
    for value, tensor in zip(op.operands, given, strict=True):
        if value.name not in by_name:
            by_name[value.name] = _random(value.type, rng) if tensor is None else tensor
    return [by_name[value.name] for value in op.operands]


def _random(kind: TensorType, rng: torch.Generator) -> torch.Tensor:
    if kind.dtype.is_floating_point:
        return torch.randn(kind.shape, generator=rng, dtype=kind.dtype)
    # 0 and 1 are valid as indices of nearly everything
    return torch.randint(0, 2, kind.shape, generator=rng).to(kind.dtype)


def _in_float64(op: Op, make_inputs: MakeInputs | None) -> Op:
    """The op with floating operands and dtype literals in double, and output types to match."""

    def double(arg: Arg) -> Arg:
        if isinstance(arg, Value):
            if not arg.type.dtype.is_floating_point:
                return arg
            return replace(arg, type=replace(arg.type, dtype=torch.float64))
        if isinstance(arg, torch.dtype):
            return torch.float64 if arg.is_floating_point else arg
        return tuple(map(double, arg)) if isinstance(arg, tuple) else arg

    kwargs = tuple((k, double(v)) for k, v in op.kwargs)
    op = replace(op, args=double(op.args), kwargs=kwargs)
    whole = _whole_operands(op, torch.Generator().manual_seed(0), make_inputs)
    with _default_dtype_float64(), mesh.using(mesh.Mesh({})):
        made = _execute(op, whole, None)[0]
    outputs = [
        replace(v, type=replace(v.type, dtype=o.dtype)) if o.is_floating_point() else v
        for v, o in zip(op.outputs, made, strict=True)
    ]
    return replace(op, outputs=tuple(outputs))


# --------------------------------------------------------------------------- parts and addends


def padded_part(
    whole: torch.Tensor, state: State, n: int, rank: int, fill: torch.Tensor | None = None
) -> torch.Tensor:
    """What ``rank`` holds of a split tensor, each block padded with zeros, or from ``fill``."""
    size, dim = whole.shape[state.dim], state.dim
    pieces = []
    blocks = state.blocks or (size,)
    for (begin, end), block in zip(ranges(size, state, n, rank), blocks, strict=True):
        pieces.append(whole.narrow(dim, begin, end - begin))
        missing = local_size(block, n) - (end - begin)
        if missing:
            shape = list(whole.shape)
            shape[dim] = missing
            pieces.append(whole.new_zeros(shape))
    part = torch.cat(pieces, dim)
    return part if fill is None else torch.where(_mask(whole, state, n, rank), part, fill)


def _mask(whole: torch.Tensor, state: State, n: int, rank: int) -> torch.Tensor:
    """True where a local part holds numbers of the whole tensor rather than padding."""
    return padded_part(torch.ones_like(whole, dtype=torch.int8), state, n, rank).bool()


def _spread(whole: torch.Tensor, state: State, n: int, rng: torch.Generator) -> list[torch.Tensor]:
    """Each rank's forward value."""
    if state.is_whole:
        return [whole] * n
    if state.kind == "P":
        return _addends(whole, n, rng)
    shape = local_shape(whole.shape, state, n)
    filler = torch.zeros(shape, dtype=whole.dtype)
    if whole.dtype.is_floating_point:
        filler = torch.randn(shape, generator=rng, dtype=whole.dtype)
    return [padded_part(whole, state, n, rank, filler) for rank in range(n)]


def _spread_gradient(
    whole: torch.Tensor, state: State, n: int, rng: torch.Generator
) -> list[torch.Tensor | None]:
    """Each rank's output gradient."""
    if state.kind == "V":
        return [*_addends(whole, n, rng)]
    if state.is_split:
        return [padded_part(whole, state, n, rank) for rank in range(n)]
    return [whole] * n


def _addends(whole: torch.Tensor, n: int, rng: torch.Generator) -> list[torch.Tensor]:
    if whole.dtype == torch.bool:
        raise RuleError("a boolean has no addends")
    if whole.dtype.is_floating_point:
        free = [torch.randn(whole.shape, generator=rng, dtype=whole.dtype) for _ in range(n - 1)]
    else:
        free = [
            torch.randint(-3, 4, whole.shape, generator=rng).to(whole.dtype) for _ in range(n - 1)
        ]
    return [*free, whole - sum(free)] if free else [whole]


# --------------------------------------------------------------------------- checks


def _check_form(op: Op, strategy: Strategy, n: int) -> None:
    """The states fit the values: dims exist, blocks add up, no gradient state without gradient."""
    where = f"{op} under {strategy}"
    values = (*op.operands, *op.outputs)
    states = (*strategy.inputs, *strategy.outputs)
    if len(values) != len(states):
        raise RuleError(f"{where}: {len(states)} states for {len(values)} tensors")
    for value, state in zip(values, states, strict=True):
        if state != State.parse(str(state)):
            raise RuleError(f"{where}: {state} does not parse back")
        if state.kind == "V" and not value.type.differentiable:
            raise RuleError(f"{where}: %{value.name} has no gradient, so it must be R, not V")
        if state.is_split:
            if not 0 <= state.dim < value.type.ndim:
                raise RuleError(f"{where}: {value} has no dim {state.dim}")
            size = value.type.shape[state.dim]
            if sum(state.blocks or (size,)) != size or size < n:
                raise RuleError(f"{where}: {value} cannot be split by {state} on {n} ranks")


def _check_local_op(op: Op, local: Op, strategy: Strategy, n: int) -> None:
    expected = on_local_tensors(op, strategy, n)
    if [o.type for o in local.outputs] != [o.type for o in expected.outputs]:
        raise RuleError(f"local op declares {local.outputs}, its states mean {expected.outputs}")


def _check_types(what: str, tensors: Sequence[torch.Tensor], values: Sequence[Value]) -> None:
    if len(tensors) != len(values):
        raise RuleError(f"{len(tensors)} {what}s, {len(values)} declared")
    for tensor, value in zip(tensors, values, strict=True):
        if tuple(tensor.shape) != value.type.shape or tensor.dtype != value.type.dtype:
            found = TensorType(tuple(tensor.shape), tensor.dtype)
            raise RuleError(f"{what} is {found}, declared as {value}")


def _check_forward(
    what: str, parts: list[torch.Tensor], whole: torch.Tensor, state: State, n: int
) -> None:
    if state.kind == "P":
        total = parts[0].clone()
        for part in parts[1:]:
            total = total + part
        _close(f"sum of {what}", total, whole)
        return
    for rank, part in enumerate(parts):
        if state.is_split:
            mask = _mask(whole, state, n, rank)
            expected = padded_part(whole, state, n, rank)
            _close(f"{what} on rank {rank}", torch.where(mask, part, expected), expected)
        else:
            _close(f"{what} on rank {rank}", part, whole)


def _check_gradient(
    what: str, parts: list[torch.Tensor], whole: torch.Tensor, state: State, n: int
) -> None:
    if state.kind == "V":
        _close(f"sum of {what}", torch.stack(parts).sum(0), whole)
        return
    for rank, part in enumerate(parts):
        # in padding the gradient must be zero: a padded parameter must stay as it is
        expected = padded_part(whole, state, n, rank) if state.is_split else whole
        _close(f"{what} on rank {rank}", part, expected)


def _close(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
