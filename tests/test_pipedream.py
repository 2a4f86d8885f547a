"""PipeDream's profiles: the format, and splits against enumeration of every pipeline."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest

import autoshard
from autoshard.errors import OptionError
from autoshard.profile import pipedream_split
from autoshard.profile.downsets import Graph, downsets
from autoshard.profile.pipedream import Profile, ProfileNode, parse_pipedream
from autoshard.profile.pipedream_split import ProfileSplit, split_pipedream

SMALL = (
    "a -- Input0 -- forward_compute_time=9.0, backward_compute_time=0.0, "
    "activation_size=5e12, parameter_size=0.000\n"
    "b -- Conv2d(3, 8, kernel_size=(3, 3)) -- forward_compute_time=10.0, "
    "backward_compute_time=20.0, activation_size=[2e6; 1e6], parameter_size=1000.000\n"
    "c -- Linear(8, 2) -- forward_compute_time=5.0, backward_compute_time=10.0, "
    "activation_size=1e3, parameter_size=4e8 -- stage_id=1\n"
    "\ta -- b\n\tb -- c\n"
)


def node(name: str, compute_s: float, sent: float, parameters: float) -> ProfileNode:
    return ProfileNode(
        name=name, module="Op", forward_s=compute_s / 4, backward_s=compute_s * 3 / 4,
        activation_bytes=sent, parameter_bytes=parameters,
    )  # fmt: skip


def random_profile(rng: random.Random) -> Profile:
    """Up to 8 nodes, many of which cost nothing; bandwidth is 1 byte per second."""
    names = [f"n{i}" for i in range(rng.randint(1, 8))]
    nodes = tuple(
        node(n, rng.choice([0, 0, 1, 2, 5, 9]), rng.choice([0, 1, 3, 8]), rng.choice([0, 0, 4]))
        for n in names
    )
    density = rng.choice([0.2, 0.4, 0.7])
    edges = [e for e in itertools.combinations(names, 2) if rng.random() < density]
    return Profile(nodes=nodes, edges=tuple(edges))


def crossing(profile: Profile, done: frozenset[str]) -> float:
    leaving = {a for a, b in profile.edges if a in done and b not in done}
    return sum(n.activation_bytes for n in profile.nodes if n.name in leaving)


def stage_s(profile: Profile, before: frozenset[str], after: frozenset[str], r: int) -> float:
    inside = [n for n in profile.nodes if n.name in after - before]
    compute = sum(n.forward_s + n.backward_s for n in inside)
    sync = 4 * (r - 1) * sum(n.parameter_bytes for n in inside) / r
    own = (compute + sync) / r
    return own if not before else max(own, 2 * crossing(profile, before) / r,
                                      2 * crossing(profile, after) / r)  # fmt: skip


def enumerated(profile: Profile, machines: int) -> float:
    """The least bottleneck over every chain of downsets and every number of replicas."""
    names = [n.name for n in profile.nodes]
    sets = [
        frozenset(chosen)
        for size in range(len(names) + 1)
        for chosen in itertools.combinations(names, size)
        if all(a in chosen for a, b in profile.edges if b in chosen)
    ]
    best = {(s, m): math.inf for s in sets for m in range(machines + 1)}
    best[frozenset(), 0] = 0.0
    for after in sets[1:]:
        for before in (s for s in sets if s < after):
            for r in range(1, machines + 1):
                seconds = stage_s(profile, before, after, r)
                for m in range(machines - r + 1):
                    both = max(best[before, m], seconds)
                    best[after, m + r] = min(best[after, m + r], both)
    return min(best[frozenset(names), m] for m in range(1, machines + 1))


def check(profile: Profile, split: ProfileSplit, machines: int) -> None:
    """A split is a pipeline, and takes what it says."""
    assert sum(s.replicas for s in split.stages) <= machines
    done: frozenset[str] = frozenset()
    for stage in split.stages:
        after = done | set(stage.nodes)
        assert len(after) == len(done) + len(stage.nodes) and stage.nodes
        assert all(a in after for a, b in profile.edges if b in after)
        assert stage.time_s == pytest.approx(stage_s(profile, done, after, stage.replicas))
        assert stage.activation_bytes == crossing(profile, after)
        done = after
    assert len(done) == len(profile.nodes)
    assert split.bottleneck_s == max(s.time_s for s in split.stages)
    assert split.bound_s <= split.bottleneck_s


@pytest.mark.parametrize("seed", range(60))
def test_split_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    profile = random_profile(rng)
    machines = rng.randint(1, 4)
    split = split_pipedream(profile, machines, 1.0)
    check(profile, split, machines)
    assert split.optimal
    assert split.bottleneck_s == pytest.approx(enumerated(profile, machines), abs=1e-12)


def test_limits_on_downsets_give_a_pipeline_and_an_honest_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipedream_split, "_MOST_FOUND", 6)
    monkeypatch.setattr(pipedream_split, "_MOST_TRIED", 12)
    proven = 0
    for seed in range(40):
        profile = random_profile(random.Random(seed))
        split = split_pipedream(profile, 3, 1.0)
        check(profile, split, 3)
        best = enumerated(profile, 3)
        assert split.bound_s <= best + 1e-9
        if split.optimal:
            assert split.bottleneck_s == pytest.approx(best, abs=1e-12)
        proven += split.optimal
    assert 0 < proven < 40


def branches(count: int, length: int, modules: int) -> Profile:
    """Parallel chains that meet and part again: ``(length + 1) ** count`` cuts per module."""
    nodes, edges, last = [node("in", 1e-3, 1e6, 1e5)], [], "in"
    rng = random.Random(0)
    for m in range(modules):
        ends = []
        for b in range(count):
            before = last
            for i in range(length):
                name = f"m{m}b{b}n{i}"
                nodes.append(node(name, rng.uniform(1e-3, 2e-3), rng.choice([1e5, 2e5]), 1e5))
                edges.append((before, name))
                before = name
            ends.append(before)
        last = f"m{m}out"
        nodes.append(node(last, 0.0, 1e6, 0.0))
        edges += [(end, last) for end in ends]
    return Profile(nodes=tuple(nodes), edges=tuple(edges))


@pytest.mark.parametrize("machines", [4, 16])
def test_hundreds_of_nodes_with_branches_are_fast(machines: int) -> None:
    profile = branches(6, 5, 20)  # 621 nodes, about a million downsets
    start = time.process_time()
    split = split_pipedream(profile, machines, 1e9)
    assert time.process_time() - start < 5
    assert sum(s.replicas for s in split.stages) <= machines
    assert split.bottleneck_s < 1.1 * split.bound_s


def test_downsets_leave_out_what_takes_nothing_along() -> None:
    # Ten outputs that nobody reads would be a thousand downsets.
    nodes = [node("x", 1.0, 8.0, 0.0), *(node(f"y{i}", 0.0, 8.0, 0.0) for i in range(10))]
    profile = Profile(nodes=tuple(nodes), edges=tuple(("x", f"y{i}") for i in range(10)))
    found = downsets(Graph.of(profile), np.full(11, np.inf), math.inf, most=100)
    assert found is not None and found.tolist() == [[True] * 11]


def test_reads_the_format(tmp_path) -> None:
    path = tmp_path / "small.graph.txt"
    path.write_text(SMALL)
    profile = autoshard.profile.read_pipedream(path)
    b = profile.nodes[1]
    assert (b.name, b.module) == ("b", "Conv2d(3, 8, kernel_size=(3, 3))")
    assert (b.forward_s, b.backward_s) == (0.01, 0.02)
    assert (b.activation_bytes, b.parameter_bytes) == (3e6, 1000.0)
    assert profile.edges == (("a", "b"), ("b", "c"))
    # The input is free; replicating c would take longer than its 15 ms.
    split = autoshard.profile.split_pipedream(path, machines=4, bandwidth=1e9)
    assert [(s.nodes, s.replicas) for s in split.stages] == [(("a", "b"), 2), (("c",), 1)] or [
        (s.nodes, s.replicas) for s in split.stages
    ] == [(("a", "b"), 3), (("c",), 1)]
    assert split.bottleneck_s == pytest.approx(0.015002, rel=1e-3)
    assert "optimal" in str(split)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no nodes"),
        (SMALL.replace("forward_compute_time=10.0", "time=10"), "line 2: expected the figures"),
        (SMALL.replace("=10.0", "=ten"), "line 2: expected forward_compute_time=NUMBER"),
        (SMALL.replace("=10.0", "=-1"), "zero or more, but got forward_compute_time=-1"),
        (SMALL.replace("=10.0", "=nan"), "forward_compute_time=nan"),
        (SMALL.replace("[2e6; 1e6]", "[2e6; ]"), "line 2: expected activation_size=NUMBER"),
        (SMALL.replace("c -- Lin", "b -- Lin"), "line 3: expected every node once but b"),
        (SMALL.replace("\ta -- b", "\ta - b"), "line 4: expected an edge SOURCE -- TARGET"),
        (SMALL.replace("\ta -- b", "\ta -- z"), "line 4: .* but z is none"),
        (SMALL.replace("\ta -- b", "a -- b"), r"line 4: expected .* \(or an edge, after a tab"),
        (SMALL + "\tc -- b\n", "without cycles but got (b -> c -> b|c -> b -> c)"),
        (SMALL + "\tc -- c\n", "without cycles but got c -> c"),
    ],
)
def test_malformed_profiles(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_pipedream(text)


def test_bad_arguments(tmp_path) -> None:
    profile = parse_pipedream(SMALL)
    for machines in (0, -1, 2.5, True):
        with pytest.raises(OptionError, match="machines expects a whole number"):
            split_pipedream(profile, machines)
    for bandwidth in (0, -1.0, math.nan, math.inf, "fast"):
        with pytest.raises(OptionError, match="bandwidth expects positive bytes"):
            split_pipedream(profile, 4, bandwidth)
    with pytest.raises(OptionError, match="expected a profile of PipeDream at"):
        split_pipedream(tmp_path / "missing.txt")
