"""Expert parallelism: the experts of a sparse layer spread over a part of the data-parallel ranks.

``ep`` neighbouring data-parallel ranks, which work on different samples, hold a share of the
experts each; tokens travel to their experts and back (Lepikhin et al. 2020, section 3.3: two
all-to-alls forward, two backward). In the algebra the samples are ``S`` on that axis and so are the
experts: a rank's graph is the one it had, but for the weights of its experts and for the way that
the op goes. All other parameters are replicated over all data-parallel ranks, experts over
``dp / ep`` of them.
"""

from __future__ import annotations

from dataclasses import replace

from autoshard.cluster import Cluster, Link, link
from autoshard.errors import OptionError
from autoshard.ir import Arg, Graph, Op, Value
from autoshard.plan.local_program import LocalProgram
from autoshard.runtime.experts import EXCHANGE, EXPERTS, FOLDED_EXPERTS

_OP = "autoshard.sparse_experts"


def spread_experts(local: LocalProgram, ep: int) -> LocalProgram:
    """The program of one expert-parallel rank.

    Raises:
        OptionError: the model has no sparse experts, or their number does not divide.
    """
    if not any(op.target == _OP for graph in local.graphs.values() for op in graph.ops):
        raise OptionError(
            f"ep={ep} spreads experts, but {local.program.model_name or 'the model'} has none that "
            "are captured as such; call autoshard.sparse_experts in its forward, or pin ep=1"
        )
    return replace(local, graphs={k: _spread(g, ep) for k, g in local.graphs.items()})


def expert_parameters(graph: Graph) -> frozenset[str]:
    """Parameters of a rank's graph that are spread over ``ep``."""
    return frozenset(
        name
        for op in graph.ops
        if op.target == _OP and op.keywords.get("axis") in (EXPERTS, FOLDED_EXPERTS)
        for name in _weights(graph, op)[0]
    )


def expert_links(cluster: Cluster, ep: int, stride: int, tp: int) -> dict[str, Link]:
    """The links over which tokens travel: among ``ep`` ranks, alone or together with ``tp``.

    Args:
        stride: devices from one rank of ``ep`` to the next.
    """
    return {
        EXPERTS: link(cluster, ep, stride),
        FOLDED_EXPERTS: link(cluster, ep * tp, stride // tp),
    }


def _weights(graph: Graph, op: Op) -> tuple[set[str], set[str]]:
    """The parameters that an op's experts are made of, and all values on the way (casts)."""
    parameters, producers = {v.name for v in graph.parameters}, graph.producers()
    found: set[str] = set()
    passed: set[str] = set()
    for value in op.operands[3:5]:
        name = value.name
        while name not in parameters and name in producers and len(producers[name].operands) == 1:
            passed.add(name)
            name = producers[name].operands[0].name
        found.add(name)
    return found, found | passed


def _spread(graph: Graph, ep: int) -> Graph:
    touched: set[str] = set()
    for op in graph.ops:
        if op.target == _OP:
            number = op.operands[3].type.shape[0]
            if number % ep:
                raise OptionError(
                    f"ep={ep} expects a number of experts that it divides but got {number}; pin "
                    "another degree"
                )
            touched |= _weights(graph, op)[1]
    if not touched:
        return graph

    def share(value: Value) -> Value:
        if value.name not in touched:
            return value
        first, *rest = value.type.shape
        return replace(value, type=value.type.with_shape((first // ep, *rest)))

    def arg(value: Value) -> Arg:
        return share(value)

    def local(op: Op) -> Op:
        new = replace(op.map(arg), outputs=tuple(map(share, op.outputs)))
        if op.target != _OP:
            return new
        number = op.operands[3].type.shape[0]
        added = (("way", EXCHANGE), ("num_experts", number), ("axis", EXPERTS))
        return replace(new, kwargs=(*new.kwargs, *added))

    return Graph(
        graph.inputs,
        tuple(map(share, graph.parameters)),
        tuple(map(local, graph.ops)),
        graph.outputs,
    )
