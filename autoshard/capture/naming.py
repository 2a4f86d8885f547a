"""Names that a reader of the emitted code recognises: the module that made a value, then the op."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoshard import ir
from autoshard.capture.source import Frames, assigned_names
from autoshard.capture.structure import Stretch, relative

_SPOKEN = {
    "scaled_dot_product_attention": "attention", "cross_entropy_loss": "cross_entropy",
    "to": "cast", "_grouped_mm": "grouped_mm", "convolution": "conv",
}  # fmt: skip


def identifier(text: str) -> str:
    """``text`` as a Python identifier; dots become underscores."""
    name = re.sub(r"\W+", "_", text).strip("_") or "value"
    if name[0].isdigit():
        name = f"m{name}"
    return f"{name}_" if keyword.iskeyword(name) else name


def without_index(name: str) -> str:
    """What follows the last number of a path: ``layers.0.self_attn.cos`` is ``self_attn.cos``."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


class Names:
    """Gives every name once: ``mul``, ``mul_1``, ``mul_2``."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._next = dict.fromkeys(taken, 1)

    def give(self, wanted: str) -> str:
        if wanted not in self._next:
            self._next[wanted] = 1
            return wanted
        while True:
            name = f"{wanted}_{self._next[wanted]}"
            self._next[wanted] += 1
            if name not in self._next:
                self._next[name] = 1
                return name


def is_residual(op: ir.Op) -> bool:
    """The sum of two activations of one shape."""
    operands = op.operands
    return (
        op.target == "aten.add.Tensor"
        and len(operands) == 2
        and all(v.type.differentiable and v.type.per_sample for v in operands)
        and operands[0].type.shape == operands[1].type.shape
    )


@dataclass(frozen=True, slots=True)
class Origins:
    """What is known of where ops come from.

    Attributes:
        leaves: paths of modules none of whose submodules makes ops.
        frames: op name -> the user's statements it was made in.
    """

    leaves: Collection[str]
    frames: Mapping[str, Frames]

    def variables(self, ops: Sequence[ir.Op], index: int) -> tuple[str, ...]:
        """What the user's code calls the op's results, if it ends a statement that names them."""
        op = ops[index]
        own = self.frames.get(op.name, ())
        following = self.frames.get(ops[index + 1].name, ()) if index + 1 < len(ops) else ()
        names = assigned_names(own)
        if following[: len(own)] == own or len(names) != len(op.outputs) or "_" in names:
            return ()
        return names


# Ops whose result is still what their operand was, in another shape or type.
_SAME_THING = {
    "aten.reshape.default", "aten.transpose.int", "aten.permute.default", "aten.unsqueeze.default",
    "aten.squeeze.dim", "aten.squeeze.default", "aten.expand.default", "aten.slice.Tensor",
    "aten.pad.default", "aten.to.dtype", "aten.contiguous.default", "aten.detach.default",
    "aten.clone.default",
}  # fmt: skip


class _Namer:
    """Names the values of one stretch, in order."""

    def __init__(
        self, stretch: Stretch, path: str, origins: Origins, wanted: Mapping[str, str], shared: bool
    ) -> None:
        self._ops = stretch.ops
        self._path = path
        self._origins = origins
        self._wanted = wanted
        self._shared = shared
        self._results = _results_of_leaves(stretch, origins.leaves)
        self.names = {p.name: relative(p.name, path) for p in stretch.parameters}
        self._stems = {value: identifier(name) for value, name in self.names.items()}
        self._given = Names({*self.names.values(), *self._stems.values()})
        for value in stretch.inputs:
            self._give(value.name, wanted[value.name])
        for index, op in enumerate(stretch.ops):
            self._name_op(index, op)

    def _give(self, value: str, wanted: str) -> None:
        self._stems[value] = wanted
        self.names[value] = self._given.give(wanted)

    def _name_op(self, index: int, op: ir.Op) -> None:
        module = relative(op.module, self._path)
        variables = self._origins.variables(self._ops, index)
        base = op.target.split(".")[1].strip("_")
        plain = f"{module}.{_SPOKEN.get(base, base)}"
        if len(op.outputs) > 1:
            self._give(op.name, self._spoken(plain))
            for i, output in enumerate(op.outputs):
                name = f"{module}.{variables[i]}" if variables else f"{self.names[op.name]}_{i}"
                self._give(output.name, self._spoken(name))
            return
        value = op.output.name
        ours = op.target.startswith("autoshard.")  # the user's statement is about something else
        if wish := self._wanted.get(value):
            self._give(value, wish)
        elif module and self._results.get(op.module) == {value}:
            self._give(value, self._spoken(module))
        elif is_residual(op) and op.module not in self._origins.leaves and not module:
            self._give(value, "residual")
        elif variables and not ours:
            self._give(value, self._spoken(f"{module}.{variables[0]}"))
        elif op.target in _SAME_THING:
            self._give(value, self._stems[op.operands[0].name])
        else:
            self._give(value, self._spoken(plain))

    def _spoken(self, name: str) -> str:
        return identifier(without_index(name) if self._shared else name)


def _results_of_leaves(stretch: Stretch, leaves: Collection[str]) -> dict[str, set[str]]:
    """For every module without submodules: its values that are used outside it."""
    made_in = {v.name: op.module for op in stretch.ops for v in op.outputs}
    found: dict[str, set[str]] = {}
    used = [(v.name, op.module) for op in stretch.ops for v in op.operands]
    for name, user in [*used, *((v.name, None) for v in stretch.outputs)]:
        maker = made_in.get(name)
        if maker is not None and maker != user and maker in leaves:
            found.setdefault(maker, set()).add(name)
    return found


def value_names(
    stretch: Stretch,
    path: str,
    origins: Origins,
    wanted: Mapping[str, str],
    *,
    shared: bool = False,
) -> dict[str, str]:
    """Names in the class for every value of a stretch: inputs, parameters and results.

    Args:
        path: the module whose name is left out of all names.
        wanted: what inputs (and the loss) would like to be called.
        shared: the ops belong to no layer, although some layer's code made them.
    """
    return _Namer(stretch, path, origins, wanted, shared).names
