"""Cluster files and presets, which are files that come with the package."""

from __future__ import annotations

from dataclasses import fields
from importlib import resources
from typing import Any

import msgspec

from autoshard.cluster.checks import check, did_you_mean, wrong
from autoshard.cluster.hardware import CLUSTER_VERSION, Cluster, Device, Tier
from autoshard.errors import OptionError


def presets() -> tuple[str, ...]:
    """Names of the clusters that come with the package, sorted."""
    folder = resources.files("autoshard.cost_models")
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(n.removesuffix(".json") for n in names if n.endswith(".json")))


def decode(data: bytes, origin: str) -> Cluster:
    """A cluster from the text of its file.

    Args:
        origin: where that is from, for errors.

    Raises:
        OptionError: naming the field that is missing, unknown or out of range.
    """
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
            raise wrong(
                f"tiers[{index}]", f"a tier of preset {of} ({', '.join(there)})", name,
                "name one of them, or give the tier itself",
            )  # fmt: skip
        tiers[index] = there[wanted]


def _preset(name: str, where: str) -> dict[str, Any]:
    """The document of a preset that gives all figures itself."""
    if name not in presets():
        raise wrong(
            where, "an object, or the name of a preset", name,
            f"presets are: {', '.join(presets())}{did_you_mean(name, presets())}",
        )  # fmt: skip
    document: dict[str, Any] = msgspec.json.decode(preset_bytes(name))
    _like_presets(document)
    return document


def preset_bytes(name: str) -> bytes:
    """The file of a preset."""
    return resources.files("autoshard.cost_models").joinpath(f"{name}.json").read_bytes()


def _known_fields(document: dict[str, Any], kind: type, where: str) -> None:
    known = {f.name for f in fields(kind)}
    for name, item in document.items():
        if name not in known:
            raise OptionError(
                f"expected fields among {', '.join(sorted(known))} but got {where + name!r}"
                f"{did_you_mean(name, known)}; rename or remove it"
            )
        if name == "device" and isinstance(item, dict):
            _known_fields(item, Device, "device.")
        if name == "tiers" and isinstance(item, list):
            for index, tier in enumerate(item):
                if isinstance(tier, dict):
                    _known_fields(tier, Tier, f"tiers[{index}].")
