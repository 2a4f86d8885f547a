"""What a plan looks like, and what it says when asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from small_plan import small_plan

from autoshard.errors import OptionError
from autoshard.plan.plan import Mesh, Plan
from autoshard.report import units
from autoshard.report.stages import equal_stages
from autoshard.report.table import as_text


def test_a_plan_prints_as_it_always_did(golden: Callable[[str, str], None]) -> None:
    golden("plan.txt", as_text(small_plan(), width=100) + "\n")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_plan_fits_its_width_and_loses_no_figure(width: int) -> None:
    text = as_text(small_plan(), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for figure in ("20.0 ms per step", "10.25 GiB per device", "7.5 % slower", "attn.qkv.weight"):
        assert figure in text


def test_str_is_the_plain_text() -> None:
    assert str(small_plan()) == as_text(small_plan())
    assert "\x1b" not in str(small_plan())


def test_a_plan_prints_to_a_pipe_as_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    small_plan().print()
    assert capsys.readouterr().out == str(small_plan()) + "\n"


def test_html_is_self_contained() -> None:
    html = small_plan()._repr_html_()
    assert "TinyModel" in html
    assert "style=" in html
    assert not re.search(r"<script|<link|https?://", html)


def test_parts_too_small_to_see_are_left_out() -> None:
    text = str(small_plan())
    section = text.split("Where the step goes")[1].split("Communication")[0]
    assert "sends" in section  # 0.01 %
    assert "optimizer" not in section  # 1e-12 s is rounding
    assert "recompute" not in section  # nothing is recomputed on the slowest stage


def test_replicated_ops_are_collapsed() -> None:
    text = as_text(small_plan(), width=200)
    (norms,) = (line for line in text.splitlines() if "layer_norm" in line)
    assert norms.split()[:2] == ["3.0", "%"]
    assert "blocks.0.ln, blocks.1.ln, blocks.2.ln" in norms
    # the two rarest of seven kinds: 0.2 % + 0.4 %
    assert "and 2 more, together 0.6 %" in text


def test_without_a_tensor_axis_no_placements_are_listed() -> None:
    plan = replace(small_plan(), mesh=Mesh(pp=2, dp=4, tp=1))
    assert "tensor ranks" not in str(replace(plan, replicated=()))


def test_equal_stages_are_one_row() -> None:
    plan = small_plan()
    middle = plan.stages[0]
    stages = (middle, middle, middle, plan.stages[1])
    ranges = [(first, last) for first, last, _ in equal_stages(replace(plan, stages=stages))]
    assert ranges == [(0, 2), (3, 3)]


@pytest.mark.parametrize(
    ("num", "words"),
    [(1, "splitting the batch over ranks stays exact"), (4, "micro-batches were allowed")],
)
def test_coupled_samples_are_explained(num: int, words: str) -> None:
    plan = replace(small_plan(), global_batch_size=4 * num)
    assert plan.num_micro_batches == num
    assert words in " ".join(str(plan).split())


# -- explain --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mlp.up.weight", ["of layer Block, on stage 0, 1", "S(0): each rank has its part along"]),
        ("model.blocks.2.mlp.up.weight", ["mlp.up.weight of layer Block", "on stage 1"]),
        ("attn.qkv.weight", ["each of the blocks [64, 64, 64] on its own"]),
        ("ln.weight", ["V: whole on every rank", "summed once per step"]),
        ("op_1", ["op_1 of layer Block", "tensor axis (2): S(2), S(2) -> S(2)"]),
        ("Block.op_1", ["op_1 of layer Block"]),
        ("Block", ["on stage 0: 2 of it, recompute full", "on stage 1: 2 of it, recompute none"]),
        ("model.blocks.0", ["layer Block", "on stage 0: 1 of it"]),
        ("blocks.0.ln", ["runs whole on every tensor rank", "1.0 % of the compute"]),
    ],
)
def test_explain(name: str, words: list[str]) -> None:
    text = small_plan().explain(name)
    for word in words:
        assert word in text


def test_explain_names_a_tied_parameter_in_every_layer() -> None:
    text = small_plan().explain("embed.weight")
    assert "of layer embeddings, on stage 0" in text
    assert "of layer head, on stage 1" in text


def test_explain_of_an_unknown_name_suggests_known_ones() -> None:
    with pytest.raises(OptionError, match=r"'mlp\.up\.wieght'; did you mean mlp\.up\.weight"):
        small_plan().explain("mlp.up.wieght")


# -- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1.5 * 2**30, "1.50 GiB"),
        (643.5 * 2**20, "644 MiB"), (5 * 2**50, "5120 TiB"),
    ],
)  # fmt: skip
def test_bytes(value: float, text: str) -> None:
    assert units.nbytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00 s"), (1.234, "1.23 s"), (94.86, "94.9 s"), (1234.0, "1234 s"),
        (0.0456, "45.6 ms"), (7.8e-6, "7.80 us"), (3e-9, "0.00 us"),
    ],
)  # fmt: skip
def test_seconds(value: float, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (1e-5, "< 0.1 %"), (0.0312, "3.1 %"), (1.0, "100.0 %")]
)
def test_shares(share: float, text: str) -> None:
    assert units.percent(share) == text


def test_a_plan_of_the_report_is_a_valid_plan(tmp_path: pytest.TempPathFactory) -> None:
    path = small_plan().save(f"{tmp_path}/plan.json")
    assert Plan.load(path) == small_plan()
