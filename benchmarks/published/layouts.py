"""A row's layout as pins, or the reason why the planner cannot express it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

from autoshard.options import Constraints
from benchmarks.published.models import Shape
from benchmarks.published.rows import Row
from benchmarks.published.stacks import Stack

UNLIMITED_BYTES = 2**60
"""Of memory: a layout that does not fit is priced all the same."""

SCHEDULES: dict[str, str] = {
    "none": "none", "1f1b": "1f1b", "gpipe": "gpipe", "interleaved-1f1b": "interleaved-1f1b",
    "zb-1p": "zb-1p", "zb-2p": "zb-2p", "zb-h1": "zb-h1", "zb-v": "zb-v", "1f1b?": "1f1b",
    "1f1b (interleave degree not printed)": "1f1b", "interleaved?": "interleaved-1f1b",
}  # fmt: skip
"""How a schedule is named in a file -> how the planner names it."""
PRECISIONS = ("bf16", "fp16", "fp8")

LARGEST = "shard largest tensor dim"
"""In notes: every weight is split over all devices by its largest dim (Zheng et al. 2022, section
8.2), which in a GPT model are the dims that Megatron splits; of a square one, its columns."""
WHOLE_LOSS = {"head.logits*": "R", "head.cross_entropy": "R"}
"""Logits are gathered over tensor ranks, and each has all of the loss."""


class Unpredictable(Exception):
    """A row that cannot be predicted; the text says why."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a row's plan is asked for.

    Attributes:
        pins: of the row, memory unlimited.
        open: what the row does not say and the planner chooses.
    """

    pins: Constraints
    open: tuple[str, ...] = ()


def shape_of(row: Row, stack: Stack) -> Shape:
    """The model of a row.

    Raises:
        Unpredictable: its shape is not printed, or not that of a decoder.
    """
    if not (row.layers and row.hidden and row.heads and row.ffn and row.seq):
        raise Unpredictable("the model's shape is not printed" + _only_relative(row))
    gated = bool(row.ffn_gated)
    llama = gated if stack.llama is None else stack.llama
    if row.experts and not (row.topk and (row.ffn_moe or row.ffn)):
        raise Unpredictable("how many experts a token visits is not printed")
    return Shape(
        layers=row.layers, hidden=row.hidden, heads=row.heads, kv_heads=row.kv_heads or row.heads,
        ffn=row.ffn_moe if row.experts and row.ffn_moe else row.ffn, vocab=row.vocab or 0,
        sequence=row.seq, gated=gated,
        tied=(not llama) if stack.tied is None else stack.tied, rotary=llama, rms_norm=llama,
        bias=stack.bias and not llama, dropout=stack.dropout, wide_logits=stack.wide_logits,
        fused_attention=stack.fused_attention, fused_projections=stack.fused_projections,
        experts=row.experts or 0, experts_per_token=row.topk or 0,
        shared_ffn=row.shared_expert_ffn or 0,
    )  # fmt: skip


def _only_relative(row: Row) -> str:
    return "; only relative throughput is" if row.relative_throughput is not None else ""


def layout_of(row: Row, shape: Shape, stack: Stack) -> Layout:
    """The pins of a row.

    Raises:
        Unpredictable: it does something that the planner has no word for.
    """
    if row.global_batch is None:
        raise Unpredictable("the global batch is not printed" + _only_relative(row))
    if row.precision not in PRECISIONS:
        raise Unpredictable(f"precision {row.precision or 'not printed'}")
    pins: dict[str, object] = {"memory_bytes": UNLIMITED_BYTES}
    for axis in ("pp", "dp", "cp", "tp"):
        if getattr(row, axis) is not None:
            pins[axis] = getattr(row, axis)
    if (row.ep or 1) > 1:
        pins["ep"] = _expert_ranks(row)
    if row.microbatch is not None:
        pins["micro_batch_size"] = row.microbatch
    elif stack.micro_batch is not None:
        pins["micro_batch_size"] = stack.micro_batch
    pins |= _pipeline_pins(row, shape, stack) if (row.pp or 1) > 1 else {}
    pins |= _recompute_pins(row, stack)
    replicas = (row.dp or 0) * (row.cp or 1)
    if row.zero_stage is not None and replicas > 1:
        pins["data_parallel"] = ("ddp", "zero1", "zero2", "zero3")[row.zero_stage]
    elif replicas == 1:
        pins["data_parallel"] = "ddp"
    if LARGEST in row.notes and row.gpus > 1:
        pins |= {"tp": row.gpus, "dp": 1, "data_parallel": "ddp"}
        pins["sharding"] = megatron(shape)
    elif (row.tp or 1) > 1:
        pins["sequence_parallel"] = bool(row.seq_parallel)
        pins["sharding"] = megatron(shape, folded=_is_folded(row))
        if stack.whole_logits:
            pins["sharding"] = {**megatron(shape, folded=_is_folded(row)), **WHOLE_LOSS}
    names = {"microbatch": "micro_batch_size", "recompute": "recompute", "zero_stage":
        "data_parallel", "tp": "tp", "pp": "pp", "dp": "dp"}  # fmt: skip
    left = [
        pin for column, pin in names.items()
        if getattr(row, column) in (None, "") and pin not in pins
    ]  # fmt: skip
    if (row.pp or 1) > 1 and "schedule" not in pins:
        left.append("schedule")
    return Layout(Constraints.of(pins), tuple(left))


def _pipeline_pins(row: Row, shape: Shape, stack: Stack) -> dict[str, object]:
    if row.schedule not in SCHEDULES:
        raise Unpredictable(f"schedule {row.schedule or 'not printed'}")
    schedule = SCHEDULES[row.schedule]
    chunks = 1
    if schedule in ("interleaved-1f1b", "zb-v"):
        chunks = row.vpp or _most_chunks(row, shape)
    pins: dict[str, object] = {"schedule": schedule, "virtual_stages": chunks}
    number, embeds = (row.pp or 1) * chunks, shape.vocab > 0
    if stack.stages == "layers":
        pins["stages"] = stages_of(shape.layers, number, embeds=embeds)
    elif stack.stages == "parameters":
        pins["stages"] = lightest_stages(module_weights(shape), number)
    return pins


def _most_chunks(row: Row, shape: Shape) -> int:
    """Where a source interleaves and does not say how much: as much as layers divide."""
    pp = row.pp or 1
    return next((n for n in range(shape.layers // pp, 0, -1) if shape.layers % (pp * n) == 0), 1)


def _is_folded(row: Row) -> bool:
    """Experts are whole on each of neighbouring ranks, tensor ranks included ("ETP=1" in notes)."""
    return (row.ep or 1) > 1 and "ETP=1" in row.notes


def _expert_ranks(row: Row) -> int:
    """The data-parallel ranks that experts are spread over.

    Raises:
        Unpredictable: experts are spread over a part of the tensor ranks.
    """
    ep, tp = row.ep or 1, row.tp or 1
    if not _is_folded(row):
        return ep
    if ep % tp:
        raise Unpredictable(f"experts on each of {ep} ranks, of which tp={tp} is no divisor")
    return ep // tp


def _recompute_pins(row: Row, stack: Stack) -> dict[str, object]:
    if row.recompute == "selective":
        return {"recompute_ops": stack.selective}
    if row.recompute in ("none", "full"):
        return {"recompute": row.recompute}
    if row.recompute:
        raise Unpredictable(f"recompute {row.recompute}")
    return {}


def megatron(shape: Shape, *, folded: bool = False) -> dict[str, str]:
    """How Megatron (Shoeybi et al. 2019) and all that follow it split a layer's weights.

    What makes heads or the feed-forward part's inner width is split by rows (each of several
    projections in one product on its own), what joins them again by columns, embedding and head by
    vocabulary. So are experts, or, ``folded``, they are dealt whole.
    """
    inner, kv = (n * shape.size_of_head for n in (shape.heads, shape.kv_heads))
    joint = shape.fused_projections
    pins = {
        "*.attention.qkv.*.weight": f"S(0;{inner},{kv},{kv})" if joint else "S(0)",
        "*.attention.out.weight": "S(1)",
    }
    if shape.experts:
        width = f"S(1;{shape.ffn},{shape.ffn})" if shape.gated else "S(1)"
        pins["*.feed_forward.up"] = "S(0)" if folded else width
        pins["*.feed_forward.down"] = "S(0)" if folded else "S(2)"
    else:
        if not shape.gated:
            pins["*.feed_forward.up.weight"] = "S(0)"
        else:
            pins["*.feed_forward.up.*.weight"] = (
                f"S(0;{shape.ffn},{shape.ffn})" if joint else "S(0)"
            )
        pins["*.feed_forward.down.weight"] = "S(1)"
    if shape.vocab:
        pins["embedding.weight"] = "S(0)"
        if not shape.tied:
            pins["head.weight"] = "S(0)"
    return pins


def stages_of(layers: int, pp: int, *, embeds: bool) -> tuple[int, ...]:
    """Segments per stage as hand-tuned runs have them: equal numbers of layers.

    Where they do not divide, the first and the last stage, which have the embedding and the head,
    get fewer.
    """
    each, over = divmod(layers, pp)
    counts = [each] * pp
    inner = [*range(1, pp - 1), 0, pp - 1]
    for stage in inner[:over]:
        counts[stage] += 1
    if embeds:
        counts[0] += 1
        counts[-1] += 1
    return tuple(counts)


def lightest_stages(weights: Sequence[int], pp: int) -> tuple[int, ...]:
    """Numbers of modules in a row per stage so that the heaviest stage is as light as can be.

    Stages are filled from the first on up to that weight, as DeepSpeed's ``partition_balanced``
    does, so the last gets what is left.
    """
    ends = (0, *accumulate(weights))
    sums = sorted(b - a for a, b in combinations(ends, 2))
    limit = sums[bisect_left(sums, True, key=lambda most: len(_filled(weights, most)) <= pp)]
    return _filled(weights, limit)


def _filled(weights: Sequence[int], limit: int) -> tuple[int, ...]:
    counts, held = [0], 0
    for weight in weights:
        if held + weight > limit and counts[-1]:
            counts.append(0)
            held = 0
        counts[-1] += 1
        held += weight
    return tuple(counts)


def module_weights(shape: Shape) -> tuple[int, ...]:
    """Parameters of embedding, layers, and head with the norm before it."""
    size, hidden = shape.size_of_head, shape.hidden
    attention = 2 * hidden * size * (shape.heads + shape.kv_heads)
    layer = attention + (3 if shape.gated else 2) * hidden * shape.ffn
    ends = shape.vocab * hidden
    return (ends, *(layer for _ in range(shape.layers)), ends)
