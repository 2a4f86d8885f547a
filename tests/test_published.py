"""The benchmark on published runs: reading rows, expressing layouts, scoring."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoshard.errors import OptionError
from benchmarks.published.__main__ import main
from benchmarks.published.layouts import (
    Unpredictable,
    layout_of,
    lightest_stages,
    shape_of,
    stages_of,
)
from benchmarks.published.machines import cluster_of
from benchmarks.published.metrics import (
    Confusion,
    kendall_tau,
    memory_error,
    quantile,
    scores,
    time_error,
)
from benchmarks.published.models import Decoder, Shape
from benchmarks.published.predict import Outcome, Prediction, Predictor, Skipped, analytic
from benchmarks.published.rows import Row, read_rows
from benchmarks.published.stacks import stack_of

CELLS = {
    "id": "small-1", "family": "small", "source": "a table", "year": "2022",
    "accelerator": "A100-80", "gpus": "4", "gpus_per_node": "8",
    "intra_node_link": "NVLink3 NVSwitch 300GB/s/dir/GPU", "inter_node_link": "none",
    "layers": "2", "hidden": "256", "heads": "4", "ffn": "1024", "vocab": "512", "seq": "128",
    "global_batch": "16", "microbatch": "2", "tp": "2", "pp": "1", "vpp": "1", "cp": "1",
    "ep": "1", "dp": "2", "zero_stage": "0", "seq_parallel": "0", "recompute": "full",
    "precision": "fp16", "schedule": "none", "status": "ok", "step_time_s": "0.01",
    "rank_group": "g", "trust": "A", "ffn_gated": "0",
}  # fmt: skip


def written(path: Path, *rows: dict[str, str]) -> Path:
    """A csv file of rows that differ from ``CELLS`` as given."""
    names = list({**CELLS, **{name: "" for row in rows for name in row}})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({**CELLS, **row} for row in rows)
    return path


def row_with(**cells: object) -> Row:
    numbers = ("source", "family", "accelerator", "status", "schedule", "precision", "recompute")
    values: dict[str, object] = {
        name: int(text) if text.isdigit() and name not in numbers else text
        for name, text in CELLS.items()
    }
    return Row(**{**values, "step_time_s": 0.01, **cells})  # type: ignore[arg-type]


def prediction(time_s: float, *, peak: int = 10, usable: int = 100) -> Prediction:
    return Prediction(
        time_s=time_s, peak_bytes=peak, usable_bytes=usable, parts={"compute": time_s},
        layout="", reported_bytes=peak, memory_unit_bytes=1.0,
    )  # fmt: skip


class TestRows:
    def test_reads_what_is_there(self, tmp_path: Path) -> None:
        (row,) = read_rows(written(tmp_path / "a.csv", {"microbatch": "", "mfu": "0.5"}))
        assert (row.gpus, row.microbatch, row.mfu, row.recompute) == (4, None, 0.5, "full")

    @pytest.mark.parametrize(
        ("cells", "names"),
        [
            ({"step_time_ms": "3"}, ("'step_time_ms'", "convert it to seconds")),
            ({"hiden": "3"}, ("'hiden'", "did you mean 'hidden'")),
            ({"gpus": "four"}, ("line 2 (small-1)", "column gpus", "a whole number", "'four'")),
            ({"step_time_s": "10 ms"}, ("column step_time_s", "'10 ms'", "leave units")),
            ({"hidden": "-256"}, ("column hidden", "positive")),
            ({"microbatch": "1.5"}, ("column microbatch", "a whole number")),
            ({"step_time_s": "nan"}, ("column step_time_s", "positive number", "'nan'")),
            ({"status": "fine"}, ("column status", "ok, oom, error", "'fine'")),
            ({"mfu": "45"}, ("column mfu", "divide percentages by 100")),
            ({"zero_stage": "4"}, ("column zero_stage", "0, 1, 2 or 3")),
            ({"dp": "4"}, ("column gpus", "pp=1 x dp=4 x tp=2 x cp=1 = 8", "got 4")),
            ({"family": ""}, ("column family", "fill it in")),
        ],
    )
    def test_bad_input(self, tmp_path: Path, cells: dict[str, str], names: tuple[str, ...]) -> None:
        with pytest.raises(OptionError) as error:
            read_rows(written(tmp_path / "a.csv", cells))
        for name in names:
            assert name in str(error.value)

    def test_ids_are_unique(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="'small-1' twice"):
            read_rows(written(tmp_path / "a.csv", {}, {}))

    def test_missing_column(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text("id,family\na,b\n")
        with pytest.raises(OptionError, match="expected a column 'accelerator'"):
            read_rows(path)

    def test_ragged_line(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.csv", {})
        path.write_text(path.read_text().rstrip("\n") + ",more\n")
        with pytest.raises(OptionError, match="as many cells as the header"):
            read_rows(path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="readable csv file"):
            read_rows(tmp_path / "none.csv")

    def test_time_from_tokens(self) -> None:
        row = row_with(step_time_s=None, tokens_per_s_per_gpu=128.0)
        assert row.time_s == 16 * 128 / (128.0 * 4)
        assert row_with(status="oom").time_s is None


class TestLayouts:
    def test_pins(self) -> None:
        row = row_with(pp=2, dp=1, tp=2, schedule="1f1b", zero_stage=0)
        stack = stack_of(row)
        layout = layout_of(row, shape_of(row, stack), stack)
        pins = layout.pins
        assert (pins.pp, pins.dp, pins.tp, pins.micro_batch_size) == (2, 1, 2, 2)
        assert (pins.stages, pins.recompute, pins.data_parallel) == ((2, 2), "full", "ddp")
        assert pins.sequence_parallel is False
        assert pins.sharding == {
            "*.attention.qkv.*.weight": "S(0;256,256,256)", "*.attention.out.weight": "S(1)",
            "*.feed_forward.up.weight": "S(0)", "*.feed_forward.down.weight": "S(1)",
            "embedding.weight": "S(0)",
        }  # fmt: skip
        assert layout.open == ()

    def test_experts_are_split_by_width_or_dealt_over_tensor_ranks_too(self) -> None:
        cells = {"experts": 8, "topk": 2, "ffn_moe": 128, "ffn_gated": 1, "tp": 2, "dp": 4, "ep": 4,
            "gpus": 8}  # fmt: skip
        for notes, ep, up in (("", 4, "S(1;128,128)"), ("MCore+Folding; ETP=1", 2, "S(0)")):
            row = row_with(**cells, notes=notes)
            stack = stack_of(row)
            pins = layout_of(row, shape_of(row, stack), stack).pins
            assert (pins.ep, pins.sharding["*.feed_forward.up"]) == (ep, up)
        row = row_with(**{**cells, "tp": 8, "dp": 1}, notes="ETP=1")
        with pytest.raises(Unpredictable, match="tp=8 is no divisor"):
            layout_of(row, shape_of(row, stack_of(row)), stack_of(row))

    def test_interleaving_of_unknown_degree_is_as_deep_as_layers_divide(self) -> None:
        row = row_with(layers=12, pp=2, dp=1, vpp=None, schedule="interleaved?")
        stack = stack_of(row)
        pins = layout_of(row, shape_of(row, stack), stack).pins
        assert (pins.schedule, pins.virtual_stages) == ("interleaved-1f1b", 6)

    def test_what_is_left_open(self) -> None:
        row = row_with(microbatch=None, recompute="")
        stack = stack_of(row)
        layout = layout_of(row, shape_of(row, stack), stack)
        assert layout.open == ("micro_batch_size", "recompute")

    @pytest.mark.parametrize(
        ("cells", "reason"),
        [
            ({"precision": "int4"}, "precision int4"),
            ({"pp": 2, "dp": 1, "schedule": "dualpipe"}, "schedule dualpipe"),
            ({"global_batch": None, "relative_throughput": 2.0}, "only relative throughput"),
            ({"recompute": "some"}, "recompute some"),
        ],
    )
    def test_reasons(self, cells: dict[str, object], reason: str) -> None:
        result = Predictor().predict(row_with(**cells))
        assert isinstance(result, Skipped)
        assert reason in result.reason

    def test_no_shape(self) -> None:
        row = row_with(hidden=None)
        with pytest.raises(Unpredictable, match="shape is not printed"):
            shape_of(row, stack_of(row))

    def test_stages_of_about_equally_many_parameters(self) -> None:
        """A head as large as two layers takes their place."""
        assert lightest_stages((2, *[1] * 12, 2), 4) == (3, 4, 4, 3)
        assert lightest_stages((2, *[1] * 12, 2), 1) == (14,)
        assert lightest_stages((5, 1, 1, 1, 1), 2) == (1, 4)

    def test_weights_split_by_their_largest_dims(self) -> None:
        row = row_with(tp=None, dp=None, notes="heuristic: shard largest tensor dim")
        pins = layout_of(row, shape_of(row, stack_of(row)), stack_of(row)).pins
        assert (pins.tp, pins.dp, pins.sharding["embedding.weight"]) == (row.gpus, 1, "S(0)")

    def test_a_loss_on_gathered_logits(self) -> None:
        row = row_with(family="aleph-x", tp=2, dp=1)
        stack = stack_of(row)
        shape = shape_of(row, stack)
        assert layout_of(row, shape, stack).pins.sharding["head.cross_entropy"] == "R"
        apart = replace(stack, whole_logits=False)
        assert "head.cross_entropy" not in layout_of(row, shape, apart).pins.sharding

    def test_gradients_reduced_whole_move_twice_as_much(self) -> None:
        parts = []
        for whole in (False, True):
            row = row_with(family="aleph-x", dp=2, zero_stage=1)
            stack = stack_of(row)
            stack = replace(stack, software=replace(stack.software, reduces_whole=whole))
            predictor = Predictor()
            shape = shape_of(row, stack)
            found = predictor._predicted(
                row, stack, layout_of(row, shape, stack), cluster_of(row),
                predictor._program(row, shape), analytic,
            )  # fmt: skip
            parts.append(found.parts["gradient_reduction"])
        assert parts[1] > 1.5 * parts[0]

    @pytest.mark.parametrize(
        ("layers", "pp", "stages"),
        [(8, 4, (3, 2, 2, 3)), (22, 8, (3, 3, 3, 3, 3, 3, 3, 3)), (7, 2, (5, 4)), (5, 1, (7,))],
    )
    def test_stages(self, layers: int, pp: int, stages: tuple[int, ...]) -> None:
        found = stages_of(layers, pp, embeds=True)
        assert found == stages
        assert sum(found) == layers + 2

    @pytest.mark.parametrize(
        ("text", "gpus_per_node", "rate"),
        [
            ("8x HDR200 IB per node (25GB/s/GPU)", 8, 25e9),
            ("4x HDR200 IB per node (100GB/s/node, 12.5GB/s/GPU)", 8, 12.5e9),
            ("25Gb/s per node (p3.16xlarge, 0.4GB/s/GPU)", 8, 0.4e9),
            ("EFA class, 50GB/s/GPU nominal (not named)", 8, 50e9),
            ("400Gb/s RDMA per GPU (50GB/s)", 8, 50e9),
            ("RoCE (bandwidth not stated)", 8, 25e9),
            ("two cards, 24 GB/s/node", 4, 6e9),
        ],
    )
    def test_links(self, text: str, gpus_per_node: int, rate: float) -> None:
        cluster = cluster_of(row_with(inter_node_link=text, gpus_per_node=gpus_per_node))
        assert cluster.tiers[-1].bytes_per_s == pytest.approx(rate)
        assert cluster.tiers[0].size == gpus_per_node
        assert cluster.tiers[0].bytes_per_s == 300e9

    def test_unknown_accelerator(self) -> None:
        result = Predictor().predict(row_with(accelerator="TPUv3"))
        assert isinstance(result, Skipped)
        assert "TPUv3" in result.reason


class TestModels:
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_attention_is_the_same_however_it_runs(self, fused: bool, kv_heads: int) -> None:
        shape = Shape(
            layers=1, hidden=32, heads=4, kv_heads=kv_heads, ffn=64, vocab=50, sequence=8,
            gated=True, tied=False, rotary=True, rms_norm=True, bias=False, fused_attention=fused,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Decoder(shape)
        other = Decoder(replace(shape, fused_attention=not fused))
        other.load_state_dict(model.state_dict())
        tokens = torch.randint(50, (2, 8))
        torch.testing.assert_close(model(tokens, tokens), other(tokens, tokens))

    def test_projections_are_the_same_in_one_product(self) -> None:
        shape = Shape(
            layers=1, hidden=32, heads=4, kv_heads=2, ffn=64, vocab=50, sequence=8, gated=True,
            tied=False, rotary=True, rms_norm=True, bias=False,
        )  # fmt: skip
        torch.manual_seed(0)
        apart, joint = Decoder(shape), Decoder(replace(shape, fused_projections=True))
        state = apart.state_dict()
        for of, names in (("attention.qkv", "qkv"), ("feed_forward.up", ("gate", "up"))):
            parts = [state.pop(f"layers.0.{of}.products.{n}.weight") for n in names]
            state[f"layers.0.{of}.product.weight"] = torch.cat(parts)
        joint.load_state_dict(state)
        tokens = torch.randint(50, (2, 8))
        torch.testing.assert_close(apart(tokens, tokens), joint(tokens, tokens))

    def test_a_position_sees_none_after_it(self) -> None:
        shape = Shape(
            layers=2, hidden=16, heads=2, kv_heads=2, ffn=32, vocab=20, sequence=6,
            fused_attention=False,
        )  # fmt: skip
        torch.manual_seed(0)
        core = Decoder(shape).layers[0]
        x = torch.randn(1, 6, 16)
        changed = x.clone()
        changed[0, 4:] += 1.0
        same = core(x, None)[0, :4], core(changed, None)[0, :4]
        torch.testing.assert_close(*same)

    @pytest.mark.parametrize(
        ("gated", "per_layer"),
        [(False, 12 * 16**2 + 13 * 16), (True, 4 * 16**2 + 3 * 16 * 64 + 2 * 16)],
    )
    def test_parameters(self, gated: bool, per_layer: int) -> None:
        def count(layers: int) -> int:
            shape = Shape(
                layers=layers, hidden=16, heads=2, kv_heads=2, ffn=64, vocab=20, sequence=6,
                gated=gated, rms_norm=gated, bias=not gated,
            )  # fmt: skip
            return sum(p.numel() for p in Decoder(shape).parameters())

        assert count(3) - count(2) == per_layer


class TestMetrics:
    def outcomes(self, *pairs: tuple[float, float], **cells: object) -> list[Outcome]:
        return [
            Outcome(row_with(id=str(i), step_time_s=measured, **cells), prediction(predicted))
            for i, (measured, predicted) in enumerate(pairs)
        ]

    def test_errors(self) -> None:
        found = scores(self.outcomes((1.0, 1.1), (2.0, 1.0), (4.0, 4.0)))
        assert found.time_median_rel_err == pytest.approx(0.0)
        assert found.time_median_abs_rel_err == pytest.approx(0.1)
        assert found.time_p90_abs_rel_err == pytest.approx(0.42)

    def test_only_trusted_rows_are_judged(self) -> None:
        (outcome,) = self.outcomes((1.0, 2.0), trust="C")
        assert time_error(outcome) is None
        assert scores([outcome]).n == 1

    def test_regret(self) -> None:
        (ranking,) = scores(self.outcomes((1.0, 3.0), (1.2, 2.0), (5.0, 9.0))).rankings
        assert ranking.regret == pytest.approx(0.2)
        assert ranking.tau == pytest.approx(1 / 3)

    def test_ties_are_not_luck(self) -> None:
        (ranking,) = scores(self.outcomes((1.0, 2.0), (2.0, 2.0))).rankings
        assert ranking.regret == pytest.approx(0.5)
        assert ranking.tau is None

    def test_kendall(self) -> None:
        assert kendall_tau([(1, 1), (2, 2), (3, 3)]) == 1
        assert kendall_tau([(1, 3), (2, 2), (3, 1)]) == -1

    def test_quantile(self) -> None:
        assert quantile([3, 1, 2], 0.5) == 2
        assert quantile([0, 10], 0.9) == pytest.approx(9)

    def test_memory(self) -> None:
        outcome = Outcome(row_with(memory_gb=8.0), prediction(1.0, peak=10))
        assert memory_error(outcome) == pytest.approx(0.25)

    def test_confusion(self) -> None:
        rows = [("ok", 10), ("ok", 200), ("oom", 200), ("oom", 200), ("oom", 10), ("error", 10)]
        outcomes = [
            Outcome(row_with(status=status), prediction(1.0, peak=peak)) for status, peak in rows
        ]
        found = scores(outcomes).confusion
        assert found == Confusion(fits_fits=1, fits_oom=1, oom_fits=1, oom_oom=2)
        assert found.accuracy == pytest.approx(3 / 5)
        assert found.recall == pytest.approx(2 / 3)

    def test_skipped_rows_are_counted(self) -> None:
        found = scores([Outcome(row_with(), Skipped("why"))])
        assert (found.n, found.n_skipped, found.time_median_abs_rel_err) == (0, 1, None)


FIELDS = {
    "n", "n_skipped", "time_median_abs_rel_err", "time_p90_abs_rel_err", "regret_mean",
    "regret_max", "kendall_tau_mean", "oom_accuracy", "oom_recall", "memory_median_abs_rel_err",
}  # fmt: skip


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(
        tmp_path_factory.mktemp("published") / "rows.csv",
        {},
        {"id": "small-2", "tp": "1", "dp": "4", "step_time_s": "0.02"},
        {"id": "small-3", "tp": "4", "dp": "1", "seq_parallel": "1", "step_time_s": "0.03"},
        {"id": "small-4", "tp": "1", "pp": "2", "dp": "2", "schedule": "1f1b"},
        {"id": "huge-1", "family": "huge", "hidden": "32768", "layers": "32", "status": "oom",
         "step_time_s": "", "ffn": "131072", "heads": "128"},
        {"id": "odd-1", "family": "odd", "accelerator": "abacus"},
    )  # fmt: skip


class TestWhole:
    def test_command(
        self, small_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        figures, folder = tmp_path / "all.json", tmp_path / "out"
        arguments = ["--data", str(small_file), "--json", str(figures), "--out", str(folder)]
        assert main([*arguments, "--processes", "1"]) == 0
        found = json.loads(figures.read_text())
        assert set(found) == {"all", "families"}
        assert set(found["families"]) == {"small", "huge", "odd"}
        assert all(set(f) == FIELDS for f in (found["all"], *found["families"].values()))
        assert (found["all"]["n"], found["all"]["n_skipped"]) == (5, 1)
        assert found["families"]["small"]["time_median_abs_rel_err"] > 0
        assert found["all"]["oom_recall"] == 1.0
        assert found["all"]["oom_accuracy"] == 1.0
        printed = capsys.readouterr().out
        assert "abacus" in printed
        assert (folder / "scatter.png").read_bytes().startswith(b"\x89PNG")
        page = (folder / "index.html").read_text()
        assert "small-3" in page and "data:image/png" in page
        lines = {line["id"]: line for line in json.loads((folder / "rows.json").read_text())}
        assert "abacus" in lines["odd-1"]["skipped"]
        assert lines["huge-1"]["peak_bytes"] > lines["huge-1"]["usable_bytes"]
        assert "tp=4" in lines["small-3"]["layout"] and "pp=2" in lines["small-4"]["layout"]

    def test_no_such_family(self, small_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--data", str(small_file), "--families", "smal"]) == 1
        assert "names no family" in capsys.readouterr().err

    def test_priced_again_as_at_first(self, small_file: Path) -> None:
        """What a predictor remembers of other rows changes nothing."""
        rows = [row for row in read_rows(small_file) if row.family == "small"]
        together = Predictor()
        for row in rows:
            together.predict(row)
        for row in rows:
            assert together.predict(row) == Predictor().predict(row)
