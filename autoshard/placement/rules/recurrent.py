"""Recurrent layers as one op: only the batch splits; time is sequential, gates mix all features."""

from __future__ import annotations

from autoshard.ir import Op
from autoshard.placement.named import arguments, fresh_letters
from autoshard.placement.registry import rule
from autoshard.placement.strategy import Signature


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(op: Op) -> Signature:
    """The sequence is ``[b, t, x]`` or ``[t, b, x]``, every state ``[layers, b, h]``."""
    bound = arguments(op)
    fresh = fresh_letters()
    num_states = len(op.outputs) - 1

    def dims(count: int) -> str:
        return "".join(next(fresh) for _ in range(count))

    def sequence() -> str:
        time, features = dims(1), dims(1)
        return ("b" + time if bound["batch_first"] else time + "b") + features

    def state() -> str:
        return dims(1) + "b" + dims(1)

    if op.operands[0].type.ndim == 2:  # a single sequence without batch
        inputs = [dims(v.type.ndim) for v in op.operands]
        outputs = [dims(v.type.ndim) for v in op.outputs]
    else:
        states = [state() for _ in range(num_states)]
        weights = [dims(v.type.ndim) for v in op.operands[1 + num_states :]]
        inputs = [sequence(), *states, *weights]
        outputs = [sequence(), *(state() for _ in range(num_states))]
    fixed = frozenset("".join((*inputs, *outputs))) - {"b"}
    return Signature(tuple(inputs), tuple(outputs), fixed)
