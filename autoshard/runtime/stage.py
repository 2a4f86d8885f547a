"""Base of emitted stages: builds the stage's layers at their original paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from autoshard.runtime.parameters import Layer, attach


class BaseStage(Layer):
    """One pipeline stage on one rank. Equal stages share one class; ``spec`` tells them apart.

    Attributes:
        INPUTS, OUTPUTS: activations from the stage before and to the stage after, in order.
        BATCH: batch tensors that ``forward`` takes, cut into micro-batches.
        PROLOGUE: what :meth:`prologue` returns for ``forward``, the same for every micro-batch.
        CUT: those of ``PROLOGUE`` that are cut into micro-batches along dim 0.
        LAYERS: the class of each layer, in the order of the calls.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ()
    OUTPUTS: ClassVar[tuple[str, ...]] = ()
    BATCH: ClassVar[tuple[str, ...]] = ()
    PROLOGUE: ClassVar[tuple[str, ...]] = ()
    CUT: ClassVar[tuple[str, ...]] = ()
    LAYERS: ClassVar[tuple[type[Layer], ...]] = ()

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """Create the stage with empty parameters.

        Args:
            spec: the stage's entry in the manifest; its ``layers`` give, for each of ``LAYERS``,
                ``path``, ``number`` (of the segment in the program) and, where parameters do not
                all live below the path, ``names``: the qualified name of each.
        """
        super().__init__()
        self._calls: list[tuple[Layer, int]] = []
        made: dict[str, Layer] = {}
        for entry, layer_class in zip(spec["layers"], self.LAYERS, strict=True):
            path, names = entry["path"], entry.get("names")
            layer = made.get(path)
            if layer is None or type(layer) is not layer_class:
                if layer is not None and names is None:
                    names = {name: f"{path}.{name}" for name in layer_class.PARAMETERS}
                layer = layer_class()
                attach(self, layer, path, names)
                made.setdefault(path, layer)
            self._calls.append((layer, entry["number"]))

    def train(self, mode: bool = True) -> BaseStage:
        super().train(mode)
        for layer, _ in self._calls:  # one whose parameters are elsewhere is no submodule
            layer.train(mode)
        return self

    def prologue(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all micro-batches share, from the whole local batch; once per step."""
        return {}
