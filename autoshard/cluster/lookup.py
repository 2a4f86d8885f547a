"""The cluster that a user means, and the present machine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from autoshard.cluster.checks import check, did_you_mean
from autoshard.cluster.files import decode, preset_bytes, presets
from autoshard.cluster.hardware import Cluster
from autoshard.errors import OptionError


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
        return decode(preset_bytes(name), f"preset {name}")
    if os.sep in name or name.endswith(".json") or Path(name).is_file():
        return Cluster.load(name)
    raise OptionError(
        f"expected a cluster preset or file but got {name!r}"
        f"{did_you_mean(name.lower(), presets())}; "
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
