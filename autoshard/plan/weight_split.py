"""How the backward of a layer falls into gradients of inputs and gradients of weights.

Of a product with a weight, each takes half of the backward: ``dx = dy w'`` and ``dw = x' dy`` are
as large. Until ``dw`` is made, ``x`` and ``dy`` are kept: 32 bytes per position and feature of a
transformer layer, whose forward saves ``34 + 5 a s / h`` (Qi et al. 2023, table 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from autoshard.cost_models.costs import CostModel
from autoshard.ir import Graph, Op


@dataclass(frozen=True, slots=True)
class WeightWork:
    """Of one segment and micro-batch.

    Attributes:
        seconds: of the backward that makes gradients of weights.
        bytes_kept: inputs and gradients of outputs of its products with weights.
    """

    seconds: float
    bytes_kept: float


def weight_work(graph: Graph, costs: CostModel) -> WeightWork:
    """What can be put off of a graph's backward."""
    weights = {v.name for v in graph.parameters}
    kept: dict[str, int] = {}
    seconds = 0.0
    for op in graph.ops:
        if all(v.name in weights for v in op.operands):  # a cast or another view of weights
            weights.update(v.name for v in op.outputs)
        elif _is_product(op, weights) and (cost := costs.op(op)).forward_flops:
            seconds += cost.backward_s / 2
            kept.update((v.name, v.type.nbytes) for v in op.operands if v.name not in weights)
            kept.update((f"gradient of {v.name}", v.type.nbytes) for v in op.outputs)
    return WeightWork(seconds, float(sum(kept.values())))


def _is_product(op: Op, weights: set[str]) -> bool:
    """Whether it has a weight of two dims or more and another operand that needs a gradient."""
    own = any(v.name in weights and v.type.ndim > 1 and v.type.differentiable for v in op.operands)
    return own and any(v.name not in weights and v.type.differentiable for v in op.operands)
