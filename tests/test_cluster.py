"""Clusters: presets, files, their errors, and which links a group uses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard import cluster as clusters
from autoshard.cluster import Cluster, Tier, find, link
from autoshard.errors import OptionError


def _document() -> dict[str, Any]:
    device = {
        "name": "d", "memory_bytes": 8, "bytes_per_s": 1.0, "flops_per_s": {"bf16": 1.0},
        "matmul_efficiency": 1.0, "memory_efficiency": 1.0, "launch_s": 0.0,
    }  # fmt: skip
    tiers = [{"name": "all", "size": 0, "bytes_per_s": 1.0, "latency_s": 0.0}]
    return {"schema_version": 1, "name": "c", "device": device, "tiers": tiers}


def _load(document: object, folder: Path) -> Cluster:
    path = folder / "cluster.json"
    path.write_text(json.dumps(document))
    return Cluster.load(path)


def _set(document: dict[str, Any], where: str, value: object) -> dict[str, Any]:
    *path, last = where.split(".")
    target: Any = document
    for key in path:
        target = target[int(key)] if key.isdigit() else target[key]
    target[int(last) if last.isdigit() else last] = value
    return document


def test_every_preset_loads_and_names_its_sources() -> None:
    expected = {"v100-16", "v100-32", "a100-40", "a100-80", "h100", "h200", "b200", "mi300x", "cpu"}
    assert expected <= set(clusters.presets())
    for name in clusters.presets():
        found = find(name)
        assert found.name == name
        assert len(found.source) > 40, f"{name} does not say where its figures are from"


@pytest.mark.parametrize(
    ("name", "device", "network_bytes_per_s"),
    [
        ("dgx-a100", "a100-80", 200e9 / 8), ("dgx-h100", "h100", 400e9 / 8),
        ("dgx-h200", "h200", 400e9 / 8), ("dgx-b200", "b200", 400e9 / 8),
        ("gb200-nvl72", "b200", 400e9 / 8), ("8xv100", "v100-32", 4 * 100e9 / 8 / 8),
        ("8xv100-ethernet", "v100-16", 25e9 / 8 / 8),
        ("8xa100-ethernet", "a100-40", 400e9 / 8 / 8), ("8xa100-pairs", "a100-80", 200e9 / 8 / 8),
    ],
)  # fmt: skip
def test_cluster_presets_have_their_devices_and_cards(
    name: str, device: str, network_bytes_per_s: float
) -> None:
    found = find(name)
    assert found.device == find(device).device
    assert found.tiers[-1].size == 0
    assert found.tiers[-1].bytes_per_s == pytest.approx(network_bytes_per_s)
    assert found.tiers[-2].size == (72 if name == "gb200-nvl72" else 8)
    rates = [tier.bytes_per_s for tier in found.tiers]
    assert rates == sorted(rates, reverse=True)


def test_a_file_may_name_what_a_preset_has(tmp_path: Path) -> None:
    h100 = find("h100")
    rack = {"name": "rack", "size": 64, "bytes_per_s": 1e10, "latency_s": 1e-5}
    document = {**_document(), "device": "h100", "tiers": ["h100.nvlink", rack]}
    found = _load(document, tmp_path)
    assert found.device == h100.device
    assert found.tiers == (h100.tiers[0], Tier(**rack))  # type: ignore[arg-type]
    assert _load({**document, "tiers": ["dgx-h100.nvlink", rack]}, tmp_path) == found


def test_no_more_devices_than_the_cluster_has() -> None:
    h100 = find("h100")
    small = replace(h100, tiers=(h100.tiers[0], replace(h100.tiers[1], size=64)))
    clusters.check_size(small, 64)
    clusters.check_size(h100, 1 << 14)
    with pytest.raises(OptionError, match=r"world_size is 128 but cluster 'h100' has 64 devices"):
        clusters.check_size(small, 128)


def test_saved_clusters_load_equal(tmp_path: Path) -> None:
    for name in clusters.presets():
        path = tmp_path / f"{name}.json"
        find(name).save(path)
        assert find(path) == find(str(path)) == find(name)


def test_the_documented_file_loads(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "cluster-files.md"
    examples = re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(examples) == 1
    assert _load(json.loads(examples[0]), tmp_path).name == "our-h100"


def test_no_cluster_is_this_machine() -> None:
    found = find(None)
    assert found.device.kind in ("cpu", "cuda")
    assert found == find("this-machine") == clusters.this_machine()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("device.memory_bytes", -1, r"device\.memory_bytes: expected a positive number but got -1"),
        ("device.bytes_per_s", 0, r"device\.bytes_per_s: expected a positive number"),
        ("device.flops_per_s", {}, r"device\.flops_per_s: expected a peak for at least one dtype"),
        ("device.flops_per_s", {"bf61": 1.0}, r"got 'bf61'.*did you mean 'bf16'"),
        ("device.flops_per_s.bf16", -2.0, r"flops_per_s\.bf16: expected a positive number"),
        ("device.matmul_efficiency", 70, r"a share above 0 and at most 1 but got 70.*100"),
        ("device.launch_s", -1e-6, r"device\.launch_s: expected zero or a positive number"),
        ("device.kind", "gpu", r"device\.kind: expected cuda or cpu but got 'gpu'"),
        ("device.memory_bytes", "80GB", r"Expected `int`, got `str` - at `\$\.device\.memory"),
        ("device.memory", 3, r"got 'device\.memory' \(did you mean 'memory_bytes'"),
        ("tiers", [], r"tiers: expected at least one tier"),
        ("tiers.0.latency_s", -1.0, r"tiers\[0\]\.latency_s: expected zero or a positive number"),
        ("tiers.0.size", 1, r"tiers\[0\]\.size: expected more than 1 devices"),
        ("tiers.0.speed", 1, r"got 'tiers\[0\]\.speed'"),
        ("tiers.0.efficiency", {"all_reduse": 1.0}, r"did you mean 'all_reduce'"),
        ("tiers.0.efficiency", {"send": 1.5}, r"efficiency\.send: expected a share"),
        ("tiers.0.latency_factor", {"sent": 1.5}, r"latency_factor: .*did you mean 'send'"),
        ("tiers.0.latency_factor", {"send": -1}, r"latency_factor\.send: expected zero or a pos"),
        ("device.share", 2, r"device\.share: expected a share above 0 and at most 1 but got 2"),
        ("device", "h10", r"device: expected an object, or the name of a preset but got 'h10'"),
        ("device", 3, r"Expected `object`, got `int` - at `\$\.device`"),
        (
            "tiers.0",
            "h100.nvlnk",
            r"tiers\[0\]: expected a tier of preset h100 \(nvlink, network\)",
        ),
        ("tiers.0", "nvlink", r"tiers\[0\]: expected an object, or the name of a preset but got"),
        ("device.flops_per_s", {"bf16": "fast"}, r"Expected `float`, got `str` - at"),
        ("tiers.0.bytes_per_s", 0.0, r"tiers\[0\]\.bytes_per_s: expected a positive number"),
        ("schema_version", 7, r"expected schema_version 1 .* got 7"),
    ],
)
def test_errors_name_the_field(where: str, value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        _load(_set(_document(), where, value), tmp_path)
    assert "cluster.json" in str(caught.value)


def test_the_document_of_the_error_tests_is_right(tmp_path: Path) -> None:
    assert _load(_document(), tmp_path).name == "c"


def test_missing_field_is_named(tmp_path: Path) -> None:
    document = _document()
    del document["device"]["launch_s"]
    with pytest.raises(OptionError, match=r"missing required field `launch_s`"):
        _load(document, tmp_path)


def test_tiers_must_grow(tmp_path: Path) -> None:
    tier = dict(_document()["tiers"][0], size=8)
    for sizes in ((8, 4), (0, 8), (8, 8)):
        document = dict(_document(), tiers=[dict(tier, size=s) for s in sizes])
        with pytest.raises(OptionError, match=r"tiers\[\d\]\.size"):
            _load(document, tmp_path)


def test_tiers_hold_whole_units_of_the_one_inside(tmp_path: Path) -> None:
    tier = _document()["tiers"][0]
    document = dict(_document(), tiers=[dict(tier, size=8), dict(tier, size=20)])
    with pytest.raises(OptionError, match=r"tiers\[1\]\.size: expected a multiple of 8.*got 20"):
        _load(document, tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(_document())[:40])
    with pytest.raises(OptionError, match="expected JSON in cluster file"):
        find(path)


@pytest.mark.parametrize(
    ("given_name", "message"),
    [
        ("h10", r"did you mean 'h100'.*presets are: 8xa100-.*v100-32"),
        ("v100", r"did you mean 'v100-16' or 'v100-32'"),
        ("nothing-like-it", r"but got 'nothing-like-it'; presets are"),
        ("no/such.json", r"expected a readable cluster file but got 'no/such\.json'"),
    ],
)
def test_unknown_names(given_name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find(given_name)


def test_wrong_type_of_cluster() -> None:
    with pytest.raises(OptionError, match="a preset name, a cluster file or a Cluster but got int"):
        find(8)  # type: ignore[arg-type]


def test_tier_of_a_span() -> None:
    h100 = find("h100")
    assert [h100.tier_of(s).name for s in (1, 8, 9, 4096)] == ["nvlink"] * 2 + ["network"] * 2
    small = replace(h100, tiers=(h100.tiers[0],))
    with pytest.raises(OptionError, match="groups of at most 8 devices"):
        small.tier_of(16)


def test_links_of_groups_on_nodes_of_eight() -> None:
    h100 = find("h100")
    nvlink, network = h100.tiers
    inside = link(h100, 8)
    assert [(lv.size, lv.members) for lv in inside.levels] == [(8, 1)]
    assert inside.bytes_per_s == nvlink.bytes_per_s

    whole_nodes = link(h100, 32)
    assert [(lv.size, lv.members) for lv in whole_nodes.levels] == [(8, 1), (4, 8)]
    assert whole_nodes.bytes_per_s == min(nvlink.bytes_per_s, 8 * network.bytes_per_s)

    strided = link(h100, 4, stride=8)
    assert [(lv.size, lv.members) for lv in strided.levels] == [(4, 1)]
    assert strided.bytes_per_s == network.bytes_per_s

    mixed = link(h100, 8, stride=2)
    assert [(lv.size, lv.members) for lv in mixed.levels] == [(4, 1), (2, 4)]
    assert mixed.bytes_per_s == 4 * network.bytes_per_s


def test_links_without_a_switch_join_some_devices_only() -> None:
    """8 V100 in a hybrid cube mesh: a pair has one of a device's six links, a node all."""
    rates = [link(find("v100-16"), size).levels[0].bytes_per_s for size in (2, 3, 4, 8)]
    assert rates == pytest.approx([24e9, 99e9, 99e9, 150e9])


def test_a_group_of_one_needs_no_link() -> None:
    alone = link(find("h100"), 1, stride=64)
    assert alone.levels == ()
    assert alone.bytes_per_s == math.inf
    assert alone.latency_s == 0


@given(size=st.integers(1, 64), stride=st.integers(1, 64), node=st.integers(2, 16))
def test_levels_hold_the_whole_group(size: int, stride: int, node: int) -> None:
    base = find("h100")
    fast = Tier(name="node", size=node, bytes_per_s=2.0, latency_s=0.0)
    slow = Tier(name="net", size=0, bytes_per_s=1.0, latency_s=0.0)
    found = link(replace(base, tiers=(fast, slow)), size, stride)
    assert math.prod(lv.size for lv in found.levels) >= size
    assert all(lv.size > 1 for lv in found.levels)
    assert found.latency_s == 0


def test_groups_of_devices_joined_directly_have_their_part_of_the_links() -> None:
    """Of 8 devices, every second one: 3 of a device's 7 neighbours, whoever has most links."""
    mesh = Tier(
        name="mesh", size=8, bytes_per_s=1.0, latency_s=0.0, group_share={"2": 0.16, "4": 0.66}
    )
    assert [mesh.rate(n) for n in (2, 4, 8)] == [0.16, 0.66, 1.0]
    assert mesh.rate(4, stride=2) == pytest.approx(3 / 7)
    assert mesh.rate(2, stride=2) == 0.16
    switch = replace(mesh, group_share={})
    assert switch.rate(4, stride=2) == 1.0
