"""Schedules with weight versions and replicas as data, their plans and pins."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stale_runs as runs

from autoshard.errors import OptionError, PlanFileError
from autoshard.options import Constraints, validate_world_size
from autoshard.plan import files
from autoshard.plan.plan import Plan
from autoshard.plan.replicas import ReplicaProblem, Segment
from autoshard.versioned import (
    Action,
    Rules,
    StageTimes,
    VersionedSchedule,
    dry_run,
    holds,
    step_seconds,
)


def rules(schedule: str, replicas: tuple[int, ...], m: int, **more: Any) -> Rules:
    return Rules(schedule=schedule, replicas=replicas, num_micro_batches=m, **more)


# -- schedules ------------------------------------------------------------------------------------

# in flight, versions and staleness per stage; steps until a batch has left
HELD = [
    (rules("pipedream", (1, 1, 1, 1), 1), (4, 3, 2, 1), (4, 3, 2, 1), (3, 2, 1, 0), 3),
    (rules("pipedream", (1, 1, 1), 1, vertical_sync=True), (3, 2, 1), (3, 3, 3), (2, 2, 2), 2),
    (rules("pipedream-2bw", (1, 1, 1, 1), 4), (4, 3, 2, 1), (2, 2, 2, 2), (1, 1, 1, 1), 1),
    (rules("pipedream-2bw", (3, 1), 6), (2, 1), (2, 2), (1, 1), 1),
    (rules("pipedream", (3, 1), 3), (2, 1), (2, 1), (1, 0), 1),
    (rules("pipedream", (15, 1), 15), (2, 1), (2, 1), (1, 0), 1),
    (rules("1f1b", (3, 1), 6), (2, 1), (1, 1), (0, 0), 0),
    (rules("gpipe", (2, 1), 6), (3, 6), (1, 1), (0, 0), 0),
]


@pytest.mark.parametrize(("given", "in_flight", "versions", "staleness", "delay"), HELD, ids=str)
def test_what_stages_hold(
    given: Rules,
    in_flight: tuple[int, ...],
    versions: tuple[int, ...],
    staleness: tuple[int, ...],
    delay: int,
) -> None:
    """Stage ``s`` of ``p`` stashes ``p - s`` versions; 2BW two; vertical sync as many as enter."""
    assert holds(given) == (in_flight, versions)
    assert given.staleness == staleness
    assert given.delay == delay


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "pipedream", "pipedream-2bw"])
@pytest.mark.parametrize("replicas", [(1,), (1, 1, 1), (3, 1), (1, 3), (2, 1, 1), (1, 2, 3), (4,)])
@pytest.mark.parametrize("vertical_sync", [False, True])
def test_schedules_run(schedule: str, replicas: tuple[int, ...], vertical_sync: bool) -> None:
    if vertical_sync and schedule != "pipedream":
        return
    given = rules(schedule, replicas, 12, vertical_sync=vertical_sync)
    schedule_ = given.unrolled(4)
    assert VersionedSchedule.parse(str(schedule_)) == schedule_
    run = dry_run(schedule_, given)
    done = [a for _, a in run.order if a.what != "S"]
    assert len(done) == len(set(done)) == 2 * 4 * 12 * len(replicas)
    for (rank, a), (other, b) in itertools.product(run.order[:200], repeat=2):
        if a.micro_batch == b.micro_batch and a.stage == b.stage and a.what != "S" != b.what:
            assert rank == other, "both passes of a micro-batch meet one replica"
            assert a.version == b.version, "both passes meet one version"


def test_pictures_of_the_paper() -> None:
    """Figure 8 of the PipeDream paper, stage by stage, and its text form."""
    lines = str(rules("pipedream", (2, 1), 2).unrolled(2)).splitlines()
    assert lines == [
        "0F0@0 0F2@0 0B0@0 0S1 0B2@0 0S2",
        "0F1@0 0F3@0 0B1@0 0S1 0B3@0 0S2",
        "1F0@0 1B0@0 1S1 1F1@1 1B1@1 1S2 1F2@2 1B2@2 1S3 1F3@3 1B3@3 1S4",
    ]


WRONG = [
    ("0F0@0 0B0@0 0S1 0F1@1 0B1@0 0S2", "version of its forward"),
    ("0F0@1 0B0@1", "has version 0"),
    ("0B0@0", "has not run"),
    ("0F0@0 0B0@0 0S2", "make version 1 next"),
    ("1F0@0", "stage 0 on rank 0"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_wrong_schedules(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        dry_run(VersionedSchedule.parse(text), rules("pipedream", (1,), 1))


def test_wrong_places_and_deadlocks() -> None:
    given = rules("pipedream", (2,), 2)
    with pytest.raises(OptionError, match="on rank 1, whose turn it is"):
        dry_run(VersionedSchedule.parse("0F1@0 0B1@0\n0F0@0 0B0@0"), given)
    with pytest.raises(OptionError, match="rank 1 at 0S1"):
        dry_run(VersionedSchedule.parse("0F0@0 0B0@0\n0F1@0 0B1@0 0S1"), given)
    with pytest.raises(OptionError, match="such as 2F0@0"):
        Action.parse("2F0")
    with pytest.raises(OptionError, match="multiple of 3"):
        rules("pipedream", (3, 1), 4)
    with pytest.raises(OptionError, match="at least 3 micro-batches"):
        rules("pipedream-2bw", (1, 1, 1, 1), 2)
    with pytest.raises(OptionError, match="can have uneven replicas"):
        rules("zb-h1", (1,), 1)


def test_steady_state() -> None:
    """Without a flush a pipeline takes as long per micro-batch as its slowest stage; with one,
    ``(m + p - 1)`` turns. A stage on three ranks is three times as fast."""
    equal = [StageTimes(forward_s=1, backward_s=2)] * 4
    assert step_seconds(rules("pipedream", (1, 1, 1, 1), 1), equal) == pytest.approx(3)
    assert step_seconds(rules("pipedream-2bw", (1, 1, 1, 1), 4), equal) == pytest.approx(12)
    assert step_seconds(rules("1f1b", (1, 1, 1, 1), 8), equal) == pytest.approx(11 * 3)
    uneven = [StageTimes(forward_s=3, backward_s=6), StageTimes(forward_s=1, backward_s=2)]
    assert step_seconds(rules("pipedream", (3, 1), 3), uneven) == pytest.approx(9)
    slow = [StageTimes(forward_s=3, backward_s=6, update_s=3), uneven[1]]
    assert step_seconds(rules("pipedream", (3, 1), 3), slow) == pytest.approx(12)


TIED = [
    (rules("pipedream", (1, 1, 1, 1), 1, ties=((0, 3),)), (3, 2, 1, 3)),
    (rules("pipedream", (1, 1, 1), 1, ties=((0, 2),), vertical_sync=True), (2, 2, 2)),
    (rules("pipedream", (2, 1, 2), 2, ties=((0, 2),)), (2, 2, 2)),
    (rules("pipedream", (3, 1), 3, ties=((0, 1),)), (1, 1)),
    (rules("pipedream-2bw", (1, 1, 1, 1), 4, ties=((0, 3),)), (1, 1, 1, 1)),
    (rules("pipedream-2bw", (3, 1), 6, ties=((0, 1),)), (1, 1)),
    (rules("1f1b", (2, 1, 1), 4, ties=((0, 1), (0, 2))), (0, 0, 0)),
]


@pytest.mark.parametrize(("given", "staleness"), TIED, ids=str)
def test_tied_weights_are_as_old_as_their_owner(given: Rules, staleness: tuple[int, ...]) -> None:
    """And the owner has made what another stage needs before that begins the micro-batch."""
    assert given.staleness == staleness
    made: set[tuple[int, int]] = set()
    for _, action in dry_run(given.unrolled(5), given).order:
        if action.what == "S":
            made.add((action.stage, action.version))
        for owner in (o for o, other in given.ties if other == action.stage):
            needed = given.version(owner, max(0, action.micro_batch))
            assert action.what != "F" or not needed or (owner, needed) in made


def test_gradients_of_tied_weights_go_to_one_owner_each() -> None:
    """Under PipeDream to the one that updates by the same micro-batch, else to all in turn."""
    piped = rules("pipedream", (3, 1), 3, ties=((0, 1),))
    assert [piped.tie_home(0, 3, i) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    flushed = rules("1f1b", (2, 3), 6, ties=((0, 1),))
    assert [flushed.tie_home(0, rank, 5) for rank in (2, 3, 4)] == [0, 1, 0]


def test_messages_of_many_replicas_to_one_take_turns() -> None:
    """15 ranks send to one, whose card takes one message after the other."""
    times = [StageTimes(forward_s=3, backward_s=6, send_s=1), StageTimes(forward_s=0, backward_s=0)]
    given = rules("pipedream", (15, 1), 15)
    assert step_seconds(given, times) == pytest.approx(15)
    assert step_seconds(rules("pipedream", (5, 1), 5), times) == pytest.approx(9)


# -- the program ----------------------------------------------------------------------------------


def problem(seed: int, **more: Any) -> ReplicaProblem:
    random = np.random.default_rng(seed)
    count = int(random.integers(3, 6))
    segments = [
        Segment(
            forward_s=f, backward_s=2 * f, send_s=s, weight_bytes=w, state_bytes=4 * w,
            saved_bytes=a,
        )
        for f, s, w, a in zip(*(random.uniform(0.1, 1, count) for _ in range(4)), strict=True)
    ]  # fmt: skip

    def update_s(replicas: int) -> list[float]:
        return [2 * s.weight_bytes * (replicas - 1) / replicas for s in segments]

    return ReplicaProblem(
        segments=[segments], update_s=update_s, num_ranks=4, schedule="pipedream",
        num_micro_batches=12, **more,
    )  # fmt: skip


def by_enumeration(given: ReplicaProblem) -> float:
    """The least bottleneck over all cuts and replicas."""
    (segments,) = given.segments
    count, best = len(segments), np.inf
    for stages in range(1, count + 1):
        for cuts in itertools.combinations(range(1, count), stages - 1):
            bounds = list(itertools.pairwise((0, *cuts, count)))
            for replicas in itertools.product(range(1, 5), repeat=stages):
                if sum(replicas) != 4:
                    continue
                worst = max((2 * segments[c - 1].send_s for c in cuts), default=0.0)
                for stage, ((a, b), r) in enumerate(zip(bounds, replicas, strict=True)):
                    own, ahead = segments[a:b], -(-sum(replicas[stage:]) // r)
                    memory = sum(
                        s.state_bytes + (ahead - 1) * s.weight_bytes + ahead * s.saved_bytes
                        for s in own
                    )
                    if memory > given.memory_bytes:
                        worst = np.inf
                    busy = sum(s.forward_s + s.backward_s for s in own)
                    worst = max(worst, (busy + sum(given.update_s(r)[a:b])) / r)
                best = min(best, worst)
    return float(best)


@pytest.mark.parametrize("memory_bytes", [np.inf, 9.0])
@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_the_best_replicas(seed: int, memory_bytes: float) -> None:
    given = problem(seed, memory_bytes=memory_bytes)
    found = given.best()
    expected = by_enumeration(given)
    if expected == np.inf:
        assert not found.stages or found.missing_bytes > 0
        return
    assert found.bottleneck_s == pytest.approx(expected)
    assert sum(s.replicas for s in found.stages) == 4


# -- plans ----------------------------------------------------------------------------------------


def test_a_plan_says_how_stale_it_is(tmp_path: Path) -> None:
    plan = runs.setup("chain", schedule="pipedream", replicas=(3, 1)).plan
    assert (plan.replicas, plan.staleness, plan.num_micro_batches) == ((3, 1), (1, 0), 3)
    assert [stage.weight_versions for stage in plan.stages] == [2, 1]
    text = str(plan)
    assert "1, 0 updates; 2, 1 version(s)" in text
    assert "stale training was allowed" in text and "update per 12, 4 samples" in text
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    asp = runs.setup("chain", data_parallel="asp").plan
    assert asp.staleness == (None,) and "by any number of updates" in str(asp)
    ssp = runs.setup("chain", data_parallel="ssp", staleness=1).plan
    assert ssp.staleness == (9,) and ssp.ssp_bound == 1


def test_weight_versions_are_in_the_memory() -> None:
    def weights(**pins: Any) -> list[int]:
        plan = runs.setup("chain", stages=(3, 3, 3, 2), replicas=(1, 1, 1, 1), **pins).plan
        return [stage.memory.parameters for stage in plan.stages]

    once = weights(schedule="1f1b", micro_batch_size=3)
    assert weights(schedule="pipedream") == [n * w for n, w in zip((4, 3, 2, 1), once, strict=True)]
    assert weights(schedule="pipedream-2bw", micro_batch_size=3) == [2 * w for w in once]


def test_damaged_plans_are_refused() -> None:
    text = runs.setup("chain", schedule="pipedream", replicas=(3, 1)).plan_text
    assert b'"replicas": 3' in text or b'"replicas":3' in text
    for old, new in ((b'"replicas":3', b'"replicas":2'), (b'"replicas":3', b'"replicas":0')):
        damaged = text.replace(old, new).replace(old.replace(b":", b": "), new)
        with pytest.raises(PlanFileError, match="replicas"):
            files.loads(damaged)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "pipedream"}, "allow_stale=True"),
    ({"schedule": "pipedream-2bw"}, "allow_stale=True"),
    ({"data_parallel": "asp"}, "allow_stale=True"),
    ({"data_parallel": "ssp", "staleness": 1}, "allow_stale=True"),
    ({"data_parallel": "ssp", "allow_stale": True}, "expects staleness"),
    ({"staleness": 1}, "bound of data_parallel 'ssp'"),
    ({"vertical_sync": True}, "schedule 'pipedream'"),
    ({"replicas": (3, 0)}, "such as \\(3, 1\\)"),
    ({"replicas": (3, 1), "dp": 2}, "expect dp to be 1"),
    ({"replicas": (3, 1), "tp": 2}, "expect tp to be 1"),
    ({"replicas": (3, 1), "pp": 3}, "2 stages but pp is 3"),
    ({"replicas": (3, 1), "schedule": "zb-h1"}, "expect schedule to be one of"),
    ({"replicas": (3, 1), "data_parallel": "zero1"}, "hold weights and optimizer state whole"),
    ({"data_parallel": "asp", "allow_stale": True, "pp": 2}, "whole on every worker"),
    ({"allow_stale": 1}, "expects True or False"),
    ({"bucket_bytes": 0}, "positive integer"),
]


@pytest.mark.parametrize(("pins", "message"), REFUSED, ids=str)
def test_pins_that_contradict_each_other(pins: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Constraints.of(pins)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match="hold 4 ranks but world_size is 8"):
        validate_world_size(8, Constraints(replicas=(3, 1)))
    with pytest.raises(OptionError, match="multiple of 3 minibatches"):
        runs.setup("chain", schedule="pipedream", replicas=(3, 1), micro_batch_size=3)
    with pytest.raises(OptionError, match="micro-batches that each stage's ranks can share"):
        runs.setup("chain", replicas=(3, 1), micro_batch_size=12)
    with pytest.raises(OptionError, match="one per worker"):
        runs.setup("chain", data_parallel="asp", micro_batch_size=6)


def test_nothing_stale_is_chosen_without_a_pin() -> None:
    plan = runs.setup("chain", allow_stale=True).plan
    assert not plan.staleness and not plan.is_replicated


def test_bucket_bytes_are_in_the_plan() -> None:
    assert runs.setup("chain", dp=4, bucket_bytes=1000).plan.bucket_bytes == 1000


@pytest.mark.parametrize(
    ("gigabits", "world_size", "per_node", "replicas", "published"),
    [
        (10.0, 4, 1, (3, 1), (1.46, 5.28)),
        (10.0, 16, 4, (15, 1), (0.85 * 5.28, 1.15 * 5.28)),
        (25.0, 16, 8, (15, 1), (0.85 * 2.98, 1.15 * 2.98)),
    ],
)
def test_vgg16_gains_on_slow_links(
    gigabits: float,
    world_size: int,
    per_node: int,
    replicas: tuple[int, ...],
    published: tuple[float, float],
) -> None:
    """The planner finds the published splits, linear layers apart from most convolutions, and
    about the published gain over data parallelism (PipeDream, table 1: 5.28 on 4 x 4 V100 with 10
    Gb/s, 2.98 on 2 x 8 with 25 Gb/s; 1.46 to 5.28 over all models)."""
    from benchmarks.asynchronous import gain

    factor, plan = gain(gigabits, world_size, per_node)
    assert plan.replicas == replicas
    paths = [[segment.path for segment in stage.segments] for stage in plan.stages]
    assert any("features" in path for path in paths[0])
    assert not any("classifier" in path for path in paths[0])
    assert [path for path in paths[1] if "classifier" in path][-1] == paths[1][-1]
    assert published[0] <= factor <= published[1]
