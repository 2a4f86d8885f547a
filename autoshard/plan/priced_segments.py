"""The segments of a program as one configuration prices them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from autoshard.ir import TensorType
from autoshard.plan.class_costs import ClassCosts
from autoshard.plan.recompute import MenuEntry
from autoshard.plan.request import Request
from autoshard.plan.stage_costs import StageCosts, cut_bytes, tied_names


@dataclass(slots=True)
class PricedSegments:
    """Of one configuration under one data-parallel mode; segments go by their index.

    Attributes:
        tied: names of parameters that several segments use, with these.
        cuts: bytes that pass each cut.
        groups: segments of each run.
    """

    request: Request
    classes: Mapping[str, ClassCosts]
    prices: StageCosts
    tied: dict[str, list[int]] = field(init=False)
    cuts: dict[int, int] = field(init=False)
    groups: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        program = self.request.program
        indices = [i for i, s in enumerate(program.segments) if s.layer.kind != "shared"]
        self.tied = tied_names(program)
        self.cuts = cut_bytes(program, self.classes)
        kinds = groupby(indices, key=lambda i: (program.segments[i].layer.name, self.cuts[i]))
        self.groups = [list(group) for _, group in kinds]

    def layer(self, index: int) -> ClassCosts:
        return self.classes[self.request.program.segments[index].layer.name]

    def menu(self, layer: ClassCosts) -> tuple[MenuEntry, ...]:
        """The recompute entries of a class that the pins allow."""
        wanted = self.request.constraints.recompute
        if wanted is None or len(layer.menu) == 1:
            return layer.menu
        return tuple(e for e in layer.menu if e.mode == wanted) or layer.menu[-1:]

    def own_types(self, index: int) -> tuple[list[TensorType], list[TensorType]]:
        """Of the parameters that no other segment uses; experts that are spread are apart."""
        bindings, layer = self.request.program.segments[index].bindings, self.layer(index)
        own = {p: t for p, t in layer.parameters.items() if bindings[p] not in self.tied}
        spread = {p for p in own if self.prices.is_spread(layer, p)}
        return (
            [t for p, t in own.items() if p not in spread],
            [t for p, t in own.items() if p in spread],
        )

    def tied_type(self, name: str) -> TensorType | None:
        """``None`` for what is not trained."""
        for index in self.tied[name]:
            for port, bound in self.request.program.segments[index].bindings.items():
                if bound == name and port in self.layer(index).parameters:
                    return self.layer(index).parameters[port]
        return None

    def all_types(self, index: int) -> list[TensorType]:
        """Of a segment's parameters; of tied ones in the first segment that uses them."""
        kinds, _ = self.own_types(index)
        first = (name for name, users in self.tied.items() if users[0] == index)
        return [*kinds, *(t for name in first if (t := self.tied_type(name)) is not None)]
