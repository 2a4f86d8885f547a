"""Recurrent layers split by batch only."""

from __future__ import annotations

import pytest
from rule_harness import T, make_op, prove

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_batch(kind: str, batch_first: bool, bidirectional: bool) -> None:
    features, hidden, layers = 4, 4, 2
    directions = 2 if bidirectional else 1
    gates = GATES[kind] * hidden
    weights = []
    for layer in range(layers):
        width = features if layer == 0 else hidden * directions
        weights += [T(gates, width), T(gates, hidden), T(gates), T(gates)] * directions
    state = T(layers * directions, 4, hidden)
    states = [state, state] if kind == "lstm" else state
    shape = (4, 8, features) if batch_first else (8, 4, features)
    args = [T(*shape), states, weights, True, layers, 0.0, True, bidirectional, batch_first]
    op = make_op(f"aten.{kind}.input", args)
    (split,) = (s for s in prove(op, 4) if s.splits_work)
    assert split.inputs[0].dim == (0 if batch_first else 1)
    assert {s.dim for s in split.inputs[1 : 1 + len(op.outputs) - 1]} == {1}
