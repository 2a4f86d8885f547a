"""Rows of a file of published measurements, checked as they are read.

The columns are those of :data:`COLUMNS`; ``id``, ``family``, ``accelerator``, ``gpus`` and
``status`` are required, an empty cell means that the source does not say. Times are in seconds,
memory in 10^9 bytes, sequence in tokens, batches in samples.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from autoshard.errors import OptionError

STATUSES = ("ok", "oom", "error")
TRUSTS = ("A", "B", "C", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured run; ``None`` and ``""`` where its source does not say.

    Attributes:
        status: ``ok``, ``oom`` (out of memory: no time) or ``error``.
        rank_group: rows that differ in layout alone have the same one.
        trust: ``A`` (complete), ``B`` (an item inferred), ``C`` (sanity only).
        microbatch: samples of one micro-batch on one data-parallel rank.
        vpp: chunks of layers per pipeline stage (virtual stages).
        memory_gb: as its source prints it.
        relative_throughput: of sources that print nothing else.
    """

    id: str
    family: str
    accelerator: str
    gpus: int
    status: str
    source: str = ""
    source_kind: str = ""
    year: int | None = None
    gpus_per_node: int | None = None
    intra_node_link: str = ""
    inter_node_link: str = ""
    model: str = ""
    params_b: float | None = None
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    experts: int | None = None
    topk: int | None = None
    seq: int | None = None
    global_batch: int | None = None
    microbatch: int | None = None
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    ep: int | None = None
    dp: int | None = None
    zero_stage: int | None = None
    seq_parallel: int | None = None
    recompute: str = ""
    precision: str = ""
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    tokens_per_s_per_gpu: float | None = None
    step_time_s: float | None = None
    memory_gb: float | None = None
    schedule: str = ""
    notes: str = ""
    rank_group: str = ""
    role: str = ""
    trust: str = ""
    core: int | None = None
    ffn_gated: int | None = None
    ffn_moe: int | None = None
    shared_expert_ffn: int | None = None
    tflops_published: float | None = None
    tflops_kind: str = ""
    relative_throughput: float | None = None
    derived: str = ""
    tflops_recalc: float | None = None
    check_ratio: float | None = None
    repeat_of: str = ""

    @property
    def time_s(self) -> float | None:
        """Seconds per step, from the tokens per second where those are what was printed."""
        if self.status != "ok":
            return None
        if self.step_time_s is not None:
            return self.step_time_s
        if None in (self.tokens_per_s_per_gpu, self.global_batch, self.seq):
            return None
        tokens = self.global_batch * self.seq  # type: ignore[operator]
        return tokens / (self.tokens_per_s_per_gpu * self.gpus)  # type: ignore[operator]


COLUMNS = {field.name: str(field.type) for field in fields(Row)}
REQUIRED = ("id", "family", "accelerator", "gpus", "status")
_MAY_BE_ZERO = ("zero_stage", "seq_parallel", "core", "ffn_gated", "experts", "topk", "ffn_moe",
    "shared_expert_ffn",
)  # fmt: skip
_FLAGS = ("seq_parallel", "core", "ffn_gated")
_UNITS = {
    "step_time": "seconds, as step_time_s", "time": "seconds, as step_time_s",
    "memory": "10^9 bytes, as memory_gb", "tokens_per_s": "tokens_per_s_per_gpu",
}  # fmt: skip


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file.

    Raises:
        OptionError: the file cannot be read, or has a column, unit or value that makes no sense;
            names the row, the column and the cure.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            _check_columns(reader.fieldnames or (), str(path))
            found = [_row(cells, f"{path}, line {reader.line_num}") for cells in reader]
    except OSError as error:
        raise OptionError(
            f"expected a readable csv file of measurements but got {str(path)!r} "
            f"({error.strerror}); give its path with --data"
        ) from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: expected UTF-8 but got {error}; save it as UTF-8") from None
    if not found:
        raise OptionError(f"{path}: expected at least one row below the header but got none")
    seen: dict[str, int] = {}
    for row in found:
        if row.id in seen:
            raise OptionError(
                f"{path}: column id: expected every id once but got {row.id!r} twice; rename one"
            )
        seen[row.id] = 1
    return found


def _check_columns(names: object, path: str) -> None:
    columns = [str(name) for name in names]  # type: ignore[attr-defined]
    for name in columns:
        if name in COLUMNS:
            continue
        stem = next((s for s in sorted(_UNITS, key=len, reverse=True) if name.startswith(s)), "")
        close = difflib.get_close_matches(name, COLUMNS, 1)
        if stem:
            cure = f"convert it to {_UNITS[stem]}"
        elif close:
            cure = f"did you mean {close[0]!r}?"
        else:
            cure = "remove it"
        raise OptionError(f"{path}: unknown column {name!r}; {cure}")
    for name in REQUIRED:
        if name not in columns:
            raise OptionError(f"{path}: expected a column {name!r} but there is none; add it")
    double = [name for name in columns if columns.count(name) > 1]
    if double:
        raise OptionError(f"{path}: column {double[0]!r} is there twice; remove one of them")


def _row(cells: Mapping[str | None, str | None], place: str) -> Row:
    where = f"{place} ({cells.get('id') or 'no id'})"
    if None in cells or None in cells.values():
        raise OptionError(
            f"{where}: expected as many cells as the header has but got more or fewer; quote cells "
            "that contain commas"
        )
    values: dict[str, object] = {}
    for name, text in cells.items():
        assert name is not None and text is not None
        value = _value(name, text.strip(), where)
        if value is not None:
            values[name] = value
    for name in REQUIRED:
        if name not in values or values[name] == "":
            raise _wrong(where, name, "a value", "", "fill it in")
    row = Row(**values)  # type: ignore[arg-type]
    _check(row, where)
    return row


def _value(name: str, text: str, where: str) -> object:
    kind = COLUMNS[name]
    if kind == "str":
        return text
    if not text:
        return None
    whole = kind.startswith("int")
    try:
        number = float(text)
    except ValueError:
        unit = "a whole number" if whole else "a number"
        raise _wrong(where, name, unit, text, "leave units to the column's name") from None
    if not math.isfinite(number) or number < 0 or (number == 0 and name not in _MAY_BE_ZERO):
        raise _wrong(where, name, "a positive number", text, "leave the cell empty if not known")
    if not whole:
        return number
    if number != int(number):
        raise _wrong(where, name, "a whole number", text, "round it or fix the column")
    return int(number)


def _check(row: Row, where: str) -> None:
    if row.status not in STATUSES:
        raise _wrong(where, "status", f"one of {', '.join(STATUSES)}", row.status, "choose one")
    if row.trust not in TRUSTS:
        raise _wrong(where, "trust", "A, B, C or nothing", row.trust, "choose one")
    for name in _FLAGS:
        if getattr(row, name) not in (None, 0, 1):
            raise _wrong(where, name, "0 or 1", getattr(row, name), "choose one")
    if row.zero_stage is not None and row.zero_stage > 3:
        raise _wrong(where, "zero_stage", "0, 1, 2 or 3", row.zero_stage, "choose one")
    if row.mfu is not None and row.mfu > 1:
        raise _wrong(where, "mfu", "a share of at most 1", row.mfu, "divide percentages by 100")
    degrees = {a: getattr(row, a) for a in ("pp", "dp", "tp", "cp") if getattr(row, a)}
    product = math.prod(degrees.values())
    if row.gpus % product or (len(degrees) == 4 and product != row.gpus):
        text = " x ".join(f"{axis}={degree}" for axis, degree in degrees.items())
        raise _wrong(
            where, "gpus", f"the product {text} = {product}", row.gpus,
            "correct a degree, or leave one empty",
        )  # fmt: skip


def _wrong(where: str, column: str, expected: str, got: object, cure: str) -> OptionError:
    return OptionError(f"{where}: column {column}: expected {expected} but got {got!r}; {cure}")
