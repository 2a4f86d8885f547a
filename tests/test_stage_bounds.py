"""Bounds of pipelines against every cut and every choice of recomputation, simulated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.cost_models.pipeline import StageSeconds, held_at_peak, simulate
from autoshard.plan.solver import Builder, solve
from autoshard.plan.stage_bounds import (
    Ends,
    Layers,
    Looped,
    Traffic,
    fits,
    held,
    least_of,
    least_step_s,
    missing_bytes,
    turns,
)
from autoshard.schedules import by_name

SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("interleaved-1f1b", 2), ("looped-bfs", 2)]
NO_MEMORY = Layers(seconds=0.0, saved_bytes=0.0, pieces=(), state_bytes=0.0)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as so many numbers that are not negative, in order."""
    for cuts in itertools.combinations(range(total + parts - 1), parts - 1):
        ends = (-1, *cuts, total + parts - 1)
        yield tuple(b - a - 1 for a, b in itertools.pairwise(ends))


def step_s(looped: Looped, stages: Sequence[StageSeconds], tail_s: Sequence[float]) -> float:
    """What plans are compared by: the closed form where there is one, else the simulation.

    Args:
        tail_s: by stage.
    """
    if looped.closed_form:
        times = [s.forward_s + s.backward_s for s in stages]
        return (looped.num_micro_batches - 1) * max(times) + sum(times) + max(tail_s)
    schedule = by_name(
        looped.schedule, looped.num_ranks, looped.num_micro_batches, looped.virtual_stages
    )
    p = looped.num_ranks
    ends = simulate(schedule, stages).end_s
    return max(end + sum(tail_s[r::p]) for r, end in enumerate(ends))


@st.composite
def loops(draw: st.DrawFn) -> Looped:
    name, v = draw(st.sampled_from(SCHEDULES))
    p = draw(st.integers(2, 4 if v == 1 else 3))
    return Looped(name, p, draw(st.integers(1, 7)), v)


def positive() -> st.SearchStrategy[float]:
    return st.floats(0.05, 2.0)


@settings(max_examples=100, deadline=None)
@given(looped=loops(), data=st.data())
def test_no_stages_beat_their_bounds(looped: Looped, data: st.DataObject) -> None:
    """Of given stages, and of all stages with as many seconds in all."""
    pair = st.tuples(st.floats(0.0, 2.0), st.floats(0.0, 2.0))
    count = looped.num_stages
    times = data.draw(st.lists(pair, min_size=count, max_size=count))
    sends = data.draw(st.floats(0.0, 0.5))
    stages = [StageSeconds(forward_s=f, backward_s=b, send_s=sends) for f, b in times]
    tails = data.draw(st.lists(st.floats(0.0, 1.0), min_size=count, max_size=count))
    found = step_s(looped, stages, tails) * (1 + 1e-9)
    assert found >= turns(looped) * sum(f + b for f, b in times)
    if not looped.closed_form:
        by_rank = [sum(tails[r :: looped.num_ranks]) for r in range(looped.num_ranks)]
        assert found >= least_of(looped, stages, by_rank)


@settings(max_examples=30, deadline=None)
@given(looped=loops(), data=st.data())
def test_no_cut_and_no_recomputation_beats_the_program(looped: Looped, data: st.DataObject) -> None:
    """A few layers, each kept whole or freed in part or in all, within a memory limit.

    Something else is before them, and after them. Stages without a layer are left out where the
    bound knows of that.
    """
    number = data.draw(st.integers(1, 5))
    full = data.draw(st.booleans()) and number >= looped.num_stages - 2
    forward_s, backward_s, other_s = (data.draw(positive()) for _ in range(3))
    menu = [(0.0, 0.0), (0.4, data.draw(st.floats(0.0, 0.3))), (0.8, data.draw(st.floats(0.3, 1)))]
    state, moved_s, after_s = (data.draw(st.floats(0.0, 1.0)) for _ in range(3))
    slowdown = data.draw(st.sampled_from([0.0, 0.2, 1.0]))
    memory = data.draw(st.floats(0.5, 8.0))
    slopes = menu[1][1] / 0.4, (menu[2][1] - menu[1][1]) / 0.4
    pieces: tuple[tuple[float, float], ...] = ((0.4, menu[1][1]), (0.4, menu[2][1] - menu[1][1]))
    if slopes[0] > slopes[1]:  # the entry between is above the line from nothing to all
        pieces = ((0.8, menu[2][1]),)
    layers = Layers(
        seconds=number * (forward_s + backward_s), saved_bytes=float(number),
        pieces=tuple((number * b, number * s) for b, s in pieces), state_bytes=number * state,
        ends=Ends(number=number, before=1, after=1, first_s=other_s / 4, last_s=3 * other_s / 4)
        if full else None,
    )  # fmt: skip
    traffic = Traffic(moved_s=2 * number * moved_s, slowdown=slowdown, step_s=number * after_s)
    bound = least_step_s(looped, layers.seconds + other_s, layers, memory, traffic)
    lacking = missing_bytes(looped, layers, memory)
    assert (bound == float("inf")) == (lacking > 1e-6 * memory) or full

    def beside(own_s: float) -> float:
        return max(own_s, moved_s) + slowdown * min(own_s, moved_s)

    p, schedule = looped.num_ranks, by_name(
        looped.schedule, looped.num_ranks, looped.num_micro_batches, looped.virtual_stages
    )  # fmt: skip
    cuts = (c for c in compositions(number, looped.num_stages) if not full or all(c[1:-1]))
    some, end = itertools.islice(cuts, 40), looped.num_stages - 1
    for cut, chosen in itertools.product(some, itertools.product(range(3), repeat=number)):
        entries, stages, saved, tails = iter(chosen), [], [], []
        for stage, own in enumerate(cut):
            mine = [menu[next(entries)] for _ in range(own)]
            stages.append(
                StageSeconds(
                    forward_s=own * beside(forward_s) + (other_s / 4 if stage == 0 else 0.0),
                    backward_s=sum(beside(backward_s + again) for _, again in mine)
                    + (3 * other_s / 4 if stage == end else 0.0),
                )
            )
            saved.append(sum(1.0 - freed for freed, _ in mine))
            tails.append(own * after_s)
        kept = held_at_peak(schedule, saved)
        used = max(sum(kept[r::p]) + state * sum(cut[r::p]) for r in range(p))
        assert used >= memory + lacking - 1e-6 or not lacking
        if used <= memory:
            assert step_s(looped, stages, tails) >= bound * (1 - 1e-9), (cut, chosen)


@pytest.mark.parametrize("virtual_stages", [2, 4])
@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_one_micro_batch_takes_the_whole_model(ranks: int, virtual_stages: int) -> None:
    assert turns(Looped("interleaved-1f1b", ranks, 1, virtual_stages)) == pytest.approx(1.0)


@pytest.mark.parametrize(("p", "m", "v"), [(2, 3, 2), (4, 2, 2), (4, 4, 3), (8, 12, 4), (3, 9, 2)])
@pytest.mark.parametrize("name", ["interleaved-1f1b", "looped-bfs"])
def test_weights_of_the_constraints_prove_their_optimum(name: str, p: int, m: int, v: int) -> None:
    """Against the linear program of the same constraints, and the one with nothing to hold."""
    looped, builder = Looped(name, p, m, v), Builder()
    step = builder.variable(1.0, integer=False, upper=float("inf"))
    times = [builder.variable(integer=False, upper=1.0) for _ in range(p * v)]
    builder.row(times, lower=1.0, upper=1.0)
    for k in range(p * v):
        terms = np.zeros(p * v)
        terms[:k] += 1
        terms[k % p :: p] += m
        terms[k % p : k : p] -= looped.group
        builder.row([step, *times], [1.0, *-terms], lower=0.0)
    least = solve(builder.build()).objective
    assert turns(looped) == pytest.approx(least, rel=1e-6)
    assert least_step_s(looped, 3.0, NO_MEMORY, 1.0) == pytest.approx(3 * least, rel=1e-5)


def test_equal_stages_of_a_closed_form_are_as_fast_as_the_bound() -> None:
    assert turns(Looped("1f1b", 4, 8)) == 11 / 4
    assert least_step_s(Looped("1f1b", 4, 8), 2.0, NO_MEMORY, 1.0) == pytest.approx(5.5, rel=1e-5)


@pytest.mark.parametrize("m", [1, 3, 4, 9, 40])
def test_what_is_in_flight_is_held_by_the_schedule(m: int) -> None:
    for name, v in SCHEDULES:
        looped = Looped(name, 4, m, v)
        peak = held_at_peak(by_name(name, 4, m, v), [1.0] * looped.num_stages)
        for rank in range(4):
            assert sum(held(looped)[rank::4]) <= sum(peak[rank::4])
    assert held(Looped("1f1b", 4, m)) == tuple(min(m, 4 - s) for s in range(4))


def test_a_layer_on_every_stage_leaves_nothing_to_balance() -> None:
    looped = Looped("interleaved-1f1b", 4, 8, 2)
    ends = Ends(number=8, before=0, after=0, first_s=0.0, last_s=0.0)
    layers = Layers(seconds=1.0, saved_bytes=0.0, pieces=(), state_bytes=0.0, ends=ends)
    stages = [StageSeconds(forward_s=1 / 24, backward_s=2 / 24)] * 8
    bound = least_step_s(looped, 1.0, layers, 1.0)
    assert bound == pytest.approx(least_of(looped, stages, [0.0] * 4), rel=1e-5)
    assert turns(looped) * 1.02 < bound <= step_s(looped, stages, [0.0] * 8)


def test_memory_in_flight_costs_time() -> None:
    """Of 1F1B's first stage, which holds most, either layers move on or recompute."""
    looped = Looped("1f1b", 4, 16)
    layers = Layers(seconds=1.0, saved_bytes=1.0, pieces=((0.5, 0.1),), state_bytes=0.0)
    steps = [least_step_s(looped, 1.0, layers, memory) for memory in (1.0, 0.5, 0.3, 0.25, 0.2)]
    assert steps == sorted(steps)
    assert steps[0] == pytest.approx(turns(looped), rel=1e-5)
    assert steps[1] > steps[0] * 1.01
    assert steps[-1] == float("inf")


@settings(max_examples=60, deadline=None)
@given(looped=loops(), memory=st.floats(0.1, 4.0), state=st.floats(0.0, 2.0), data=st.data())
def test_what_fits_is_what_the_linear_program_can_hold(
    looped: Looped, memory: float, state: float, data: st.DataObject
) -> None:
    count = looped.num_stages
    number = data.draw(st.integers(max(1, count - 2), count + 3))
    ends = Ends(number=number, before=1, after=1, first_s=0.0, last_s=0.0)
    layers = Layers(
        seconds=1.0, saved_bytes=2.0, pieces=((1.5, 1.0),), state_bytes=state, ends=ends
    )  # fmt: skip
    builder = Builder()
    shares = [
        builder.variable(lower=1 / number if 0 < k < count - 1 else 0.0, integer=False, upper=9.0)
        for k in range(count)
    ]
    builder.row(shares, lower=1.0, upper=1.0)
    for rank in range(looped.num_ranks):
        own = slice(rank, None, looped.num_ranks)
        builder.row(shares[own], [0.5 * n + state for n in held(looped)[own]], upper=memory)
    assert fits(looped, layers, memory) == (solve(builder.build()).status == "optimal")
