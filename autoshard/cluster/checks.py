"""Whether the figures of a cluster make sense, and errors that name the one that does not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping

from autoshard.cluster.hardware import COLLECTIVE_KINDS, DEVICE_KINDS, DTYPES, Cluster, Tier
from autoshard.errors import OptionError


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
        raise wrong("device.flops_per_s", "a peak for at least one dtype", {}, 'add "bf16": 1e15')
    for dtype, flops in device.flops_per_s.items():
        if dtype not in DTYPES:
            raise wrong(
                "device.flops_per_s", f"dtypes among {', '.join(DTYPES)}", dtype,
                f"rename or remove it{did_you_mean(dtype, DTYPES)}",
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
    if device.kind not in DEVICE_KINDS:
        raise wrong("device.kind", "cuda or cpu", device.kind, "set it to the torch.device type")
    _check_tiers(cluster.tiers)
    return cluster


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


def _check_tiers(tiers: tuple[Tier, ...]) -> None:
    if not tiers:
        raise wrong("tiers", "at least one tier of links", [], "add one of size 0")
    last = 1
    for index, tier in enumerate(tiers):
        where = f"tiers[{index}]"
        outermost = index == len(tiers) - 1
        if not (tier.size > last or (tier.size == 0 and outermost)):
            raise wrong(
                f"{where}.size", f"more than {last} devices (or 0 in the outermost tier)",
                tier.size, "list tiers innermost first, each larger than the one before",
            )  # fmt: skip
        if tier.size and tier.size % last:
            raise wrong(
                f"{where}.size", f"a multiple of {last}, the size of the tier inside it", tier.size,
                "tiers hold whole units of the one before: 8 devices to a node, 64 to a rack",
            )  # fmt: skip
        last = tier.size
        _positive(f"{where}.bytes_per_s", tier.bytes_per_s, "bytes per second and direction")
        _not_negative(f"{where}.latency_s", tier.latency_s, "seconds per message, such as 1e-5")
        for kind, share in _by_collective(f"{where}.efficiency", tier.efficiency):
            _share(f"{where}.efficiency.{kind}", share)
        for kind, factor in _by_collective(f"{where}.latency_factor", tier.latency_factor):
            _not_negative(f"{where}.latency_factor.{kind}", factor, "a factor, such as 2")
        for number, share in tier.group_share.items():
            if not number.isdigit() or int(number) < 2:
                raise wrong(
                    f"{where}.group_share", "numbers of devices of at least 2", number,
                    'give shares as {"2": 0.2, "4": 0.7}',
                )  # fmt: skip
            _share(f"{where}.group_share.{number}", share)


def _by_collective(name: str, given: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """What is given by kind of collective."""
    for kind, value in given.items():
        if kind not in COLLECTIVE_KINDS:
            raise wrong(
                name, f"kinds among {', '.join(COLLECTIVE_KINDS)}", kind,
                f"rename or remove it{did_you_mean(kind, COLLECTIVE_KINDS)}",
            )  # fmt: skip
        yield kind, value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Words for an error: the known names that are like a wrong one; empty if none is."""
    names = sorted(known)
    close = [n for n in names if n.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def wrong(name: str, expected: str, got: object, cure: str) -> OptionError:
    """The error for a field, to be raised."""
    return OptionError(f"{name}: expected {expected} but got {got!r}; {cure}")


def _positive(name: str, value: float, meaning: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise wrong(name, "a positive number", value, f"give {meaning}")


def _not_negative(name: str, value: float, meaning: str) -> None:
    if not (value >= 0 and math.isfinite(value)):
        raise wrong(name, "zero or a positive number", value, f"give {meaning}")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise wrong(name, "a share above 0 and at most 1", value, "divide percentages by 100")
