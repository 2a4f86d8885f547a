"""A device, and the tiers of links that connect it to others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from autoshard.errors import OptionError

CLUSTER_VERSION = 1
DTYPES = ("f64", "f32", "bf16", "f16", "f8")
DEVICE_KINDS = ("cuda", "cpu")
COLLECTIVE_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator (or one CPU process).

    Attributes:
        memory_bytes: what a training process may use of the device's memory.
        bytes_per_s: peak memory bandwidth.
        flops_per_s: dense peak by dtype name (``"bf16"``, ``"f16"``, ``"f32"``, ``"f64"``).
        matmul_efficiency: share of the peak that large matrix products reach.
        memory_efficiency: share of the bandwidth that streaming kernels reach.
        launch_s: overhead per kernel (or per eager op on a CPU).
        kind: the ``torch.device`` type, ``"cuda"`` or ``"cpu"``.
        attention_efficiency: share of the peak that fused attention reaches; ``None``: as matmul.
        num_units: processors that the tiles of a matrix product are dealt to (streaming
            multiprocessors), for tile and wave quantisation; 0: not modelled.
        product_depth: length of the summed dim at which a matrix product reaches half of its rate,
            because every tile fills its pipeline first and writes its result last.
        alignment: exponent ``a`` in ``(g / 64) ** a``, the share of its rate that a matrix product
            keeps whose sizes have no more than ``g`` of the factor 64 in common.
        host_s: seconds of the host per kernel: what a program takes at least, because one thread
            of Python and C++ launches kernel after kernel; 0: never in the way.
        overlap_slowdown: seconds that compute loses per second of a collective that runs beside it
            and takes processors and bandwidth from it.
        jitter_s: standard deviation of when ranks that compute alike come to a collective.
        share: the part of a core's time that a process has while all compute, where there are more
            processes than cores. All rates are those of such a process; what others leave while
            they wait, it gets on top.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    matmul_efficiency: float
    memory_efficiency: float
    launch_s: float
    kind: str = "cuda"
    attention_efficiency: float | None = None
    num_units: int = 0
    product_depth: float = 0.0
    alignment: float = 0.0
    host_s: float = 0.0
    overlap_slowdown: float = 0.0
    jitter_s: float = 0.0
    share: float = 1.0

    def shared(self, share: float) -> Device:
        """What a process computes with that has this share of the device's time."""
        return replace(
            self,
            bytes_per_s=share * self.bytes_per_s,
            launch_s=self.launch_s / share,
            host_s=self.host_s / share,
            jitter_s=self.jitter_s / share,
            share=self.share * share,
            flops_per_s={name: share * rate for name, rate in self.flops_per_s.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One level of links.

    Attributes:
        size: how many devices a group within this tier spans at most (8 for a node; the outermost
            tier has the whole cluster's size, 0 for "as many as there are").
        bytes_per_s: per device and direction.
        latency_s: alpha, per message.
        efficiency: share of ``bytes_per_s`` that each kind of collective (`COLLECTIVE_KINDS`)
            reaches on large messages; kinds that are not listed reach all of it.
        latency_factor: times ``latency_s`` that a message of each kind of collective takes, if not
            once.
        group_share: where links join devices directly rather than through a switch: by number of
            devices, the share of ``bytes_per_s`` that groups of at most so many have inside.
    """

    name: str
    size: int
    bytes_per_s: float
    latency_s: float
    efficiency: Mapping[str, float] = field(default_factory=dict)
    latency_factor: Mapping[str, float] = field(default_factory=dict)
    group_share: Mapping[str, float] = field(default_factory=dict)

    def rate(self, members: int, stride: int = 1) -> float:
        """Bytes per second, device and direction of a group of so many devices of this tier.

        Of devices joined directly, ``stride`` apart, a group has no more than its part of the links
        among all ``members * stride`` that it spans: of a device's ``span - 1`` neighbours there,
        ``members - 1`` are of its group.
        """
        share, span = self._share_of(members), members * stride
        if self.group_share and 1 < members < span:
            share = min(share, self._share_of(span) * (members - 1) / (span - 1))
        return self.bytes_per_s * share

    def _share_of(self, members: int) -> float:
        enough = [size for size in self.group_share if members <= int(size)]
        smallest = min(enough, key=int, default=None)
        return 1.0 if smallest is None else self.group_share[smallest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal devices on tiers of links, innermost (fastest) tier first."""

    name: str
    device: Device
    tiers: tuple[Tier, ...]
    source: str = ""

    def tier_of(self, span: int) -> Tier:
        """The innermost tier that holds ``span`` consecutive devices.

        A group of ``size`` ranks ``stride`` apart spans ``size * stride`` devices; nodes are
        filled in order, so a span no larger than a node is taken to lie in one.

        Raises:
            OptionError: if the cluster is smaller than that.
        """
        for tier in self.tiers:
            if tier.size == 0 or span <= tier.size:
                return tier
        raise OptionError(
            f"expected groups of at most {self.tiers[-1].size} devices, the size of cluster "
            f"{self.name!r}, but got one that spans {span}; use a smaller world size, or set the "
            f"size of tier {self.tiers[-1].name!r} to 0 (as many as there are)"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cluster as a JSON file that :meth:`load` reads."""
        document = {"schema_version": CLUSTER_VERSION, **msgspec.to_builtins(self)}
        text = msgspec.json.format(msgspec.json.encode(document), indent=2)
        Path(path).write_bytes(text + b"\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Cluster:
        """Read a cluster file.

        Raises:
            OptionError: naming the field that is missing, unknown or out of range.
        """
        from autoshard.cluster.files import decode, presets  # which know this class

        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise OptionError(
                f"expected a readable cluster file but got {str(path)!r} ({error.strerror}); "
                f"presets are: {', '.join(presets())}"
            ) from None
        return decode(data, str(path))
