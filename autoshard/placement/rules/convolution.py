"""Convolutions: batch and output channels split plainly, input channels give addends.

Grouped convolutions (depthwise among them) split input and output channels together, by whole
groups. Spatial dims stay: a split there needs the neighbours' borders.
"""

from __future__ import annotations

from collections.abc import Iterator

from autoshard.ir import Op
from autoshard.placement.named import arguments, named_signature, operand_names, with_arguments
from autoshard.placement.registry import localises, rule, strategies_for
from autoshard.placement.state import S
from autoshard.placement.strategy import Hints, Signature, Strategy, strategies_of

_TARGETS = (
    *(f"aten.conv{d}d.{kind}" for d in (1, 2, 3) for kind in ("default", "padding")),
    "aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input",
    "aten.convolution.default",
)  # fmt: skip


def _groups(op: Op) -> int:
    groups: int = arguments(op)["groups"]
    return groups


@rule(*_TARGETS)
def convolution(op: Op) -> Signature:
    """Letters: batch ``b``, input and output channels ``I`` and ``O``, the rest fixed.

    With groups the channels are fixed here; `convolution_strategies` splits them.
    """
    bound = arguments(op)
    kernel = bound["weight"].type.ndim - 2
    batch = "b" if bound["input"].type.ndim == kernel + 2 else ""
    transposed = "transpose" in op.target or bound.get("transposed", False)
    grouped = _groups(op) > 1
    # the channel dims of a grouped weight are not those of input and output
    inner, outer = ("i", "O") if grouped and not transposed else ("I", "O")
    if grouped and transposed:
        inner, outer = "I", "o"
    space_in, space_out, space_kernel = "uvw"[:kernel], "xyz"[:kernel], "rst"[:kernel]
    weight = inner + outer if transposed else outer + inner
    fixed = space_in + space_out + space_kernel + ("IOio" if grouped else "")
    return named_signature(
        op,
        {
            "input": batch + "I" + space_in,
            "weight": weight + space_kernel,
            "bias": "O",
        },
        batch + "O" + space_out,
        fixed=fixed,
        linear=[("input", "bias"), ("weight", "bias")],
        addends=["bias"],
    )


@strategies_for(*_TARGETS)
def convolution_strategies(op: Op, n: int, hints: Hints) -> Iterator[Strategy]:
    sig = convolution(op)
    yield from strategies_of(sig, op, n, hints)
    if _groups(op) > 1 and _groups(op) % n == 0:
        channel = sig.outputs[0].index("O")
        states = {"input": S(channel), "weight": S(0), "bias": S(0)}
        inputs = tuple(states[name] for name in operand_names(op))
        yield Strategy(inputs, (S(channel),), "groups")


@localises(*_TARGETS)
def _fewer_groups(op: Op, local: Op, strategy: Strategy, axis: str, n: int) -> Op:
    if strategy.implementation != "groups":
        return local
    return with_arguments(local, groups=_groups(op) // n)
