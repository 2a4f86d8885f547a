"""What a segment adds to its stage besides its own ops: data parallelism, sends and state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from autoshard.cluster import Link, link
from autoshard.cost_models.collective import Collective, waiting_s
from autoshard.cost_models.compute import stream_s
from autoshard.cost_models.costs import CostModel
from autoshard.cost_models.state import (
    OPTIMIZER_STATES,
    UNKNOWN_OPTIMIZER_STATES,
    StateBytes,
    state_bytes,
)
from autoshard.ir import Program, TensorType
from autoshard.plan.class_costs import ClassCosts
from autoshard.plan.expert_axis import expert_parameters
from autoshard.plan.recompute import MenuEntry
from autoshard.plan.request import Request
from autoshard.plan.space import Configuration
from autoshard.plan.stages import Choice
from autoshard.software import Software


def optimizer_states(name: str) -> int:
    """Tensors like the parameter that an optimizer keeps of each."""
    return OPTIMIZER_STATES.get(name.lower(), UNKNOWN_OPTIMIZER_STATES)


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Prices of one configuration under one data-parallel mode."""

    request: Request
    configuration: Configuration
    classes: Mapping[str, ClassCosts]
    costs: CostModel
    mode: str

    @property
    def _dp(self) -> Link:
        mesh = self.configuration.mesh
        return link(self.request.cluster, mesh.replicas, mesh.tp)

    @property
    def _dp_of_experts(self) -> Link:
        """The ranks that hold the same experts, where these are spread over ``ep``."""
        mesh = self.configuration.mesh
        return link(self.request.cluster, mesh.replicas // mesh.ep, mesh.tp * mesh.ep)

    def _groups(self, layer: ClassCosts) -> list[tuple[list[TensorType], Link]]:
        """A segment's parameters by the ranks that hold the same ones."""
        if self.configuration.mesh.ep == 1:
            return [(list(layer.parameters.values()), self._dp)]
        spread = expert_parameters(layer.graph)
        own = [t for name, t in layer.parameters.items() if name in spread]
        others = [t for name, t in layer.parameters.items() if name not in spread]
        return [(others, self._dp), (own, self._dp_of_experts)]

    @property
    def _software(self) -> Software:
        return self.request.software

    @property
    def _scatters_each(self) -> bool:
        """Gradients are reduced in every micro-batch rather than once per step."""
        return self.mode in ("zero2", "zero3") and self.configuration.num_micro_batches > 1

    def _exposed(self, moved_s: float, beside_s: float, overlaps: bool) -> float:
        """What collectives of data parallelism add to the compute that they run beside.

        They take processors and bandwidth from it, so it slows down by a share of the time that
        is hidden (Galvatron's measured coefficient is 1.13; Miao et al. 2022, section 3.4). Where
        both need the CPU, nothing is hidden.
        """
        device = self.request.cluster.device
        if device.kind == "cpu" or not overlaps:
            return moved_s
        hidden_s = min(moved_s, beside_s)
        return moved_s - hidden_s + device.overlap_slowdown * hidden_s

    def _collective(
        self, kind: Collective, layer: ClassCosts, element_bytes: int | None, waits: bool = False
    ) -> float:
        """Seconds of one collective over the data-parallel ranks on all of a segment's parameters.

        Args:
            element_bytes: on the links; ``None``: as the parameter has.
            waits: it stands between ops, so ranks come to it at different times.
        """
        total = 0.0
        for types, ranks in self._groups(layer):
            sizes = [float(t.numel * (element_bytes or t.dtype.itemsize)) for t in types]
            if not self._software.gathers_each or kind == "all_reduce":
                sizes = [sum(sizes)]
            total += sum(self.costs.collective(kind, size, ranks) for size in sizes)
            total += len(sizes) * waiting_s(ranks) if waits else 0.0
        return total

    def choice(self, layer: ClassCosts, entry: MenuEntry) -> Choice:
        """A segment under an entry of its menu, with what data parallelism adds to each way."""
        software = self._software
        gather = scatter = 0.0
        if self.mode == "zero3":
            alone = not software.overlaps_gathering
            gather = self._collective("all_gather", layer, software.gathered_bytes, waits=alone)
        if self._scatters_each:
            alone = not software.overlaps_reduction
            scatter = self._collective("reduce_scatter", layer, software.reduced_bytes, waits=alone)
        backward_s = layer.backward_s + entry.extra_backward_s + self._accumulate_s(layer)
        both = software.overlaps_gathering and (not scatter or software.overlaps_reduction)
        return Choice(
            forward_s=layer.forward_s
            + self._exposed(gather, layer.forward_s, software.overlaps_gathering),
            backward_s=backward_s + self._exposed(gather + scatter, backward_s, both),
            saved_bytes=float(entry.saved_bytes),
            workspace_bytes=float(
                layer.workspace_bytes + entry.peak_recompute_bytes + self.transient_bytes
            ),
            recomputes=entry.mode != "none",
        )

    def _accumulate_s(self, layer: ClassCosts) -> float:
        """To add a micro-batch's gradients to those before it, on average over a step."""
        m = self.configuration.num_micro_batches
        if m == 1 or not layer.parameters or self._software.fuses_accumulation:
            return 0.0
        held = sum(
            t.numel
            * (t.dtype.itemsize + 2 * (self._software.gradient_bytes or t.dtype.itemsize))
            / (ranks.group_size if self._scatters_each else 1)
            for types, ranks in self._groups(layer)
            for t in types
        )
        return stream_s(held, self.request.cluster.device) * (m - 1) / m

    def once_per_step(self, layer: ClassCosts) -> tuple[float, float]:
        """Seconds of one segment's gradient reduction that nothing hides, and of its optimizer.

        Parameters that were updated in shards are gathered when the optimizer is done, beside
        nothing. Gradients are reduced beside the last micro-batch's backward.
        """
        if not layer.parameters:
            return 0.0, 0.0
        software = self._software
        reduced_s = gathered_s = 0.0
        if self.mode == "ddp":
            reduced_s = self._collective("all_reduce", layer, software.reduced_bytes)
        else:
            if not self._scatters_each:
                kind: Collective = "all_reduce" if software.reduces_whole else "reduce_scatter"
                reduced_s = self._collective(kind, layer, software.reduced_bytes)
            if self.mode != "zero3":
                gathered_s = self._collective("all_gather", layer, software.gathered_bytes)
        exposed_s = self._exposed(reduced_s, layer.backward_s, software.overlaps_reduction)
        moved_s = exposed_s + self.copied_s(layer) + gathered_s + layer.reduced_s
        return moved_s, self._optimizer_s(layer)

    def copied_s(self, layer: ClassCosts) -> float:
        """Seconds once per step to copy one segment's whole gradients into buckets."""
        if self.mode != "ddp" or not self._software.copies_gradients:
            return 0.0
        groups = (types for types, ranks in self._groups(layer) if ranks.group_size > 1)
        num_bytes = sum(kind.nbytes for types in groups for kind in types)
        return stream_s(2 * num_bytes, self.request.cluster.device, kernels=0)

    def _optimizer_s(self, layer: ClassCosts) -> float:
        software, moved = self._software, 0.0
        states = optimizer_states(self.request.optimizer)
        for types, ranks in self._groups(layer):
            shares = 1 if self.mode == "ddp" else ranks.group_size
            for kind in types:
                per_element = software.update_bytes(kind.dtype.itemsize, states)
                moved += kind.numel * per_element / shares
        return stream_s(moved, self.request.cluster.device)

    def send_s(self, num_bytes: int) -> float:
        """To the next stage, one way."""
        mesh = self.configuration.mesh
        to_next = link(self.request.cluster, mesh.pp, mesh.replicas * mesh.tp)
        return self.costs.collective("send", num_bytes, to_next)

    def state(self, types: Sequence[TensorType], experts: Sequence[TensorType] = ()) -> StateBytes:
        """Parameters, gradients and optimizer state, nothing in transit.

        Args:
            experts: parameters that are spread over ``ep``.
        """
        found = self._state(types, 0, self.configuration.mesh.replicas)
        if not experts:
            return found
        return found + self._state(experts, 0, self._dp_of_experts.group_size)

    def is_spread(self, layer: ClassCosts, port: str) -> bool:
        """Whether a parameter of a class is spread over ``ep``."""
        return self.configuration.mesh.ep > 1 and port in expert_parameters(layer.graph)

    @property
    def transient_bytes(self) -> int:
        """Whole parameters and gradients on their way: of two of the largest layers."""
        sizes = {
            name: sum(t.nbytes for t in c.parameters.values()) for name, c in self.classes.items()
        }
        largest = max(sizes, key=lambda name: sizes[name])
        types = 2 * tuple(self.classes[largest].parameters.values())
        return self._state(types, sizes[largest], self.configuration.mesh.replicas).transient

    def _state(self, types: Sequence[TensorType], unit_bytes: int, replicas: int) -> StateBytes:
        return state_bytes(
            types, data_parallel=self.mode, dp=replicas,
            optimizer=self.request.optimizer, unit_bytes=unit_bytes,
            num_micro_batches=self.configuration.num_micro_batches,
            software=self.request.software,
        )  # fmt: skip


def cut_bytes(program: Program, classes: Mapping[str, ClassCosts]) -> dict[int, int]:
    """Bytes that a rank sends forward if the pipeline is cut after a segment."""
    last_use: dict[str, int] = {}
    for index, segment in enumerate(program.segments):
        last_use.update((name, index) for name in segment.inputs)
    change = [0] * (len(program.segments) + 1)
    for index, segment in enumerate(program.segments):
        if segment.layer.kind == "shared":
            continue
        for value in classes[segment.layer.name].graph.outputs:
            if (last := last_use.get(segment.bindings[value.name], -1)) > index:
                change[index] += value.type.nbytes
                change[last] -= value.type.nbytes
    return dict(enumerate(accumulate(change[:-1])))


def tied_names(program: Program) -> dict[str, list[int]]:
    """Parameters that several segments use: name -> segments."""
    users: dict[str, list[int]] = {}
    for index, segment in enumerate(program.segments):
        for name in segment.parameters:
            users.setdefault(name, []).append(index)
    return {name: found for name, found in users.items() if len(found) > 1}
