"""The sharding program against enumeration of every choice, and on a transformer block."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from transformer_block import (
    Sizes,
    embedding,
    head,
    llama_block,
    local_bytes,
    machine_conversion_s,
)

from autoshard.errors import OptionError
from autoshard.ir import Graph, LayerClass, Op, Program, Segment, TensorType, Value
from autoshard.placement.state import P, R, S, State, V
from autoshard.placement.strategy import Strategy
from autoshard.plan.plan import Assignment
from autoshard.plan.sharding import (
    ClassProblem,
    Interface,
    ParameterGroup,
    ShardingProblem,
    choose_shardings,
    evaluate,
    interfaces,
    parameter_groups,
    pareto,
)

STATES = (R, V, P, S(0), S(1))


def value(name: str, *shape: int, differentiable: bool = True) -> Value:
    return Value(name, TensorType(shape, torch.float32, differentiable, True, False))


def op(name: str, operands, outputs, target: str = "test.op.default") -> Op:
    return Op(name, target, tuple(operands), (), tuple(outputs))


class Costs:
    """A number for everything, drawn once per key, integral so that ties are exact."""

    def __init__(self, rng: random.Random, highest: int, missing: float = 0.0) -> None:
        self._rng, self._highest, self._missing = rng, highest, missing
        self._known: dict[object, float | None] = {}

    def __call__(self, v: Value, *states: State) -> float | None:
        key = (v.type.shape, *states)
        if key not in self._known:
            gone = self._rng.random() < self._missing
            self._known[key] = None if gone else float(self._rng.randint(0, self._highest))
        return self._known[key]


def random_class(rng: random.Random, name: str, sizes: itertools.count) -> ClassProblem:
    def fresh(label: str) -> Value:
        return value(f"{label}", next(sizes), 2, differentiable=rng.random() < 0.85)

    inputs = (value("x", 1, 1),)
    parameters = tuple(fresh(f"p{i}") for i in range(rng.randint(0, 1)))
    known: list[Value] = [*inputs, *parameters]
    ops, strategies, seconds, saved, extra = [], {}, {}, {}, {}
    for i in range(rng.randint(1, 2)):
        operands = tuple(rng.choice(known) for _ in range(rng.randint(1, 2)))
        outputs = tuple(fresh(f"v{i}_{j}") for j in range(rng.choice([1, 1, 2])))
        made = op(f"op{i}", operands, outputs)
        ops.append(made)
        known.extend(outputs)
        strategies[made.name] = [
            Strategy(
                tuple(rng.choice(STATES) for _ in operands),
                tuple(rng.choice(STATES) for _ in outputs),
                f"{k}",
            )
            for k in range(rng.randint(1, 3))
        ]
        seconds[made.name] = [float(rng.randint(0, 20)) for _ in strategies[made.name]]
        saved[made.name] = [v.name for v in (*operands, *outputs) if rng.random() < 0.4]
        if rng.random() < 0.3:
            extra[made.name] = [float(rng.randint(0, 5)) for _ in strategies[made.name]]
    last = value("y", 1, 1)
    ops.append(op("last", (known[-1],), (last,)))
    strategies["last"] = [Strategy((s,), (s,)) for s in rng.sample(STATES, 2)]
    seconds["last"] = [float(rng.randint(0, 5)) for _ in range(2)]
    graph = Graph(inputs, parameters, tuple(ops), (last,))
    return ClassProblem(
        name=name, graph=graph, count=rng.randint(1, 3), strategies=strategies, seconds=seconds,
        saved=saved, extra_bytes=extra,
    )  # fmt: skip


def random_problem(seed: int) -> ShardingProblem:
    rng = random.Random(seed)
    sizes = itertools.count(2)
    classes = tuple(random_class(rng, f"c{i}", sizes) for i in range(rng.randint(1, 2)))
    chain = Interface(
        ports=tuple((c.name, port) for c in classes for port in "xy"),
        states=tuple(rng.sample(STATES, 2)),
    )
    groups = [
        ParameterGroup(
            ports=((c.name, p.name),),
            count=c.count,
            states=tuple(rng.sample((R, V, S(0), S(1)), 2)),
        )
        for c in classes
        for p in c.graph.parameters
    ]
    budgets = {}
    if rng.random() < 0.6:
        budgets["parameter_bytes"] = float(rng.randint(5, 40))
    if rng.random() < 0.6:
        budgets["activation_bytes"] = float(rng.randint(5, 60))
    if rng.random() < 0.3:
        budgets["total_bytes"] = float(rng.randint(10, 80))
    return ShardingProblem(
        classes=classes, interfaces=(chain,), parameters=tuple(groups),
        conversion_s=Costs(rng, 12, missing=0.15), parameter_bytes=Costs(rng, 20),
        parameter_step_s=Costs(rng, 9), activation_bytes=Costs(rng, 10),
        num_micro_batches=rng.choice([1, 4]), budgets=budgets,
    )  # fmt: skip


def merged(v: Value, state: State) -> State:
    return R if state == V and not v.type.differentiable else state


def way(problem: ShardingProblem, v: Value, a: State, b: State) -> float | None:
    if a == b:
        return 0.0
    if a.is_split and b.is_split and a.dim == b.dim:
        middle = merged(v, V)
        first, second = problem.conversion_s(v, a, middle), problem.conversion_s(v, middle, b)
        return None if first is None or second is None else first + second
    return problem.conversion_s(v, a, b)


def class_options(problem, layer, at_x, at_rest):
    """``(seconds, activation bytes)`` of every choice of strategies that is possible."""
    graph = layer.graph
    for picks in itertools.product(*(range(len(layer.strategies[o.name])) for o in graph.ops)):
        at = {"x": (graph.inputs[0], at_x)}
        at |= {p.name: (p, merged(p, at_rest[layer.name, p.name])) for p in graph.parameters}
        seconds, held, converted = 0.0, {}, {}
        size = 0.0
        for o, k in zip(graph.ops, picks, strict=True):
            strategy = layer.strategies[o.name][k]
            seconds += layer.seconds[o.name][k]
            size += layer.extra_bytes.get(o.name, [0.0] * 9)[k]
            for v, s in zip(o.outputs, strategy.outputs, strict=True):
                at[v.name] = (v, merged(v, s))
            for v, s in zip(o.operands, strategy.inputs, strict=True):
                converted[v.name, merged(v, s)] = v
            ends = zip(
                (*o.operands, *o.outputs), (*strategy.inputs, *strategy.outputs), strict=True
            )
            for v, s in ends:
                if v.name in layer.saved.get(o.name, ()):
                    form = "whole" if s in (R, V) else s
                    held[v.name, form] = problem.activation_bytes(v, R if form == "whole" else s)
        converted["y", at_x] = graph.outputs[0]
        costs = [way(problem, v, at[name][1], s) for (name, s), v in converted.items()]
        if None in costs:
            continue
        for p in graph.parameters:
            rest = at[p.name][1]
            held.pop((p.name, "whole" if rest in (R, V) else rest), None)
        yield seconds + sum(costs), size + sum(held.values())


def brute_force(problem: ShardingProblem) -> float:
    best = float("inf")
    limit = {k: problem.budgets.get(k, float("inf")) for k in
             ("parameter_bytes", "activation_bytes", "total_bytes")}  # fmt: skip
    for at_x in problem.interfaces[0].states:
        for rests in itertools.product(*(g.states for g in problem.parameters)):
            at_rest, weight, step = {}, 0.0, 0.0
            for group, state in zip(problem.parameters, rests, strict=True):
                layer = next(c for c in problem.classes if c.name == group.ports[0][0])
                v = layer.graph.values[group.ports[0][1]]
                state = merged(v, state)
                at_rest.update(dict.fromkeys(group.ports, state))
                weight += group.count * problem.parameter_bytes(v, state)
                step += group.count * problem.parameter_step_s(v, state)
            if weight > limit["parameter_bytes"]:
                continue
            options = [
                {(c.count * s, c.count * b) for s, b in class_options(problem, c, at_x, at_rest)}
                for c in problem.classes
            ]
            for choice in itertools.product(*options):
                size = sum(b for _, b in choice)
                if size <= limit["activation_bytes"] and size + weight <= limit["total_bytes"]:
                    total = sum(s for s, _ in choice) + step / problem.num_micro_batches
                    best = min(best, total)
    return best


@pytest.mark.parametrize("block", range(10))
def test_equals_enumeration_of_every_choice(block):
    feasible = 0
    for seed in range(30 * block, 30 * block + 30):
        problem = random_problem(seed)
        best = brute_force(problem)
        solution = choose_shardings(problem, gap=0.0)
        if best == float("inf"):
            assert solution.status == "infeasible", seed
            assert not solution.assignments
            continue
        feasible += 1
        assert solution.status == "optimal", seed
        assert solution.seconds == pytest.approx(best, abs=1e-6), seed
        assert solution.bound == pytest.approx(best, rel=1e-5, abs=1e-5), seed
        cost = evaluate(problem, solution.assignments)
        assert cost.parameter_bytes <= problem.budgets.get("parameter_bytes", float("inf"))
        assert cost.activation_bytes <= problem.budgets.get("activation_bytes", float("inf"))
        assert cost.total_bytes <= problem.budgets.get("total_bytes", float("inf"))
    assert feasible > 5


def transformer(classes, n: int, **options) -> ShardingProblem:
    """Classes in a row on their hidden state; everything else comes whole."""
    chain = tuple((c.name, p) for c in classes for p in ("x", "y", "embed") if p in c.graph.values)
    ports = {(c.name, v.name) for c in classes for v in (*c.graph.inputs, *c.graph.outputs)}
    given = tuple(Interface(ports=(port,), states=(R,)) for port in sorted(ports.difference(chain)))
    convert, size = machine_conversion_s(n), local_bytes(n)
    return ShardingProblem(
        classes=tuple(classes),
        interfaces=(Interface(ports=tuple(p for p in chain if p in ports)), *given),
        parameters=tuple(
            ParameterGroup(ports=((c.name, p.name),), count=c.count)
            for c in classes
            for p in c.graph.parameters
        ),
        conversion_s=convert, parameter_bytes=size, activation_bytes=size,
        parameter_step_s=lambda v, s: convert(v, R, V) if s == V else 0.0,
        **options,
    )  # fmt: skip


def collectives(problem: ShardingProblem, layer: ClassProblem, choice: Assignment):
    """``from -> to`` of every conversion of a non-parameter in the layer."""
    at = {name: State.parse(s) for name, s in choice.inputs.items()}
    found = set()
    weights = {p.name for p in layer.graph.parameters}
    for o in layer.graph.ops:
        strategy = next(s for s in layer.strategies[o.name] if str(s) == choice.ops[o.name])
        for v, s in zip(o.operands, strategy.inputs, strict=True):
            if v.name not in weights and merged(v, s) != at[v.name]:
                found.add((v.name, f"{at[v.name]} -> {s}"))
        at.update((v.name, merged(v, s)) for v, s in zip(o.outputs, strategy.outputs, strict=True))
    final = State.parse(choice.outputs["y"])
    found |= {("y", f"{at['y']} -> {final}")} if at["y"] != final else set()
    return sorted(text for _, text in found)


def weights_of(*classes: ClassProblem) -> float:
    return float(sum(c.count * p.type.nbytes for c in classes for p in c.graph.parameters))


def test_tight_weight_memory_gives_megatron_with_sequence_parallelism():
    block = llama_block(8)
    budgets = {"parameter_bytes": weights_of(block) / 8 * 1.05}
    problem = transformer([block], 8, budgets=budgets, num_micro_batches=8)
    solution = choose_shardings(problem)
    choice = solution.assignments["block"]
    assert solution.status == "optimal"
    assert choice.inputs["x"] == choice.outputs["y"] == "S(1)"
    for column in ("q", "k", "v", "gate", "up"):
        assert choice.ops[column] == "V, S(0) -> S(2)"
        assert choice.parameters[f"{column}.weight"] == "S(0)"
    for row in ("o", "down"):
        assert choice.ops[row] == "S(2), S(1) -> P"
        assert choice.parameters[f"{row}.weight"] == "S(1)"
    assert choice.ops["sdpa"] == "S(1), S(1), S(1) -> S(1)"
    assert choice.parameters["norm1.weight"] == "V"
    # Two all-gathers and two reduce-scatters; the rotary tables come whole and are used so.
    assert collectives(problem, block, choice) == ["P -> S(1)"] * 2 + ["S(1) -> V"] * 2


def test_cheap_weights_are_not_split():
    sizes = Sizes(b=8, t=8192, h=1024, f=4096, H=8, K=8)
    block = llama_block(8, sizes)
    choice = choose_shardings(transformer([block], 8, num_micro_batches=8)).assignments["block"]
    assert set(choice.parameters.values()) == {"V"}
    # The batch is split instead, which is free of collectives altogether.
    assert choice.inputs["x"] == choice.outputs["y"] == "S(0)"


def test_one_sequence_and_cheap_weights_give_ulysses():
    sizes = Sizes(b=1, t=65536, h=1024, f=4096, H=8, K=8)
    block = llama_block(8, sizes)
    problem = transformer([block], 8, num_micro_batches=8)
    choice = choose_shardings(problem).assignments["block"]
    assert choice.ops["sdpa"] == "S(1), S(1), S(1) -> S(1)"
    assert choice.ops["q"] == choice.ops["gate"] == "S(1), V -> S(1)"
    moved = [c for c in collectives(problem, block, choice) if c.startswith("S")]
    assert moved and all(" -> S(" in c for c in moved)


def test_relaxation_is_tight_and_depth_is_free():
    sizes = Sizes(h=4096, f=16384, H=32, K=32)
    small = [embedding(8, sizes), llama_block(8, sizes, count=2), head(8, sizes)]
    large = [small[0], replace(small[1], count=126), small[2]]
    one, other = (choose_shardings(transformer(c, 8)) for c in (small, large))
    assert one.assignments["block"] == other.assignments["block"]
    assert other.bound == pytest.approx(other.seconds, rel=1e-6)


def test_more_memory_is_never_slower_and_the_front_is_in_order():
    sizes = Sizes(t=32768, h=2048, f=8192, H=16, K=16)
    classes = [embedding(8, sizes), llama_block(8, sizes, count=32), head(8, sizes)]
    options = {"num_micro_batches": 8}
    front = pareto(transformer(classes, 8, **options), 5, budget="parameter_bytes")
    assert 3 <= len(front) <= 5
    assert [s.seconds for s in front] == sorted(s.seconds for s in front)
    sizes_ = [s.cost.parameter_bytes for s in front]
    assert sizes_ == sorted(sizes_, reverse=True)
    fastest = choose_shardings(transformer(classes, 8, **options))
    assert front[0].seconds == pytest.approx(fastest.seconds)
    assert front[-1].cost.parameter_bytes < 1.01 * weights_of(*classes) / 8
    for s in front:
        budget = {"parameter_bytes": s.cost.parameter_bytes * (1 + 1e-9)}
        again = choose_shardings(transformer(classes, 8, budgets=budget, **options))
        assert again.seconds == pytest.approx(s.seconds, rel=1e-5)


def test_infeasible_says_what_would_do():
    block = llama_block(8)
    budgets = {"parameter_bytes": weights_of(block) / 20}
    solution = choose_shardings(transformer([block], 8, budgets=budgets))
    assert solution.status == "infeasible"
    least = solution.least_bytes["parameter_bytes"]
    assert least == pytest.approx(weights_of(block) / 8, rel=1e-3)
    relaxed = transformer([block], 8, budgets={"parameter_bytes": least * (1 + 1e-6)})
    assert choose_shardings(relaxed).status == "optimal"


def test_pins_are_kept_and_unknown_ones_are_named():
    block = llama_block(8)
    pinned = replace(block, pins={"q": "S(1), V -> S(1)"})
    free, bound = (choose_shardings(transformer([c], 8)) for c in (block, pinned))
    assert bound.assignments["block"].ops["q"] == "S(1), V -> S(1)"
    assert free.assignments["block"].ops["q"] != "S(1), V -> S(1)"
    assert bound.seconds >= free.seconds
    wrong = replace(block, pins={"q": "S(9) -> S(9)"})
    with pytest.raises(OptionError, match=r"block\.q .*but got 'S\(9\) -> S\(9\)'; pin one of"):
        choose_shardings(transformer([wrong], 8))


def test_contradicting_pins_are_infeasible_without_a_cure():
    layer = small_layer(Strategy((S(0),), (S(0),)), states=[Strategy((R,), (R,))])
    problem = small_problem(layer, conversion_s=lambda v, a, b: None, budgets={"total_bytes": 9.0})
    solution = choose_shardings(problem)
    assert (solution.status, solution.least_bytes) == ("infeasible", {})


def small_layer(*strategies: Strategy, states=(), target="test.op.default", extra=()):
    """``x -> a -> y`` with one parameter list for both ops."""
    x, a, y = value("x", 8, 8), value("a", 8, 8), value("y", 8, 8)
    first = op("first", (x, *extra), (a,), target)
    second = op("second", (a,), (y,))
    graph = Graph((x,), tuple(extra), (first, second), (y,))
    table = {"first": list(strategies), "second": list(states)}
    return ClassProblem(
        name="c", graph=graph, count=1, strategies=table,
        seconds={k: [0.0] * len(v) for k, v in table.items()},
    )  # fmt: skip


def small_problem(layer: ClassProblem, **options) -> ShardingProblem:
    ports = (*layer.graph.inputs, *layer.graph.outputs)
    return ShardingProblem(
        classes=(layer,),
        interfaces=tuple(Interface(ports=((layer.name, v.name),)) for v in ports),
        parameters=tuple(
            ParameterGroup(ports=((layer.name, p.name),), count=1) for p in layer.graph.parameters
        ),
        **{"conversion_s": lambda v, a, b: 1.0, "parameter_bytes": lambda v, s: 1.0, **options},
    )


def test_an_operand_that_is_written_to_is_not_converted():
    stats = value("running", 8, differentiable=False)
    layer = small_layer(
        Strategy((S(0), S(0)), (S(0),)), states=[Strategy((S(0),), (S(0),))],
        target="aten.add_.Tensor", extra=(stats,),
    )  # fmt: skip
    # ``add_`` writes to its first operand: let that be the buffer.
    first = layer.graph.ops[0]
    first = replace(first, args=(stats, layer.graph.inputs[0]))
    layer = replace(layer, graph=replace(layer.graph, ops=(first, layer.graph.ops[1])))
    problem = small_problem(layer, parameter_bytes=lambda v, s: 0.0 if s == R else 100.0)
    solution = choose_shardings(problem)
    assert solution.assignments["c"].parameters["running"] == "S(0)"
    wrong = replace(solution.assignments["c"], parameters={"running": "R"})
    with pytest.raises(OptionError, match="writes to"):
        evaluate(problem, {"c": wrong})


def test_splits_of_one_dim_in_other_blocks_go_through_the_whole():
    layer = small_layer(
        Strategy((S(1, (4, 4)),), (S(1, (4, 4)),)), states=[Strategy((S(1),), (S(1),))]
    )
    prices = {("S", "V"): 5.0, ("V", "S"): 2.0}
    problem = small_problem(layer, conversion_s=lambda v, a, b: prices.get((a.kind, b.kind), 99.0))
    assert choose_shardings(problem).cost.conversion_s == 7.0


def test_evaluate_refuses_what_does_not_fit():
    block = llama_block(8)
    problem = transformer([block], 8)
    best = choose_shardings(problem).assignments["block"]
    other = replace(best, outputs={"y": "R"})
    with pytest.raises(OptionError, match=r"block\.y in state .* but got R"):
        evaluate(problem, {"block": other})
    unknown = replace(best, ops={**best.ops, "q": "nonsense"})
    with pytest.raises(OptionError, match=r"block\.q .* but got 'nonsense'"):
        evaluate(problem, {"block": unknown})


def test_groups_follow_the_bindings_of_the_program():
    def layer(name: str, ins: str, outs: str, weight: str) -> LayerClass:
        x, y, w = value(ins, 4, 4), value(outs, 4, 4), value(weight, 4, 4)
        return LayerClass(name, "layer", Graph((x,), (w,), (op("o", (x, w), (y,)),), (y,)))

    first, body, last = (
        layer("a", "i", "o", "w"),
        layer("b", "x", "y", "u"),
        layer("c", "p", "q", "t"),
    )
    segments = (
        Segment("embed", first, {"i": "ids", "o": "h0", "w": "shared.weight"}),
        Segment("l.0", body, {"x": "h0", "y": "h1", "u": "l.0.weight"}),
        Segment("l.1", body, {"x": "h1", "y": "h2", "u": "l.1.weight"}),
        Segment("head", last, {"p": "h2", "q": "loss", "t": "shared.weight"}),
    )
    program = Program((), 4, segments, "loss", {})
    found = {frozenset(i.ports): i.states for i in interfaces(program, {"loss": (R, P)})}
    assert found == {
        frozenset({("a", "i")}): None,
        frozenset({("a", "o"), ("b", "x"), ("b", "y"), ("c", "p")}): None,
        frozenset({("c", "q")}): (R, P),
    }
    tied = {frozenset(g.ports): (g.count, g.states) for g in
            parameter_groups(program, {("a", "w"): (R, S(0)), ("c", "t"): (S(0), V)})}  # fmt: skip
    assert tied == {
        frozenset({("a", "w"), ("c", "t")}): (1, (S(0),)),
        frozenset({("b", "u")}): (2, None),
    }
