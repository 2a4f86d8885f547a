"""Collectives against the published formulas, conversions against the table of the algebra."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoshard.cluster import Cluster, Tier, find, link
from autoshard.cost_models.collective import (
    Collective,
    collective_s,
    conversion_s,
    inner_collectives_s,
    waiting_s,
)
from autoshard.cost_models.costs import AnalyticCosts, CostModel
from autoshard.errors import InternalError
from autoshard.ir import Op, TensorType, Value
from autoshard.placement.conversion import COLLECTIVES, conversion, convertible
from autoshard.placement.state import P, R, S, State, V

ALPHA, RATE = 1e-5, 1e9
KINDS: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


def flat(jitter_s: float = 0.0) -> Cluster:
    tier = Tier(name="flat", size=0, bytes_per_s=RATE, latency_s=ALPHA)
    device = replace(find("h100").device, jitter_s=jitter_s)
    return replace(find("h100"), device=device, tiers=(tier,))


def nodes() -> Cluster:
    """Nodes of 4 at 1 GB/s, joined at 0.1 GB/s per device."""
    inner = Tier(name="node", size=4, bytes_per_s=RATE, latency_s=ALPHA)
    outer = Tier(name="net", size=0, bytes_per_s=RATE / 10, latency_s=5 * ALPHA)
    return replace(flat(), tiers=(inner, outer))


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_rings_on_one_tier(n: int) -> None:
    """Thakur et al. 2005: (n-1) alpha + (n-1)/n bytes beta; an all-reduce is both halves."""
    nbytes = 1e9
    ring = (n - 1) * ALPHA + (n - 1) / n * nbytes / RATE
    on = link(flat(), n)
    assert collective_s("all_gather", nbytes, on) == pytest.approx(ring)
    assert collective_s("reduce_scatter", nbytes, on) == pytest.approx(ring)
    assert collective_s("all_reduce", nbytes, on) == pytest.approx(2 * ring)
    pairwise = (n - 1) * ALPHA + (n - 1) / n * (nbytes / n) / RATE
    assert collective_s("all_to_all", nbytes, on) == pytest.approx(pairwise)
    assert collective_s("send", nbytes, on) == pytest.approx(ALPHA + nbytes / RATE)


def test_short_messages_take_the_algorithm_of_few_steps() -> None:
    on = link(flat(), 64)
    assert collective_s("all_reduce", 8, on) == pytest.approx(2 * 6 * ALPHA, rel=0.01)
    assert collective_s("all_to_all", 8, on) == pytest.approx(6 * ALPHA, rel=0.01)


def test_one_rank_and_empty_messages_are_free() -> None:
    for kind in KINDS:
        assert collective_s(kind, 1e9, link(flat(), 1)) == 0
        assert collective_s(kind, 0, link(flat(), 8)) == 0


def test_a_ring_over_nodes_is_bound_by_all_cards_of_a_node() -> None:
    nbytes, n = 1e9, 16
    seconds = collective_s("all_gather", nbytes, link(nodes(), n))
    alphas = 3 * 5 * ALPHA + 12 * ALPHA  # 3 steps between 4 nodes, the other 12 inside
    assert seconds == pytest.approx(alphas + 15 / 16 * nbytes / (4 * RATE / 10))


def test_strided_groups_have_one_card_each() -> None:
    """As Galvatron measured it: 2, 4, 8 ranks over two nodes reach 8.1, 16.2, 20.8 GB/s."""
    nbytes = 1e9
    one_per_node = collective_s("all_gather", nbytes, link(nodes(), 2, stride=4))
    two_per_node = collective_s("all_gather", nbytes, link(nodes(), 4, stride=2))
    assert one_per_node == pytest.approx(5 * ALPHA + nbytes / 2 / (RATE / 10))
    assert two_per_node == pytest.approx(5 * ALPHA + 2 * ALPHA + 3 / 4 * nbytes / (2 * RATE / 10))


def test_all_to_all_over_nodes_is_bound_by_what_leaves_the_node() -> None:
    nbytes, n = 16e9, 16
    seconds = collective_s("all_to_all", nbytes, link(nodes(), n))
    leaves = nbytes / n * 12 / 16
    assert seconds == pytest.approx(3 * ALPHA + 3 * 5 * ALPHA + leaves / (RATE / 10))


def test_efficiency_of_a_kind_slows_that_kind() -> None:
    base = flat()
    slow = replace(base, tiers=(replace(base.tiers[0], efficiency={"all_gather": 0.25}),))
    for kind, factor in (("all_gather", 4), ("reduce_scatter", 1)):
        ratio = collective_s(kind, 1e12, link(slow, 8)) / collective_s(kind, 1e12, link(base, 8))  # type: ignore[arg-type]
        assert ratio == pytest.approx(factor, rel=1e-3)


def test_a_factor_of_a_kind_delays_that_kind() -> None:
    base = flat()
    late = replace(base, tiers=(replace(base.tiers[0], latency_factor={"all_reduce": 3.0}),))
    for kind, factor in (("all_reduce", 3), ("all_to_all", 1), ("send", 1)):
        ratio = collective_s(kind, 1, link(late, 8)) / collective_s(kind, 1, link(base, 8))  # type: ignore[arg-type]
        assert ratio == pytest.approx(factor, rel=1e-3)


@given(
    kind=st.sampled_from(KINDS), n=st.integers(2, 64), stride=st.integers(1, 8),
    nbytes=st.integers(1, 10**10),
)  # fmt: skip
def test_more_bytes_never_take_less(kind: Collective, n: int, stride: int, nbytes: int) -> None:
    on = link(nodes(), n, stride)
    assert 0 < collective_s(kind, nbytes, on) <= collective_s(kind, 2 * nbytes, on)


def test_unknown_collective() -> None:
    with pytest.raises(InternalError, match="no such collective"):
        collective_s("broadcast", 8, link(flat(), 2))  # type: ignore[arg-type]


STATES = (R, V, P, S(0), S(1))
TYPE = TensorType((8, 512, 64), torch.float32, True, True, True)


@pytest.mark.parametrize(("source", "target"), itertools.permutations(STATES, 2))
def test_every_conversion_costs_what_the_table_says(source: State, target: State) -> None:
    """Both ways are free exactly where nothing moves; collectives cost at least their wire time."""
    n, cluster = 4, flat()
    on = link(cluster, n)
    ways = conversion_s(source, target, TYPE, n, on, cluster.device)
    step = conversion(source, target)
    assert step is not None
    whole = TYPE.nbytes
    for seconds, motion in zip(ways, (step.forward, step.backward), strict=True):
        if motion == "none":
            assert seconds == 0
        elif motion in COLLECTIVES:
            wire = collective_s(motion, whole, on)  # type: ignore[arg-type]
            copies = 4 * (2 * whole / cluster.device.bytes_per_s + cluster.device.launch_s)
            assert wire <= seconds < wire + copies
        else:
            assert 0 < seconds < 5 * whole / cluster.device.bytes_per_s + 1e-4


def test_values_without_gradient_have_no_backward() -> None:
    plain = replace(TYPE, differentiable=False)
    cluster = flat()
    for source, target in itertools.permutations((R, P, S(0), S(1)), 2):
        if convertible(source, target):
            on = link(cluster, 4)
            assert conversion_s(source, target, plain, 4, on, cluster.device)[1] == 0


def test_nothing_to_convert() -> None:
    cluster = flat()
    assert conversion_s(R, R, TYPE, 4, link(cluster, 4), cluster.device) == (0, 0)
    assert conversion_s(S(0), R, TYPE, 1, link(cluster, 1), cluster.device) == (0, 0)
    with pytest.raises(KeyError):
        conversion_s(S(0, (4, 4)), S(0), TYPE, 4, link(cluster, 4), cluster.device)


def test_inner_dims_need_a_reordering_copy() -> None:
    cluster = flat()
    on = link(cluster, 4)
    first = conversion_s(S(0), V, TYPE, 4, on, cluster.device)
    second = conversion_s(S(1), V, TYPE, 4, on, cluster.device)
    assert second[0] > first[0]
    alone = replace(TYPE, shape=(1, 512, 64))
    outer = conversion_s(S(1), V, alone, 4, on, cluster.device)
    assert outer == conversion_s(S(0), V, replace(alone, shape=(512, 64)), 4, on, cluster.device)


def test_sequence_parallelism_costs_as_much_as_its_all_reduce() -> None:
    """Korthikanti et al. 2022, section 4.2.2: both halves move what one all-reduce moves.

    A tree's fewer steps can make the all-reduce faster, so latencies are left out.
    """
    preset = find("h100")
    tiers = tuple(replace(tier, latency_s=0.0) for tier in preset.tiers)
    device = replace(preset.device, launch_s=0.0)
    cluster = replace(preset, tiers=tiers, device=device)
    on = link(cluster, 8)
    token = TensorType((8192, 4096), torch.bfloat16, True, True, True)
    gather = conversion_s(S(0), V, token, 8, on, cluster.device)[0]
    scatter = conversion_s(P, S(0), token, 8, on, cluster.device)[0]
    reduce = conversion_s(P, R, token, 8, on, cluster.device)[0]
    assert gather + scatter == pytest.approx(reduce, rel=0.01)


def test_the_analytic_model_is_a_cost_model() -> None:
    costs: CostModel = AnalyticCosts(find("h100"))
    on = link(costs.cluster, 8)
    assert costs.conversion(TYPE, P, R, on) == conversion_s(P, R, TYPE, 8, on, costs.cluster.device)
    assert costs.collective("send", 1e6, on) == collective_s("send", 1e6, on)


def test_tokens_travel_to_their_experts_from_every_rank() -> None:
    """Each rank sends all choices of its tokens, there and back; parts of width gather more."""
    experts, tensor = link(nodes(), 2, stride=4), link(nodes(), 4)
    x = Value("x", TensorType((1000, 64), torch.bfloat16, True, True, True))
    chosen = Value("c", TensorType((1000, 2), torch.int64, False, True))
    up = Value("w", TensorType((4, 32, 64), torch.bfloat16, True, False, True))
    kwargs = (("way", "exchange"), ("num_experts", 8), ("axis", "ep"))
    op = Op("e", "autoshard.sparse_experts", (x, chosen, chosen, up, up), kwargs, (x,))
    moved = 2.0 * x.type.nbytes
    travel = 2 * collective_s("all_to_all", 2 * moved, experts)
    assert inner_collectives_s(op, {"ep": experts, "tp": tensor}) == (travel, travel)
    split = replace(op, kwargs=(*kwargs, ("gathered", "tp"), ("gathered_ranks", 4)))
    gather = 2 * collective_s("all_gather", 4 * moved, tensor)
    found = inner_collectives_s(split, {"ep": experts, "tp": tensor})
    assert found == pytest.approx((travel + gather, travel + gather))


def test_trees_are_chains_within_a_node() -> None:
    """NCCL's trees join nodes: 2 steps each way for 4 of them, but 3 within a node of 4."""
    inside = collective_s("all_reduce", 8, link(nodes(), 16))
    assert inside == pytest.approx(2 * (3 * ALPHA + 2 * 5 * ALPHA), rel=0.01)


def test_what_ops_communicate_within_themselves() -> None:
    on = link(flat(), 4)
    logits = Value("logits", TensorType((1000, 250), torch.bfloat16, True, True, True))
    target = Value("target", TensorType((1000,), torch.int64, False, True))
    loss = Value("loss", TensorType((), torch.bfloat16, True, True, True))
    kwargs = (("axis", "tp"), ("size", 1000))
    plain = Op("l", "autoshard.vocab_parallel_cross_entropy", (logits, target), kwargs, (loss,))
    smooth = replace(plain, args=(logits, target, None, -100, 0.1))
    for op, facts in ((plain, 2), (smooth, 3)):
        expected = collective_s("all_gather", facts * 1000 * 4 * 4, on)
        assert inner_collectives_s(op, {"tp": on}) == (expected, 0)
    elsewhere = replace(plain, target="aten.cross_entropy_loss.default", kwargs=())
    assert inner_collectives_s(elsewhere, {"tp": on}) == (0, 0)


def test_ranks_wait_for_the_last_one() -> None:
    """Expected maxima of 2, 4 and 8 standard normal variables (Teichroew 1956), within 5 %."""
    for n, latest in ((2, 0.5642), (4, 1.0294), (8, 1.4236)):
        assert waiting_s(link(flat(1e-4), n)) == pytest.approx(1e-4 * latest, rel=0.05)
    assert waiting_s(link(flat(1e-4), 1)) == waiting_s(link(flat(), 8)) == 0


def test_collectives_between_ops_wait_and_those_in_a_row_do_not() -> None:
    uneven, even = flat(1e-4), flat()
    kind = TensorType((64, 64), torch.bfloat16, True, True, True)
    late, early = (
        conversion_s(P, R, kind, 8, link(cluster, 8), cluster.device) for cluster in (uneven, even)
    )
    assert late[0] - early[0] == pytest.approx(waiting_s(link(uneven, 8)))
    costs = [AnalyticCosts(cluster).collective("all_reduce", 1e6, link(cluster, 8))
        for cluster in (uneven, even)]  # fmt: skip
    assert costs[0] == costs[1]
