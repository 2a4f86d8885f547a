"""What no plan of a configuration can beat under one mode of data parallelism.

Modes trade memory for time: ZeRO-3 holds least, but gathers every parameter twice per micro-batch.
A bound that takes the memory of one and the time of another is far from both, so each mode has its
own, and that of the configuration is the least of them. The prices are those of
:class:`autoshard.plan.stage_costs.StageCosts`, for parameters that the tensor axis splits evenly.

What collectives add to the compute beside them, ``max(c, g) + a min(c, g)`` for ``c`` seconds of
compute, ``g`` of collectives and ``a`` for what compute loses to them, is convex: over forward and
backward, all layers and all stages it is at least ``max(c + a g, g + a c)`` of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoshard.cluster import link
from autoshard.cost_models.collective import Collective
from autoshard.cost_models.compute import stream_s
from autoshard.cost_models.costs import CostModel
from autoshard.options import ASYNCHRONOUS
from autoshard.plan.bounds import Parameters, WholeModel, layers_of, recompute_bound
from autoshard.plan.request import Request
from autoshard.plan.space import Configuration
from autoshard.plan.stage_bounds import Layers, Traffic, least_step_s
from autoshard.plan.stage_costs import optimizer_states


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What a configuration takes under one data-parallel mode, at least.

    Attributes:
        mode: of data parallelism.
        again_s: recomputation of a micro-batch, over all stages.
        accumulate_s: to add its gradients to those before it.
        traffic: of data parallelism, over all stages.
        layers: ``None`` if repeated layers are of several classes.
    """

    configuration: Configuration
    mode: str
    again_s: float
    accumulate_s: float
    traffic: Traffic
    layers: Layers | None

    def least_s(self, seconds: float) -> float:
        """Of a step whose micro-batches compute for ``seconds``, over all stages."""
        spread_s = self.spread_s(seconds)
        if self.configuration.looped.closed_form:
            return spread_s
        return max(spread_s, self.configuration.least_s(self._beside(seconds)))

    def spread_s(self, seconds: float) -> float:
        """The same if what a step does once per step is in ``seconds``, spread over micro-batches.

        See :attr:`Configuration.paces`.
        """
        configuration = self.configuration
        whole_s = configuration.paces * self._beside(seconds) + self.traffic.step_s
        return whole_s / configuration.mesh.pp

    def _beside(self, seconds: float) -> float:
        return self.traffic.beside_s(seconds + self.again_s + self.accumulate_s)

    def least_in_stages_s(self, seconds: float, memory_bytes: float) -> float:
        """From what stages may hold, a linear program."""
        looped = self.configuration.looped
        if self.layers is None:
            return 0.0
        seconds += self.accumulate_s
        return least_step_s(looped, seconds, self.layers, memory_bytes, self.traffic)


@dataclass(frozen=True, slots=True)
class Floors:
    """Those of every mode that may fit, and if there is none what the nearest lacks per rank."""

    modes: tuple[Floor, ...]
    missing_bytes: float = 0.0


def floors(
    whole: WholeModel, configuration: Configuration, request: Request, costs: CostModel
) -> Floors:
    """What bounds are made of under each mode of a configuration."""
    found, missing = [], []
    for mode in configuration.data_parallel:
        alone = replace(configuration, data_parallel=(mode,))
        bound = recompute_bound(whole, alone, request)
        if bound.missing_bytes:
            missing.append(bound.missing_bytes)
            continue
        prices = _Prices(whole, configuration, request, costs, mode)
        found.append(
            Floor(
                configuration=configuration, mode=mode, again_s=bound.seconds,
                accumulate_s=prices.accumulate_s(), traffic=prices.traffic(),
                layers=layers_of(whole, alone, request),
            )
        )  # fmt: skip
    return Floors(tuple(found)) if found else Floors((), min(missing))


@dataclass(frozen=True, slots=True)
class _Prices:
    """Of one configuration under one mode; experts that are spread over ``ep`` are not priced."""

    whole: WholeModel
    configuration: Configuration
    request: Request
    costs: CostModel
    mode: str

    @property
    def _free(self) -> bool:
        return self.configuration.mesh.ep > 1 or self.mode in ASYNCHRONOUS

    @property
    def _scatters_each(self) -> bool:
        return self.mode in ("zero2", "zero3") and self.configuration.num_micro_batches > 1

    def traffic(self) -> Traffic:
        """Of the repeated layers, with the optimizer's update of their parameters."""
        if self._free:
            return Traffic()
        software, device = self.request.software, self.request.cluster.device
        hides = software.overlaps_gathering or software.overlaps_reduction
        hides = hides and device.kind != "cpu"
        slowdown = min(1.0, device.overlap_slowdown) if hides else 1.0
        gather_s = self._collective("all_gather", software.gathered_bytes)
        scatter_s = self._collective("reduce_scatter", software.reduced_bytes)
        reduce_s = self._collective("all_reduce", software.reduced_bytes)
        moved_s = 2 * gather_s if self.mode == "zero3" else 0.0
        moved_s += scatter_s if self._scatters_each else 0.0
        after_s = self._optimizer_s()
        after_s += gather_s if self.mode in ("zero1", "zero2") else 0.0
        if not self._scatters_each:
            after_s += slowdown * (reduce_s if self.mode == "ddp" else scatter_s)
        return Traffic(moved_s=moved_s, slowdown=slowdown, step_s=after_s)

    def _collective(self, kind: Collective, element_bytes: int | None) -> float:
        """Of all layers' parameters over the data-parallel ranks, layer by layer."""
        mesh = self.configuration.mesh
        number = self.whole.num_layers if self.whole.layers_s is not None else 1
        ranks = link(self.request.cluster, mesh.replicas, mesh.tp)
        num_bytes = _bytes(self.whole.of_layers, element_bytes) / mesh.tp
        return number * self.costs.collective(kind, num_bytes / max(1, number), ranks)

    def accumulate_s(self) -> float:
        """To add a micro-batch's gradients to those before it, on average over a step."""
        m, software = self.configuration.num_micro_batches, self.request.software
        if m == 1 or software.fuses_accumulation or self._free:
            return 0.0
        parameters = self.whole.parameters
        held = _bytes(parameters, None) + 2 * _bytes(parameters, software.gradient_bytes)
        held /= self.configuration.mesh.replicas if self._scatters_each else 1
        return self._stream_s(held) * (m - 1) / m

    def _optimizer_s(self) -> float:
        software, parameters = self.request.software, self.whole.of_layers
        states = optimizer_states(self.request.optimizer)
        elements = parameters.trainable_elements
        own = parameters.trainable_bytes / max(1, elements)
        moved = elements * software.update_bytes(own, states)
        ranks = 1 if self.mode == "ddp" else self.configuration.mesh.replicas
        return self._stream_s(moved / ranks)

    def _stream_s(self, num_bytes: float) -> float:
        tp, device = self.configuration.mesh.tp, self.request.cluster.device
        return stream_s(num_bytes / tp, device, kernels=0)


def _bytes(parameters: Parameters, element_bytes: int | None) -> float:
    """Of trainable parameters with so many bytes per element; ``None``: as they are."""
    if element_bytes is None:
        return float(parameters.trainable_bytes)
    return float(parameters.trainable_elements * element_bytes)
