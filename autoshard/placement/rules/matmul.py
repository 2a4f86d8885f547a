"""Matrix products: batch and outer dims split plainly, the contracted dim gives addends."""

from __future__ import annotations

import itertools

from autoshard.ir import Op, Value
from autoshard.placement.named import LETTERS, arguments, fresh_letters, named_signature
from autoshard.placement.registry import rule
from autoshard.placement.strategy import Signature


@rule("aten.linear.default")
def linear(op: Op) -> Signature:
    """``x @ weight.T + bias``; padding of the output dim is made of the weight's padding."""
    batch = LETTERS[: op.output.type.ndim - 1]
    return named_signature(
        op,
        {"input": batch + "I", "weight": "OI", "bias": "O"},
        batch + "O",
        linear=[("input", "bias"), ("weight", "bias")],
        padded="O",
        addends=["bias"],
    )


def _added(bias: Value, out: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """Letters of a tensor that is broadcast to ``out``, and those of them that may not be split."""
    offset = len(shape) - bias.type.ndim
    fresh = fresh_letters()
    letters = "".join(
        out[offset + i] if size == shape[offset + i] else next(fresh)
        for i, size in enumerate(bias.type.shape)
    )
    return letters, "".join(set(letters) - set(out))


@rule("aten.addmm.default", "aten.baddbmm.default", "aten.addmv.default", "aten.addr.default")
def add_product(op: Op) -> Signature:
    """``beta * self + alpha * (a @ b)``."""
    tensors, out = {
        "addmm": ({"mat1": "MI", "mat2": "IO"}, "MO"),
        "baddbmm": ({"batch1": "bMI", "batch2": "bIO"}, "bMO"),
        "addmv": ({"mat": "MI", "vec": "I"}, "M"),
        "addr": ({"vec1": "M", "vec2": "O"}, "MO"),
    }[op.target.split(".")[1]]
    letters, fixed = _added(arguments(op)["self"], out, op.output.type.shape)
    return named_signature(
        op,
        {"self": letters, **tensors},
        out,
        fixed=fixed,
        linear=[("self", name) for name in tensors],
        padded="O",
        addends=["self"],
    )


@rule("aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default",
      "aten.outer.default", "aten.ger.default")  # fmt: skip
def product(op: Op) -> Signature:
    first, second, out = {
        "mm": ("MI", "IO", "MO"),
        "bmm": ("bMI", "bIO", "bMO"),
        "mv": ("MI", "I", "M"),
        "dot": ("I", "I", ""),
        "outer": ("M", "O", "MO"),
        "ger": ("M", "O", "MO"),
    }[op.target.split(".")[1]]
    return Signature((first, second), (out,), linear=((0,), (1,)), padded=frozenset("O"))


@rule("aten.matmul.default")
def matmul(op: Op) -> Signature:
    """As ``torch.matmul``: vectors lose their dim, leading dims are broadcast."""
    first, second = op.operands
    rows = "M" if first.type.ndim > 1 else ""
    columns = "O" if second.type.ndim > 1 else ""
    shape = op.output.type.shape
    shape = shape[: len(shape) - len(rows + columns)]
    batch = LETTERS[: len(shape)]
    fresh = fresh_letters()

    def leading(value: Value) -> str:
        sizes = value.type.shape[:-2]
        offset = len(batch) - len(sizes)
        return "".join(
            batch[offset + i] if size == shape[offset + i] else next(fresh)
            for i, size in enumerate(sizes)
        )

    inputs = (leading(first) + rows + "I", leading(second) + "I" + columns)
    out = batch + rows + columns
    fixed = frozenset("".join(inputs)) - frozenset(out + "I")
    return Signature(inputs, (out,), fixed, linear=((0,), (1,)), padded=frozenset(columns))


@rule("aten.einsum.default")
def einsum(op: Op) -> Signature | None:
    """The equation is the signature; an ellipsis stands for dims aligned from the right."""
    equation = op.args[0].replace(" ", "")
    sides = equation.split("->")
    terms = sides[0].split(",")
    if len(sides) == 1:
        counts = "".join(terms).replace(".", "")
        named = sorted({c for c in counts if counts.count(c) == 1})
        sides.append(("..." if "..." in equation else "") + "".join(named))
    most = max(v.type.ndim for v in op.operands)
    spare = "".join(itertools.islice(fresh_letters(), most))

    def expand(term: str, ndim: int) -> str:
        missing = ndim - (len(term) - len("..."))
        return term.replace("...", spare[most - missing :])

    inputs = [
        expand(t, v.type.ndim) if "..." in t else t for t, v in zip(terms, op.operands, strict=True)
    ]
    output = expand(sides[1], op.output.type.ndim) if "..." in sides[1] else sides[1]
    fixed = {c for term in inputs for c in term if term.count(c) > 1}
    sizes: dict[str, set[int]] = {}
    for term, value in zip(inputs, op.operands, strict=True):
        for letter, size in zip(term, value.type.shape, strict=True):
            sizes.setdefault(letter, set()).add(size)
    fixed |= {letter for letter, found in sizes.items() if len(found) > 1}
    return Signature(
        tuple(inputs), (output,), frozenset(fixed), tuple((i,) for i in range(len(inputs)))
    )
