"""What the hardware is: a device, and the tiers of links that connect it to others.

SI units throughout: bytes, seconds, bytes per second, floating-point operations per second.
Clusters come from presets (JSON files beside :mod:`autoshard.cost_models`, each figure with its
source), from files of the same format, or from the machine itself; :func:`find` takes any of them.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from autoshard.errors import OptionError

CLUSTER_VERSION = 1
_DTYPES = ("f64", "f32", "bf16", "f16", "f8")
_KINDS = ("cuda", "cpu")
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
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise OptionError(
                f"expected a readable cluster file but got {str(path)!r} ({error.strerror}); "
                f"presets are: {', '.join(presets())}"
            ) from None
        return _decode(data, str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What one tier does for a group: it joins ``size`` units of ``members`` ranks each.

    Attributes:
        bytes_per_s: per rank of the group and direction.
        chained: trees are chains here, as NCCL's are within a node.
    """

    size: int
    members: int
    bytes_per_s: float
    latency_s: float
    efficiency: Mapping[str, float]
    latency_factor: Mapping[str, float] = field(default_factory=dict)
    chained: bool = False

    def latency(self, kind: str) -> float:
        """Seconds per message of a collective of this kind."""
        return self.latency_s * self.latency_factor.get(kind, 1.0)

    def rate(self, kind: str) -> float:
        """Bytes per second and rank that a collective of this kind reaches here."""
        return self.bytes_per_s * self.efficiency.get(kind, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The levels that a group's ranks communicate over, innermost first.

    Levels that join only one unit are left out, so the last one is the slowest that the group
    uses; the product of the sizes is the group's size (or just above, if it does not divide).

    Attributes:
        jitter_s: of the devices that it joins.
    """

    group_size: int
    levels: tuple[Level, ...]
    jitter_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """What a ring through all ranks carries: the narrowest level (infinite for one rank)."""
        return self.ring_rate("")

    @property
    def latency_s(self) -> float:
        """Of one message between the farthest ranks."""
        return self.levels[-1].latency_s if self.levels else 0.0

    def ring_rate(self, kind: str) -> float:
        """Bytes per second of rings through all ranks.

        ``members`` ranks of a node send over their own network card each, and a ring per card
        lets all of them carry the same collective, so a level's share is ``members`` times one
        rank's: strided groups of 2, 4 and 8 over two nodes reach 8, 16 and 21 GB/s (Galvatron's
        published hardware profile), proportional to their members per node.
        """
        return min((lv.rate(kind) * lv.members for lv in self.levels), default=math.inf)


def link(cluster: Cluster, group_size: int, stride: int = 1) -> Link:
    """The links of a group of ``group_size`` ranks that are ``stride`` devices apart.

    With mesh axes outermost first, ``stride`` is the product of the sizes of the axes further in.
    All groups of an axis communicate at once, so a node's network cards are shared by the groups
    that run through it: every rank has its own device's share.
    """
    cluster.tier_of(group_size * stride)
    levels: list[Level] = []
    covered = 1
    for tier in cluster.tiers:
        reach = group_size if tier.size == 0 else min(group_size, max(1, tier.size // stride))
        if reach > covered:
            levels.append(
                Level(
                    size=-(-reach // covered), members=covered,
                    bytes_per_s=tier.rate(reach, stride),
                    latency_s=tier.latency_s, efficiency=tier.efficiency,
                    latency_factor=tier.latency_factor,
                    chained=tier is not cluster.tiers[-1],
                )
            )  # fmt: skip
            covered = reach
        if covered >= group_size:
            break
    return Link(
        group_size=group_size, levels=tuple(levels), jitter_s=cluster.device.jitter_s
    )  # fmt: skip


def presets() -> tuple[str, ...]:
    """Names of the clusters that come with the package, sorted."""
    folder = resources.files("autoshard.cost_models")
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(n.removesuffix(".json") for n in names if n.endswith(".json")))


def check_size(cluster: Cluster, world_size: int) -> None:
    """Whether there are so many devices.

    Raises:
        OptionError: there are not.
    """
    most = cluster.tiers[-1].size
    if most and world_size > most:
        raise OptionError(
            f"world_size is {world_size} but cluster {cluster.name!r} has {most} devices (the size "
            f"of its outermost tier, {cluster.tiers[-1].name!r}): use at most {most}, or set that "
            "size to 0 (as many as there are)"
        )


def find(cluster: Cluster | str | os.PathLike[str] | None = None) -> Cluster:
    """The cluster that a user means: a preset's name, a file, or a cluster itself.

    ``None`` and ``"this-machine"`` are :func:`this_machine`.

    Raises:
        OptionError: for an unknown name or a malformed file.
    """
    if isinstance(cluster, Cluster):
        return check(cluster)
    if cluster is None:
        return this_machine()
    if not isinstance(cluster, (str, os.PathLike)):
        raise OptionError(
            f"expected a preset name, a cluster file or a Cluster but got "
            f"{type(cluster).__name__} ({cluster!r}); presets are: {', '.join(presets())}"
        )
    name = os.fspath(cluster)
    if name in ("this-machine", "this_machine"):
        return this_machine()
    if name in presets():
        return _decode(_preset_bytes(name), f"preset {name}")
    if os.sep in name or name.endswith(".json") or Path(name).is_file():
        return Cluster.load(name)
    raise OptionError(
        f"expected a cluster preset or file but got {name!r}"
        f"{_did_you_mean(name.lower(), presets())}; "
        f"presets are: {', '.join(presets())} (and this-machine)"
    )


def this_machine() -> Cluster:
    """The present machine: a GPU's preset if there is one that fits, else the CPU's.

    A CPU's memory and cores are shared by as many processes as ``torchrun`` started here, or one
    per core.
    For measured figures use ``autoshard profile``.
    """
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        lowered = found.name.lower()
        for name in ("h200", "h100", "b200", "mi300x", "a100-80", "a100-40", "v100-32", "v100-16"):
            base = find(name)
            chip = name.split("-")[0]
            if chip in lowered and found.total_memory >= base.device.memory_bytes:
                return replace(
                    base, source=f"preset {name}, as torch names this device {found.name}"
                )
        raise OptionError(
            f"expected a known GPU but got {found.name!r}; measure it with autoshard profile FILE "
            "and give that file as the cluster"
        )
    base = find("cpu")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", num_cores()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = replace(base.device, memory_bytes=int(0.9 * memory / processes))
    return replace(base, device=device.shared(core_share(processes)))


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_share(processes: int) -> float:
    """The part of a core's time that each of ``processes`` of one thread gets here."""
    return min(1.0, num_cores() / processes)


def check(cluster: Cluster) -> Cluster:
    """The cluster itself if its figures make sense.

    Raises:
        OptionError: naming the first field that does not.
    """
    device = cluster.device
    _positive(
        "device.memory_bytes", device.memory_bytes, "the usable memory in bytes, such as 80e9"
    )
    _positive("device.bytes_per_s", device.bytes_per_s, "the memory bandwidth in bytes per second")
    if not device.flops_per_s:
        raise _wrong("device.flops_per_s", "a peak for at least one dtype", {}, 'add "bf16": 1e15')
    for dtype, flops in device.flops_per_s.items():
        if dtype not in _DTYPES:
            raise _wrong(
                "device.flops_per_s", f"dtypes among {', '.join(_DTYPES)}", dtype,
                f"rename or remove it{_did_you_mean(dtype, _DTYPES)}",
            )  # fmt: skip
        _positive(f"device.flops_per_s.{dtype}", flops, "the dense peak in operations per second")
    for name in ("matmul_efficiency", "memory_efficiency", "attention_efficiency", "share"):
        share = getattr(device, name)
        if share is not None:
            _share(f"device.{name}", share)
    _not_negative("device.launch_s", device.launch_s, "seconds per kernel, such as 5e-6")
    _not_negative("device.num_units", device.num_units, "0 or the number of multiprocessors")
    _not_negative("device.product_depth", device.product_depth, "0 or a length, such as 200")
    _not_negative("device.alignment", device.alignment, "0 or an exponent, such as 0.3")
    _not_negative("device.host_s", device.host_s, "seconds per kernel, such as 2e-5")
    _not_negative("device.overlap_slowdown", device.overlap_slowdown, "a share, such as 0.2")
    _not_negative("device.jitter_s", device.jitter_s, "seconds, such as 1e-4")
    if device.kind not in _KINDS:
        raise _wrong("device.kind", "cuda or cpu", device.kind, "set it to the torch.device type")
    _check_tiers(cluster.tiers)
    return cluster


def _check_tiers(tiers: tuple[Tier, ...]) -> None:
    if not tiers:
        raise _wrong("tiers", "at least one tier of links", [], "add one of size 0")
    last = 1
    for index, tier in enumerate(tiers):
        where = f"tiers[{index}]"
        outermost = index == len(tiers) - 1
        if not (tier.size > last or (tier.size == 0 and outermost)):
            raise _wrong(
                f"{where}.size", f"more than {last} devices (or 0 in the outermost tier)",
                tier.size, "list tiers innermost first, each larger than the one before",
            )  # fmt: skip
        if tier.size and tier.size % last:
            raise _wrong(
                f"{where}.size", f"a multiple of {last}, the size of the tier inside it", tier.size,
                "tiers hold whole units of the one before: 8 devices to a node, 64 to a rack",
            )  # fmt: skip
        last = tier.size
        _positive(f"{where}.bytes_per_s", tier.bytes_per_s, "bytes per second and direction")
        _not_negative(f"{where}.latency_s", tier.latency_s, "seconds per message, such as 1e-5")
        for kind, share in tier.efficiency.items():
            if kind not in COLLECTIVE_KINDS:
                raise _wrong(
                    f"{where}.efficiency", f"kinds among {', '.join(COLLECTIVE_KINDS)}", kind,
                    f"rename or remove it{_did_you_mean(kind, COLLECTIVE_KINDS)}",
                )  # fmt: skip
            _share(f"{where}.efficiency.{kind}", share)
        for kind, factor in tier.latency_factor.items():
            if kind not in COLLECTIVE_KINDS:
                raise _wrong(
                    f"{where}.latency_factor", f"kinds among {', '.join(COLLECTIVE_KINDS)}", kind,
                    f"rename or remove it{_did_you_mean(kind, COLLECTIVE_KINDS)}",
                )  # fmt: skip
            _not_negative(f"{where}.latency_factor.{kind}", factor, "a factor, such as 2")
        for number, share in tier.group_share.items():
            if not number.isdigit() or int(number) < 2:
                raise _wrong(
                    f"{where}.group_share", "numbers of devices of at least 2", number,
                    'give shares as {"2": 0.2, "4": 0.7}',
                )  # fmt: skip
            _share(f"{where}.group_share.{number}", share)


def _decode(data: bytes, origin: str) -> Cluster:
    try:
        document = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise OptionError(
            f"expected JSON in cluster file {origin} but got: {error}; see docs/cluster-files.md"
        ) from None
    if not isinstance(document, dict):
        raise OptionError(f"expected a JSON object in cluster file {origin} but got {document!r}")
    version = document.pop("schema_version", None)
    if version != CLUSTER_VERSION:
        raise OptionError(
            f"expected schema_version {CLUSTER_VERSION} in cluster file {origin} but got "
            f"{version!r}; add it, or save the cluster again with this version of autoshard"
        )
    try:
        _like_presets(document)
        _known_fields(document, Cluster, "")
        cluster = msgspec.convert(document, Cluster, strict=True)
        return check(cluster)
    except msgspec.ValidationError as error:
        raise OptionError(
            f"cluster file {origin}: {error}; every field is described in docs/cluster-files.md"
        ) from None
    except OptionError as error:
        raise OptionError(f"cluster file {origin}: {error}") from None


def _like_presets(document: dict[str, Any]) -> None:
    """Put in what is given by a preset's name: its device, or one of its tiers (``h100.nvlink``).

    Raises:
        OptionError: there is no such preset or tier.
    """
    if isinstance(name := document.get("device"), str):
        document["device"] = _preset(name, "device")["device"]
    given = document.get("tiers")
    tiers: list[Any] = given if isinstance(given, list) else []
    for index, name in enumerate(tiers):
        if not isinstance(name, str):
            continue
        of, _, wanted = name.rpartition(".")
        there = {tier["name"]: tier for tier in _preset(of, f"tiers[{index}]")["tiers"]}
        if wanted not in there:
            raise _wrong(
                f"tiers[{index}]", f"a tier of preset {of} ({', '.join(there)})", name,
                "name one of them, or give the tier itself",
            )  # fmt: skip
        tiers[index] = there[wanted]


def _preset(name: str, where: str) -> dict[str, Any]:
    """The document of a preset that gives all figures itself."""
    if name not in presets():
        raise _wrong(
            where, "an object, or the name of a preset", name,
            f"presets are: {', '.join(presets())}{_did_you_mean(name, presets())}",
        )  # fmt: skip
    document: dict[str, Any] = msgspec.json.decode(_preset_bytes(name))
    _like_presets(document)
    return document


def _preset_bytes(name: str) -> bytes:
    return resources.files("autoshard.cost_models").joinpath(f"{name}.json").read_bytes()


def _known_fields(document: dict[str, Any], kind: type, where: str) -> None:
    known = {f.name for f in fields(kind)}
    for name, item in document.items():
        if name not in known:
            raise OptionError(
                f"expected fields among {', '.join(sorted(known))} but got {where + name!r}"
                f"{_did_you_mean(name, known)}; rename or remove it"
            )
        if name == "device" and isinstance(item, dict):
            _known_fields(item, Device, "device.")
        if name == "tiers" and isinstance(item, list):
            for index, tier in enumerate(item):
                if isinstance(tier, dict):
                    _known_fields(tier, Tier, f"tiers[{index}].")


def _did_you_mean(name: str, known: Any) -> str:
    names = sorted(known)
    close = [n for n in names if n.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _wrong(name: str, expected: str, got: object, cure: str) -> OptionError:
    return OptionError(f"{name}: expected {expected} but got {got!r}; {cure}")


def _positive(name: str, value: float, meaning: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise _wrong(name, "a positive number", value, f"give {meaning}")


def _not_negative(name: str, value: float, meaning: str) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise _wrong(name, "zero or a positive number", value, f"give {meaning}")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise _wrong(name, "a share above 0 and at most 1", value, "divide percentages by 100")
