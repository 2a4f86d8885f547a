"""Statements for a straight line of ops."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autoshard.emit import functions  # noqa: F401  registers its printers
from autoshard.emit import names as naming
from autoshard.emit.names import Names, kind
from autoshard.emit.printers import Call, expression
from autoshard.emit.text import WIDTH, lines, literal
from autoshard.ir import Graph, Op, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the text of ops depends on besides the ops.

    Attributes:
        device: source text of the device on which tensors are created.
        random_axes: op name -> axes over which its output is split.
        keep: ops whose results recomputation keeps.
        root: module path that comments leave out.
        key: source text of the key that random ops are seeded with.
    """

    device: str
    num_micro_batches: int
    random_axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    root: str = ""
    key: str = "key"


@dataclass
class Body:
    """Writes ops as statements, keeping track of which variable holds which value.

    Attributes:
        names: value name -> variable or other source text.
        imports: names of :mod:`autoshard.runtime` that the text uses.
    """

    context: Context
    indent: int = 8
    names: dict[str, str] = field(default_factory=dict)
    variables: Names = field(default_factory=Names)
    imports: set[str] = field(default_factory=set)
    text: list[str] = field(default_factory=list)
    _left: dict[str, int] = field(default_factory=dict)
    _pending: tuple[Op, str] | None = None
    _chain: str = ""
    _module: str | None = None
    _random_ops: int = 0

    def argument(self, value: Value, wish: str) -> str:
        """A variable for an argument of the function."""
        name = self.variables.take(wish)
        self.names[value.name] = name
        return name

    def parameters(self, values: Iterable[Value], buffers: Container[str]) -> None:
        """Parameters and buffers are attributes of ``self``; parameters become local tensors."""
        for value in values:
            path = attribute(value.name)
            self.names[value.name] = path if value.name in buffers else f"local({path})"

    def write(self, graph: Graph) -> None:
        """All ops of a graph whose inputs and parameters have names already."""
        self._left = _counts(graph)
        for position, op in enumerate(graph.ops):
            following = graph.ops[position + 1] if position + 1 < len(graph.ops) else None
            self._op(op, following)
        self._flush()

    # -- one op -----------------------------------------------------------------------------------

    def _op(self, op: Op, following: Op | None) -> None:
        self._comment(op)
        text = self._expression(op)
        if self._pending and not self._fits(op, text):
            self._flush()
            text = self._expression(op)
        self._pending = None
        if self._belongs_to_parameter(op):
            self._use(op)
            self.names[op.output.name] = text
            return
        if following is not None and self._chains(op, text, following):
            self._use(op)
            start = self.names[op.operands[0].name]
            if start.isidentifier():
                self._chain = "" if self._left.get(op.operands[0].name) else start
            self._pending = (op, text)
            self.names[op.output.name] = text
            return
        self._use(op)
        self._assign(op, text)

    def _expression(self, op: Op) -> str:
        context = self.context
        call = Call(op, self.names, context.device, context.num_micro_batches, self.imports)
        text = expression(call)
        if "local(" in text:
            self.imports.add("local")
        return text

    def _fits(self, op: Op, text: str) -> bool:
        return self.indent + len(text) + 16 <= WIDTH

    def _flush(self) -> None:
        """Give the expression that was to be continued a variable of its own."""
        if self._pending:
            op, text = self._pending
            self._pending = None
            self._assign(op, text)

    def _chains(self, op: Op, text: str, following: Op) -> bool:
        """The next statement can continue this expression with another method call."""
        value = op.outputs[0] if len(op.outputs) == 1 else None
        return (
            value is not None
            and self._left.get(value.name, 0) == 1
            and (self._is_chain(value, op, following) or self._is_term(value, op, text, following))
            and not self._special(op)
            and not self._special(following)
            and section(op.module, self.context.root)
            == section(following.module, self.context.root)
        )

    def _belongs_to_parameter(self, op: Op) -> bool:
        """What only turns or converts a weight is written where the weight is used: parameters do
        not change in between."""
        source = self.names[op.operands[0].name] if op.operands else ""
        return (
            kind(op) in {"transpose", "t", "share", "share_varying", "all_reduce_gradient"}
            and "local(self." in source
            and self._left.get(op.output.name, 0) == 1
        )

    def _is_chain(self, value: Value, op: Op, following: Op) -> bool:
        """One method call after the other."""
        chain = kind(op) in _CHAINABLE and kind(following) in _CHAINABLE
        return chain and following.operands[:1] == (value,)

    def _is_term(self, value: Value, op: Op, text: str, following: Op) -> bool:
        """A short term of an expression that is still easy to read as a whole."""
        short = len(text) <= _LONGEST_TERM and text.count("(") <= 4
        return (
            short
            and (kind(op) in _TERMS or kind(op) in _CHAINABLE)
            and op.target.startswith("aten.")
            and kind(following) in _EXPRESSIONS
            and value in following.operands
            and not following.output.name.startswith("residual")
            and self._pending is None
        )

    def _special(self, op: Op) -> bool:
        return op.name in self.context.random_axes or op.name in self.context.keep

    def _use(self, op: Op) -> None:
        """Count the operands' uses; variables that are not needed any more are free."""
        for name in dict.fromkeys(v.name for v in op.operands):
            self._left[name] -= 1
            if self._left[name] == 0 and self.names[name].isidentifier():
                self.variables.free(self.names[name])

    def _assign(self, op: Op, text: str) -> None:
        if op.mutates and not any(self._left.get(v.name) for v in op.outputs):
            self._mutation(op, text)
            return
        targets = [self._target(op, i, v) for i, v in enumerate(op.outputs)]
        comma = "," if len(targets) == 1 and _is_tuple(op) else ""
        self._put(op, f"{', '.join(targets)}{comma} = {text}")

    def _target(self, op: Op, index: int, value: Value) -> str:
        if not self._left.get(value.name):
            return "_"
        wish = naming.fresh_name(op, index)
        for operand in naming.keeps_name(op):
            name = self.names.get(operand.name, "")
            if name.isidentifier() and not self._left.get(operand.name):
                wish = name
                break
            if not name.isidentifier() and self._chain and kind(op) in _CHAINABLE:
                wish = self._chain  # a chain that began where its variable ends goes on as that
        self.names[value.name] = self.variables.take(wish)
        return self.names[value.name]

    def _put(self, op: Op, statement: str) -> None:
        opened = 0
        if op.name in self.context.random_axes:
            self.imports.add("seeded")
            axes = self.context.random_axes[op.name]
            listed = f", axes={literal(axes)}" if axes else ""
            number = self._random_ops
            self._random_ops += 1
            self.text.append(f"{self._pad}with seeded({self.context.key}, {number}{listed}):")
            opened += 4
        if op.name in self.context.keep:
            self.imports.add("keep")
            self.text.append(f"{self._pad}{' ' * opened}with keep():")
            opened += 4
        self.text += lines(statement, self.indent + opened)

    def _mutation(self, op: Op, text: str) -> None:
        """Buffers change only in training, and not again when backward recomputes."""
        self.imports.add("recomputing")
        self.text.append(f"{self._pad}if self.training and not recomputing():")
        self.text += lines(text, self.indent + 4)

    @property
    def _pad(self) -> str:
        return " " * self.indent

    # -- comments ---------------------------------------------------------------------------------

    def _comment(self, op: Op) -> None:
        """Name the module where it changes; not on the way back to one that called it."""
        name, before = section(op.module, self.context.root), self._module
        if not name or name == before or (before or "").startswith(f"{name}."):
            return
        self._flush()
        if self.text and self.context.root:
            self.text.append("")
        self.text.append(f"{self._pad}# {name}")
        self._module = name


_LONGEST_TERM = 40

_TERMS = frozenset({"add", "sub", "mul", "div", "neg", "rsqrt", "silu", "tanh", "sigmoid"})
"""Ops that may be written as a term of the expression that takes their result."""

_EXPRESSIONS = _TERMS | {"pow", "cat", "where", "masked_fill", "sqrt"}

_CHAINABLE = frozenset(
    {
        "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "contiguous",
        "flatten", "unflatten", "to", "_to_copy", "slice", "select", "pow", "mean", "sum", "t",
        "detach", "cos", "sin", "exp", "masked_fill", "amax", "cumsum", "repeat", "sqrt",
    }
)  # fmt: skip


def _is_tuple(op: Op) -> bool:
    several = {"split", "chunk", "unbind", "split_with_sizes"}
    return op.target.startswith("aten.") and kind(op) in several


def _counts(graph: Graph) -> dict[str, int]:
    """How many ops, and the outputs, need each value."""
    counts: dict[str, int] = {}
    for op in graph.ops:
        for name in dict.fromkeys(v.name for v in op.operands):
            counts[name] = counts.get(name, 0) + 1
    for value in graph.outputs:
        counts[value.name] = counts.get(value.name, 0) + 1
    return counts


def section(module: str, root: str) -> str:
    """What a comment names: the part of a layer's module path below the layer, one level deep."""
    if not root:
        return module
    inside = module.removeprefix(root).removeprefix(".") if module.startswith(root) else module
    return inside.split(".")[0]


def attribute(path: str) -> str:
    """``self.mlp[0].weight`` for ``mlp.0.weight``."""
    text = "self"
    for part in path.split("."):
        text += f"[{part}]" if part.isdigit() else f".{part}"
    return text


def sequence(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
