"""Which software a published run used, and what that means for its model and its costs.

One table, read from the top: the first entry whose family, source and year fit a row is its stack.
What a source does not say is taken from the software's defaults at the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from autoshard.software import Software
from benchmarks.published.rows import Row

GIB = 2.0**30
CONTEXT = 2 * GIB
"""What nvidia-smi counts beside tensors: CUDA context, kernels, NCCL buffers."""
BUCKETS = 4 * 2 * 5e8
"""DeepSpeed's flat buffers for reduction and gathering, two of each, 5e8 16-bit elements."""
MIXED = {"master_bytes": 4, "state_bytes": 4}
"""Adam in float32 on a float32 copy of 16-bit parameters (Micikevicius et al. 2018)."""
CLIPPED: dict[str, Any] = {"gradient_passes": 3, "copies_gradients": False}
"""Gradients are read for their norm, to update, and zeroed: all of these programs clip them, and
make them where they are reduced."""

CORE_ATTENTION = ("*attention_core*",)
"""From the scores to the weighted sum (Korthikanti et al. 2022, section 5)."""
EVERY_SECOND_PRODUCT = (
    "norm*", "*_k", "*_out", "*_up", "*neg*", "*cat*", "*mul*", "*add*", "*silu*",
)  # fmt: skip
"""Every second product and all that is no product (torchtitan, selective_ac_option = op)."""


def _software(name: str, gradient_bytes: int, **more: bool | int) -> Software:
    return Software(name=name, gradient_bytes=gradient_bytes, **CLIPPED, **MIXED, **more)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """How a group of runs was made.

    Attributes:
        families: ``fnmatch`` pattern of their families.
        notes: text that has to be in their notes.
        pipelined: whether they have several stages; ``None``: either.
        sharded: whether parameters are sharded over data ranks (ZeRO-3, FSDP); ``None``: either.
        years: first and last year.
        software: what prices follow.
        fused_attention: FlashAttention or a kernel like it.
        fused_projections: query, key and value are one product, and so are gate and up.
        dropout: of the model, in training.
        wide_logits: the loss is computed on a float32 copy of the logits, rather than by a kernel
            that widens as it reads.
        llama: RMSNorm, no biases, rotary positions, embedding apart; ``None``: as gated models are.
        bias: linear layers of GPT models have one.
        tied: the head uses the embedding's weight; ``None``: in GPT models.
        selective: ops that their selective recompute runs again.
        micro_batch: samples of a micro-batch where a source does not say.
        whole_logits: tensor ranks gather the logits and each computes the whole loss.
        stages: have equal numbers of ``layers``, or about equally many ``parameters``, embedding
            and head included; ``balanced``: by cost.
        memory_unit_bytes: what their sources call a GB.
        memory_besides: bytes that their sources count beside what a plan does.
        memory: what their sources count: the ``peak``, ``activations`` (with the state, without
            workspace), or the ``state`` that stays between steps.
    """

    families: str = "*"
    notes: str = ""
    pipelined: bool | None = None
    sharded: bool | None = None
    years: tuple[int, int] = (0, 9999)
    software: Software = field(default_factory=Software)
    fused_attention: bool = True
    fused_projections: bool = True
    dropout: float = 0.0
    wide_logits: bool = True
    llama: bool | None = None
    bias: bool = True
    tied: bool | None = None
    selective: tuple[str, ...] = CORE_ATTENTION
    micro_batch: int | None = None
    whole_logits: bool = False
    stages: str = "layers"
    memory_unit_bytes: float = 1e9
    memory_besides: float = 0.0
    memory: str = "peak"

    def fits(self, row: Row) -> bool:
        first, last = self.years
        return (
            fnmatchcase(row.family, self.families)
            and self.notes in row.notes
            and self.pipelined in (None, (row.pp or 1) > 1)
            and self.sharded in (None, row.zero_stage == 3)
            and first <= (row.year or last) <= last
        )


MEGATRON = _software(
    "Megatron-LM", 4, reduced_bytes=2, overlaps_reduction=False, fuses_pointwise=True,
    regathers=True, fuses_accumulation=True, checkpoints_regions=True,
)  # fmt: skip
MEGATRON_FP16 = _software(
    "Megatron-LM, gradients summed in fp16", 2, overlaps_reduction=False, fuses_pointwise=True
)
DEEPSPEED_ZERO3 = _software(
    "DeepSpeed ZeRO-3", 2, fuses_pointwise=True, overlaps_gathering=False, gathers_each=True
)
MEGATRON_CORE = _software(
    "Megatron Core", 4, reduced_bytes=4, fuses_pointwise=True, regathers=True,
    fuses_accumulation=True, checkpoints_regions=True,
)  # fmt: skip
# As its published code has it: gradients are all-reduced in float32, though ranks update shards.
ALEPH = _software(
    "Aleph Alpha Scaling", 2, reduced_bytes=4, reduces_whole=True, overlaps_reduction=False,
    fuses_pointwise=True,
)  # fmt: skip
# The gradient as backward makes it, and the sum in float32.
NANOTRON = _software("nanotron", 6, reduced_bytes=2, fuses_pointwise=True)
FOUNDRY = _software("llm-foundry (FSDP)", 4, reduced_bytes=4)
FOUNDRY_PURE = _software("llm-foundry (FSDP, pure bf16)", 4, reduced_bytes=2)
TITAN = _software("torchtitan", 4, reduced_bytes=4)
TITAN_COMPILED = _software("torchtitan, compiled", 4, reduced_bytes=4, fuses_pointwise=True)
FMS = _software("fms-fsdp, compiled", 4, reduced_bytes=2, fuses_pointwise=True)
MAXTEXT = _software("MaxText (XLA)", 4, reduced_bytes=4, fuses_pointwise=True)
INTERN = _software("InternEvo", 2)
# Parameters, gradients and states in bf16, as the memory of its runs on one device says.
KEMPNER = Software(name="KempnerForge", reduced_bytes=4, **CLIPPED)
KEMPNER_COMPILED = replace(KEMPNER, name="KempnerForge, compiled", fuses_pointwise=True)
ALPA = _software(
    "Alpa (XLA)", 2, fuses_pointwise=True, overlaps_reduction=False, overlaps_gathering=False
)

STACKS: tuple[Stack, ...] = (
    # Megatron before FlashAttention: fused softmax, gelu and dropout kernels, scores in memory,
    # gradients reduced after the last backward.
    Stack(families="ptdp-*", notes="ZeRO-3", software=DEEPSPEED_ZERO3,
        fused_attention=False, dropout=0.1),
    Stack(families="ptdp-*", software=MEGATRON_FP16, fused_attention=False, dropout=0.1),
    Stack(families="megatron2020-*", software=MEGATRON_FP16, fused_attention=False, dropout=0.1),
    Stack(families="korthikanti-*", software=MEGATRON, fused_attention=False, dropout=0.1,
        memory_unit_bytes=GIB, memory="activations"),
    Stack(families="bloom-*", software=MEGATRON_FP16, fused_attention=False, dropout=0.1,
        memory_besides=CONTEXT + BUCKETS),
    Stack(families="vtrain-*", software=MEGATRON_FP16, fused_attention=False, dropout=0.1),
    Stack(families="megascale-*", software=MEGATRON, fused_attention=False, dropout=0.1),
    Stack(families="zb-*", software=replace(MEGATRON, ends_together=False),
        fused_attention=False, dropout=0.1),
    Stack(families="alpa-*", software=ALPA, fused_attention=False, memory_unit_bytes=GIB),
    # FlashAttention from here on.
    Stack(families="moefold-*", software=MEGATRON_CORE, llama=True, micro_batch=1),
    Stack(families="aleph-*", software=ALEPH, whole_logits=True, stages="parameters"),
    Stack(families="nanotron-*", software=NANOTRON, stages="balanced", tied=True,
        memory_unit_bytes=GIB, memory="state"),
    Stack(families="mosaic-*", notes="PURE", software=FOUNDRY_PURE, bias=False,
        wide_logits=False),
    Stack(families="mosaic-*", software=FOUNDRY, bias=False, wide_logits=False),
    Stack(families="torchtitan-*", notes="eager", software=TITAN, fused_projections=False,
        selective=EVERY_SECOND_PRODUCT, memory_unit_bytes=GIB),
    Stack(families="torchtitan-*", software=TITAN_COMPILED, fused_projections=False,
        selective=EVERY_SECOND_PRODUCT, memory_unit_bytes=GIB),
    Stack(families="internevo-*", software=INTERN),
    Stack(families="kempner-*", pipelined=True, software=KEMPNER,
        fused_projections=False, whole_logits=True, micro_batch=4),
    Stack(families="kempner-*", software=KEMPNER_COMPILED, fused_projections=False,
        whole_logits=True, micro_batch=4),
    Stack(families="ibm-*", software=FMS),
    Stack(families="maxtext-*", software=MAXTEXT, fused_projections=False),
    # Sources that this table does not know, by what was usual in their year.
    Stack(years=(0, 2022), software=MEGATRON, fused_attention=False, dropout=0.1),
    Stack(sharded=True, software=TITAN, fused_projections=False),
    Stack(software=MEGATRON_CORE),
)  # fmt: skip


def stack_of(row: Row) -> Stack:
    """The stack of a row; the last entry takes everything."""
    return next(stack for stack in STACKS if stack.fits(row))
