"""The stages of one pipeline rank: one, or several chunks of the model (virtual stages)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autoshard.ir import TensorType


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStage:
    """A stage that this rank runs.

    Attributes:
        index: among all stages of the pipeline.
        module: called with the activations of ``inputs`` and a micro-batch's keyword arguments;
            returns the activations of ``outputs``, or the loss addend if it is the last stage.
        inputs: local types of the activations from the stage before; none on the first stage.
        outputs: local types of the activations sent on; none on the last stage.
        recomputes: it drops activations, to compute them again in backward.
    """

    index: int
    module: nn.Module
    inputs: tuple[TensorType, ...] = ()
    outputs: tuple[TensorType, ...] = ()
    recomputes: bool = False


class Chunks(nn.Module):
    """The modules of several stages, as one tree of names: that of the model.

    A parameter or buffer that two of them hold (tied weights) is one and the same in both, so that
    a rank holds it, its gradient and its optimizer state once.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        holders: dict[str, Tensor] = {}
        for stage in stages:
            for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
                first = holders.setdefault(name, tensor)
                if first is not tensor:
                    path, _, leaf = name.rpartition(".")
                    holder = stage.get_submodule(path)
                    table: dict[str, Any] = (
                        holder._parameters if leaf in holder._parameters else holder._buffers
                    )
                    table[leaf] = first

    @property
    def shared(self) -> list[nn.Parameter]:
        """Parameters of more than one stage."""
        held = [set(stage.parameters()) for stage in self.stages]
        return [p for p in self.parameters() if sum(p in parameters for parameters in held) > 1]
