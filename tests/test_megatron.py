"""Megatron's split of a Llama block, found by the search and counted in the emitted code.

Shoeybi et al. (2019) split the first product of a pair by columns and the second by rows;
Korthikanti et al. (2022) keep what lies between the pairs split along the sequence. Then a block's
forward needs one all-gather before and one reduce-scatter after each pair.
"""

from __future__ import annotations

import re
from functools import cache

import torch
import transformers

from autoshard import cluster
from autoshard.capture import capture
from autoshard.emit import emit
from autoshard.ir import Program
from autoshard.options import Constraints
from autoshard.plan.plan import Plan
from autoshard.plan.search import find_plan

RANKS = 8
SAMPLES, SEQUENCE = 64, 4096
"""A sample's activations are smaller than any weight of a pair, so moving them is cheaper."""


@cache
def program() -> Program:
    """Two layers of Llama-3-8B's shapes, with a small vocabulary."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=2, vocab_size=16384, max_position_embeddings=SEQUENCE,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    ids = torch.zeros(SAMPLES, SEQUENCE, dtype=torch.long, device="meta")
    return capture(model, example_inputs={"input_ids": ids, "labels": ids}, model_name="llama")


@cache
def plan_for(memory_bytes: int | None) -> Plan:
    """On the tensor axis alone, one sample at a time, without recompute."""
    pins = Constraints(
        pp=1, dp=1, tp=RANKS, micro_batch_size=1, recompute="none", memory_bytes=memory_bytes
    )
    return find_plan(program(), cluster=cluster.find("h100"), world_size=RANKS, constraints=pins)


def tight() -> Plan:
    """With less memory than whole weights of the layers need."""
    return plan_for(int(0.5 * plan_for(None).prediction.peak_bytes))


def forward_of_block(plan: Plan) -> str:
    """The emitted source of the decoder layer."""
    (source,) = (
        text for name, text in emit(program(), plan).files.items() if "class Llama" in text
    )
    found = re.search(r"^class LlamaDecoderLayer\w*\(.*?(?=^class |\Z)", source, re.M | re.S)
    assert found is not None, source
    return found[0]


def count(source: str) -> dict[str, int]:
    """Calls by the collective that they run in forward."""
    kinds = {
        "all-gather": r"\b(?:all_gather|all_gather_replicated)\(",
        "reduce-scatter": r"\breduce_scatter\(",
        "all-reduce": r"\b(?:all_reduce|all_reduce_both)\(",
        "all-to-all": r"\ball_to_all\(",
    }
    return {kind: len(re.findall(pattern, source)) for kind, pattern in kinds.items()}


def layer_states(plan: Plan) -> dict[str, str]:
    (block,) = (axes["tp"] for name, axes in plan.layers.items() if "DecoderLayer" in name)
    return dict(block.parameters)


def test_tight_memory_gives_column_and_row_parallel_weights() -> None:
    states = layer_states(tight())
    for column in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
                   "mlp.up_proj"):  # fmt: skip
        assert states[f"{column}.weight"] == "S(0)", column
    for row in ("self_attn.o_proj", "mlp.down_proj"):
        assert states[f"{row}.weight"] == "S(1)", row


def test_tight_memory_gives_sequence_parallel_collectives() -> None:
    """Two all-gathers and two reduce-scatters in a block's forward, and nothing else."""
    source = forward_of_block(tight())
    assert count(source) == {
        "all-gather": 2, "reduce-scatter": 2, "all-reduce": 0, "all-to-all": 0
    }, source  # fmt: skip


def test_tight_memory_keeps_norms_split_along_the_sequence() -> None:
    plan = tight()
    (block,) = (axes["tp"] for name, axes in plan.layers.items() if "DecoderLayer" in name)
    assert set(block.inputs.values()) & {"S(1)"}, "the residual stream enters split"
    assert set(block.outputs.values()) == {"S(1)"}


def test_cheap_weights_are_not_split() -> None:
    """Where memory is no matter, whole weights and a split sequence move fewer bytes.

    In attention, positions are traded for heads, for fewer times to wait for each other.
    """
    plan = plan_for(None)
    states = layer_states(plan)
    for name in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        assert states[f"{name}_proj.weight"] in ("R", "V"), name
    found, split = count(forward_of_block(plan)), count(forward_of_block(tight()))
    assert found["reduce-scatter"] == 0
    assert sum(found.values()) < sum(split.values())
    assert plan.prediction.step_s <= tight().prediction.step_s
