"""Stage splits against enumeration of every split, and at the sizes of real models."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest

from autoshard.errors import OptionError
from autoshard.plan.stages import (
    Choice,
    Run,
    StageProblem,
    Tie,
    evaluate_stages,
    split_stages,
)

NEVER = float("inf")


def random_problem(seed: int) -> StageProblem:
    rng = random.Random(seed)
    runs = []
    for _ in range(rng.randint(1, 4)):
        menu = tuple(
            Choice(
                forward_s=float(rng.randint(1, 9)),
                backward_s=float(rng.randint(1, 12)),
                saved_bytes=float(rng.randint(0, 9)),
                workspace_bytes=float(rng.randint(0, 9)),
            )
            for _ in range(rng.randint(1, 3))
        )
        runs.append(
            Run(
                count=rng.choice([1, 1, 2, 3]),
                menu=menu,
                parameter_bytes=float(rng.randint(0, 12)),
                has_parameters=rng.random() < 0.8,
                step_s=float(rng.randint(0, 9)),
                send_s=float(rng.randint(0, 4)),
            )
        )
    while sum(r.count for r in runs) > 6:
        runs.pop()
    ties = ()
    if len(runs) > 1 and rng.random() < 0.4:
        ties = (Tie(runs=(0, len(runs) - 1), parameter_bytes=float(rng.randint(1, 15))),)
    return StageProblem(
        runs=tuple(runs), num_stages=rng.randint(1, 4), num_micro_batches=rng.choice([1, 2, 5]),
        memory_bytes=float(rng.randint(10, 90)), schedule=rng.choice(["none", "gpipe", "1f1b"]),
        ties=ties, stage_bytes=float(rng.choice([0, 3])),
    )  # fmt: skip


def in_flight(problem: StageProblem, stage: int) -> int:
    """As the schedules are defined: GPipe runs all forwards first; 1F1B at most the stages left."""
    if problem.schedule == "gpipe":
        return problem.num_micro_batches
    if problem.num_stages == 1:
        return 1
    return min(problem.num_micro_batches, problem.num_stages - stage)


def stage_options(problem: StageProblem, stage: int, segments: list[int]):
    """``(seconds, bytes)`` of every way to give the segments entries."""
    runs = [problem.runs[r] for r in segments]
    fixed = problem.stage_bytes + sum(r.parameter_bytes for r in runs)
    fixed += sum(t.parameter_bytes for t in problem.ties if set(t.runs) & set(segments))
    for entries in itertools.product(*(r.menu for r in runs)):
        saved = in_flight(problem, stage) * sum(e.saved_bytes for e in entries)
        workspace = max(e.workspace_bytes for e in entries)
        seconds = sum(e.forward_s + e.backward_s for e in entries)
        yield seconds, fixed + saved + workspace


def every_split(problem: StageProblem):
    """Per split the segments of each stage."""
    order = [r for r, run in enumerate(problem.runs) for _ in range(run.count)]
    for cuts in itertools.combinations(range(1, len(order)), problem.num_stages - 1):
        ends = (0, *cuts, len(order))
        stages = [order[a:b] for a, b in itertools.pairwise(ends)]
        if all(any(problem.runs[r].has_parameters for r in stage) for stage in stages):
            yield stages


def brute_force(problem: StageProblem) -> tuple[float, float]:
    """Seconds of the best step, and the least memory with which there is any."""
    best, memory = NEVER, NEVER
    for stages in every_split(problem):
        options = [list(stage_options(problem, s, own)) for s, own in enumerate(stages)]
        memory = min(memory, max(min(b for _, b in own) for own in options))
        fitting = [[t for t, b in own if b <= problem.memory_bytes] for own in options]
        sends = 2 * sum(problem.runs[own[-1]].send_s for own in stages[:-1])
        tail = max(sum(problem.runs[r].step_s for r in own) for own in stages)
        for seconds in itertools.product(*fitting):
            pace = (problem.num_micro_batches - 1) * max(seconds)
            best = min(best, sum(seconds) + pace + sends + tail)
    return best, memory


@pytest.mark.parametrize("seed", range(80))
def test_a_time_limit_hides_only_what_is_slower(seed):
    problem = random_problem(seed)
    free = split_stages(problem)
    if not free.stages:
        assert split_stages(problem, limit_s=1e9).stages == ()
        return
    limited = split_stages(problem, limit_s=free.step_s * 1.001)
    assert limited.step_s == pytest.approx(free.step_s)
    beaten = split_stages(problem, limit_s=free.step_s * 0.5)
    if beaten.stages:  # the limit is on what a stage takes, which cannot rule out every split
        assert beaten.step_s >= free.step_s * (1 - 1e-9)
    else:
        assert beaten.beaten and beaten.missing_bytes == ()


@pytest.mark.parametrize("block", range(8))
def test_equals_enumeration_of_every_split(block):
    feasible = short = 0
    for seed in range(60 * block, 60 * block + 60):
        problem = random_problem(seed)
        best, memory = brute_force(problem)
        split = split_stages(problem)
        if best == NEVER:
            assert split.status == "infeasible" and not split.stages, seed
            if memory == NEVER:
                assert split.missing_bytes == (), seed
            else:
                short += 1
                lack = max(split.missing_bytes)
                assert lack == pytest.approx(memory - problem.memory_bytes), seed
                more = replace(problem, memory_bytes=problem.memory_bytes + lack)
                assert split_stages(more).status == "optimal"
            continue
        feasible += 1
        assert split.status == "optimal" and split.gap == 0.0, seed
        assert split.step_s == pytest.approx(best), seed
        counts: dict[int, int] = {}
        for stage in split.stages:
            assert stage.memory_bytes <= problem.memory_bytes, seed
            for (run, _), number in stage.counts.items():
                counts[run] = counts.get(run, 0) + number
        assert counts == {r: run.count for r, run in enumerate(problem.runs)}, seed
        again, _ = evaluate_stages(problem, [s.counts for s in split.stages])
        assert again == split.step_s
    assert feasible > 15 and short > 3


def llama(layers: int, stages: int, memory: float, **options) -> StageProblem:
    """Five ways to recompute a layer between nothing and everything."""
    menu = tuple(
        Choice(forward_s=0.010, backward_s=0.020 + again, saved_bytes=saved, workspace_bytes=space)
        for again, saved, space in (
            (0.0, 2.0e9, 1.0e9), (0.0015, 1.2e9, 1.5e9), (0.004, 0.6e9, 2.0e9),
            (0.007, 0.35e9, 2.5e9), (0.0095, 0.1e9, 3.0e9),
        )
    )  # fmt: skip
    first = Choice(forward_s=0.001, backward_s=0.001, saved_bytes=1e8, workspace_bytes=1e9)
    last = Choice(forward_s=0.008, backward_s=0.016, saved_bytes=2e9, workspace_bytes=4e9)
    runs = (
        Run(count=1, menu=(first,), parameter_bytes=2e9, send_s=1e-3),
        Run(count=layers, menu=menu, parameter_bytes=2e9, send_s=1e-3, step_s=3e-3),
        Run(count=1, menu=(last,), parameter_bytes=2e9),
    )
    return StageProblem(
        runs=runs, num_stages=stages, num_micro_batches=32, memory_bytes=memory, **options
    )


def test_early_stages_of_1f1b_recompute_more_and_have_fewer_layers():
    split = split_stages(llama(126, 16, 80e9))
    assert split.status == "optimal"
    layers = [sum(k for (run, _), k in s.counts.items() if run == 1) for s in split.stages]
    assert sum(layers) == 126
    assert layers[0] < layers[-2]
    kept = [s.counts.get((1, 0), 0) for s in split.stages]
    assert kept[0] == 0 and kept[-2] == layers[-2]


def test_time_to_plan_hardly_depends_on_depth():
    split_stages(llama(30, 4, 80e9))
    seconds = []
    for layers, stages in ((32, 4), (126, 16)):
        begin = time.perf_counter()
        assert split_stages(llama(layers, stages, 80e9)).status == "optimal"
        seconds.append(time.perf_counter() - begin)
    assert seconds[1] < 1.5


def test_more_memory_is_never_slower():
    steps = [split_stages(llama(126, 16, gb * 1e9)).step_s for gb in (40, 60, 80, 120, 1000)]
    assert steps == sorted(steps, reverse=True)
    # With memory to spare nothing is recomputed.
    best = split_stages(llama(126, 16, 1000e9))
    assert all(entry == 0 for s in best.stages for _, entry in s.counts)


def test_a_tie_within_one_stage_is_held_once():
    entry = Choice(forward_s=1.0, backward_s=1.0)
    runs = tuple(Run(count=1, menu=(entry,)) for _ in range(3))
    tie = (Tie(runs=(0, 2), parameter_bytes=10.0),)
    one = StageProblem(runs=runs, num_stages=1, num_micro_batches=1, memory_bytes=10.0, ties=tie)
    assert [s.memory_bytes for s in split_stages(one).stages] == [10.0]
    two = split_stages(replace(one, num_stages=2))
    assert [s.memory_bytes for s in two.stages] == [10.0, 10.0]


def test_too_many_stages_is_not_a_matter_of_memory():
    split = split_stages(llama(2, 6, 80e9))
    assert (split.status, split.missing_bytes) == ("infeasible", ())


def test_long_fronts_are_thinned_and_the_result_says_so(monkeypatch):
    monkeypatch.setattr("autoshard.plan.stages._FEW_MIXES", 2)
    monkeypatch.setattr("autoshard.plan.stages._MANY_MIXES", 3)
    # With memory to spare no front is asked for what it has lost.
    assert split_stages(llama(126, 16, 1000e9)).status == "optimal"
    thinned = split_stages(llama(126, 16, 80e9))
    assert thinned.status == "feasible"
    assert 0.0 < thinned.gap < 0.5
    assert all(s.memory_bytes <= 80e9 for s in thinned.stages)
    monkeypatch.undo()
    best = split_stages(llama(126, 16, 80e9))
    assert thinned.bound_s <= best.step_s <= thinned.step_s


def test_thinning_never_lies_about_feasibility_or_the_bound(monkeypatch):
    monkeypatch.setattr("autoshard.plan.stages._FEW_MIXES", 1)
    monkeypatch.setattr("autoshard.plan.stages._MANY_MIXES", 2)
    for seed in range(300):
        problem = random_problem(seed)
        best, _ = brute_force(problem)
        split = split_stages(problem, gap=0.0)
        assert (split.status == "infeasible") == (best == NEVER), seed
        if split.stages:
            assert split.bound_s <= best * (1 + 1e-9) and best <= split.step_s * (1 + 1e-9), seed
            assert split.status != "optimal" or split.step_s == pytest.approx(best), seed


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schedule": "zigzag"}, "schedule expects none, gpipe or 1f1b but got 'zigzag'"),
        ({"num_stages": 0}, "num_stages expects a positive number but got 0"),
        ({"num_micro_batches": -1}, "num_micro_batches expects a positive number but got -1"),
    ],
)
def test_nonsense_is_refused(change, text):
    with pytest.raises(OptionError, match=text):
        split_stages(replace(llama(4, 2, 80e9), **change))
