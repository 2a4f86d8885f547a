"""Which ops draw random numbers."""

from __future__ import annotations

import functools

import torch

from autoshard.ir import Op, resolve

_DROPOUT_ARGUMENT = "dropout_p"
_ATTENTION = ("grouped_attention", "row_attention")


@functools.cache
def _is_nondeterministic(target: str) -> bool:
    function = resolve(target)
    tags = getattr(function, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def is_random(op: Op) -> bool:
    """The op's result depends on the random state (attention and LSTM: only if they drop out)."""
    name = op.target.split(".")[1]
    if op.target.startswith("autoshard.") and name not in _ATTENTION:
        return False
    if name in {"scaled_dot_product_attention", *_ATTENTION}:
        dropout = op.args[4] if len(op.args) > 4 else op.keywords.get(_DROPOUT_ARGUMENT, 0.0)
        return bool(dropout)
    if name in {"lstm", "gru", "rnn_tanh", "rnn_relu"}:
        return any(isinstance(a, float) and a > 0 for a in op.args)
    if "dropout" in name:
        return bool(op.args[1]) and op.args[2] is not False
    return _is_nondeterministic(op.target)
