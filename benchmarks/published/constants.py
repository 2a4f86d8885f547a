"""Constants of the cost models by name, and cluster figures with other values for them.

A name is a path into :class:`autoshard.cluster.Cluster`, such as ``device.matmul_efficiency`` or
``tiers.0.efficiency.*`` (``*``: all of a mapping alike); with the first letters of a device's name
in front (``h100:device.launch_s``) it holds for such devices alone. So whatever a cluster file may
say can be fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoshard.cluster import Cluster
from autoshard.cost_models.costs import CostModel
from autoshard.errors import OptionError
from autoshard.software import Software
from benchmarks.published.predict import analytic


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One constant that is fitted.

    Attributes:
        name: see the module.
        start: where a fit begins: a round guess for any device, not taken from published runs.
        low, high: what is physically possible.
        meaning: what it is, for people.
    """

    name: str
    start: float
    low: float
    high: float
    meaning: str = ""

    @property
    def path(self) -> list[str]:
        """Into a cluster."""
        return self.name.rpartition(":")[2].split(".")

    def is_of(self, device: str) -> bool:
        """Whether a device of this name has it."""
        return device.startswith(self.name.rpartition(":")[0])


CONSTANTS: tuple[Constant, ...] = (
    *(Constant(name=f"{chip}:device.matmul_efficiency", start=0.65, low=0.4, high=0.9,
               meaning="share of the peak that large matrix products reach")
      for chip in ("v100", "a100", "h")),
    *(Constant(name=f"{chip}:device.attention_efficiency", start=0.4, low=0.1, high=0.8,
               meaning="share of the peak that fused attention reaches")
      for chip in ("a100", "h")),
    Constant(name="device.memory_efficiency", start=0.8, low=0.5, high=0.95,
             meaning="share of the memory bandwidth that streaming kernels reach"),
    Constant(name="device.product_depth", start=200, low=50, high=800,
             meaning="length of sums at which products reach half of their rate"),
    Constant(name="device.alignment", start=0.3, low=0.05, high=1.0,
             meaning="how products slow down whose sizes are no multiples of 64"),
    Constant(name="device.launch_s", start=4e-6, low=1e-6, high=2e-5,
             meaning="gap between kernels"),
    Constant(name="device.host_s", start=1.5e-5, low=5e-6, high=8e-5,
             meaning="of the host per kernel"),
    Constant(name="device.overlap_slowdown", start=0.2, low=0.02, high=0.6,
             meaning="what hidden collectives take from compute"),
    Constant(name="tiers.0.efficiency.*", start=0.75, low=0.4, high=0.95,
             meaning="share of the links in a node that collectives use"),
    Constant(name="tiers.0.latency_s", start=6e-6, low=1e-6, high=3e-5,
             meaning="per step in a node"),
    Constant(name="tiers.-1.efficiency.*", start=0.75, low=0.4, high=0.95,
             meaning="share of the network that collectives use"),
    Constant(name="tiers.-1.latency_s", start=2e-5, low=2e-6, high=1e-4,
             meaning="per step across nodes"),
)  # fmt: skip
"""What :mod:`benchmarks.published.fit` fits."""


@dataclass(frozen=True, slots=True)
class Priced:
    """Prices with other constants; a :data:`benchmarks.published.predict.Price`."""

    values: Mapping[str, float]

    def __call__(self, cluster: Cluster, software: Software) -> CostModel:
        return analytic(self.cluster(cluster), software)

    def cluster(self, cluster: Cluster) -> Cluster:
        """The cluster with these constants."""
        for name, value in self.values.items():
            chip, _, path = name.rpartition(":")
            if cluster.device.name.startswith(chip):
                cluster = with_value(cluster, path.split("."), value)
        return cluster


def with_value(item: Any, path: list[str], value: float) -> Any:
    """A copy of a tree of dataclasses, tuples and mappings with one leaf replaced.

    Raises:
        OptionError: the path leads nowhere.
    """
    if not path:
        return value
    head, *rest = path
    try:
        if isinstance(item, tuple):
            index = int(head) % len(item)
            inner = with_value(item[index], rest, value)
            return (*item[:index], inner, *item[index + 1 :])
        if isinstance(item, Mapping) and head == "*":
            return {key: with_value(inner, rest, value) for key, inner in item.items()}
        if isinstance(item, Mapping):
            return {**item, head: with_value(item.get(head), rest, value)}
        return replace(item, **{head: with_value(getattr(item, head), rest, value)})
    except (AttributeError, TypeError, ValueError) as error:
        raise OptionError(
            f"constant path {'.'.join(path)!r} leads nowhere in {type(item).__name__} ({error}); "
            "name a field of a cluster file"
        ) from None
