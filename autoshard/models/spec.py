"""A model together with what is needed to capture it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model, one example batch (``None``: the model knows its own), and its loss function.

    Attributes:
        one_sample: the example only shows what a sample looks like (or there is none), so its size
            says nothing of the batch to train with.
    """

    name: str
    model: nn.Module
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None
    loss_fn: LossFunction | None = None
    one_sample: bool = False
