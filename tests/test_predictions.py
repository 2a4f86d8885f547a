"""What the benchmark of predictions makes of its measurements."""

from __future__ import annotations

import pytest

from benchmarks.hand_tuned import Row
from benchmarks.predictions import layout_of, show, summary


def row(name: str, predicted_s: float, measured_s: float) -> Row:
    return Row(
        name=name, mesh="", details="", predicted_s=predicted_s, measured_s=measured_s,
        to_best=1.0, spread=0.0,
    )  # fmt: skip


ROWS = [row("dp2", 1.1, 1.0), row("tp2", 1.6, 2.0), row("pp2", 1.5, 3.0)]
LAYOUTS = [layout_of("gpt2", 2, one) for one in ROWS]


def test_errors_are_relative_to_what_was_measured() -> None:
    assert [one.error for one in LAYOUTS] == pytest.approx([0.1, -0.2, -0.5])
    found = summary(LAYOUTS)
    assert found["layouts"] == 3
    assert found["median_abs_rel_err"] == pytest.approx(0.2)
    assert found["median_rel_err"] == pytest.approx(-0.2)
    assert found["p90_abs_rel_err"] == pytest.approx(0.5)


def test_order_counts_pairs_of_one_model_and_number_of_processes() -> None:
    assert summary(LAYOUTS)["pairs_in_order"] == pytest.approx(2 / 3)  # pp2 before tp2 is wrong
    other = layout_of("gpt2", 4, row("dp4", 9.0, 0.1))
    assert summary([*LAYOUTS, other])["pairs_in_order"] == pytest.approx(2 / 3)


def test_the_table_names_every_layout(capsys: pytest.CaptureFixture[str]) -> None:
    show(LAYOUTS)
    text = capsys.readouterr().out
    assert all(name in text for name in ("dp2", "tp2", "pp2", "median error 20.0%"))
