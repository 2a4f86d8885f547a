"""Floating-point operations of a training step, and what plans achieve of them per second.

Counted as in Narayanan et al. 2021 (section 5.1 and its appendix): two per weight of a product and
token forward and four backward, and the two products of attention with whole matrices, masked or
not. *Model* operations leave recomputation out; *hardware* operations count the forward of each
layer that is recomputed in full once more. What selective recomputation repeats is not counted, so
that hardware figures of plans with it are a little low.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder transformer, as far as its products go.

    Attributes:
        layer_weights: elements of one layer's matrices.
        hidden: all attention heads together.
        sequence: tokens of a sample.
    """

    layers: int
    layer_weights: int
    hidden: int
    vocabulary: int
    sequence: int

    @property
    def layer_forward(self) -> float:
        """Operations of one layer's forward for one token."""
        return 2.0 * self.layer_weights + 4.0 * self.hidden * self.sequence

    def model_flops(self, samples: int) -> float:
        """Operations of a step without recomputation."""
        token = 3 * self.layers * self.layer_forward + 6.0 * self.hidden * self.vocabulary
        return samples * self.sequence * token

    def hardware_flops(self, samples: int, recomputed: int) -> float:
        """The same with so many layers recomputed in full."""
        again = samples * self.sequence * recomputed * self.layer_forward
        return self.model_flops(samples) + again


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What one plan is predicted to achieve per device.

    Attributes:
        plan: automatic, hand-tuned, or where it was published.
        layout: of the plan, in words.
        model_flops_per_s, hardware_flops_per_s: per device, in 10^12, as shown; ``-``: not said.
    """

    case: str
    plan: str
    layout: str
    step_s: float | None
    model_flops_per_s: str
    hardware_flops_per_s: str


def predicted(case: str, plan: str, decoder: Decoder, summary: dict[str, object]) -> Throughput:
    """Of a plan, from what ``autoshard plan --json`` says of it."""
    own = summary["front"][0]  # type: ignore[index]
    mesh = " ".join(f"{axis}={n}" for axis, n in own["mesh"].items() if n > 1)
    chunks = f" x{own['virtual_stages']}" if own["virtual_stages"] > 1 else ""
    again = ", ".join(f"{n} {mode}" for mode, n in own["recompute"].items() if mode != "none")
    layout = (
        f"{mesh}, micro-batch {own['micro_batch_size']}, {own['schedule']}{chunks}, "
        f"{own['data_parallel']}, recomputed: {again or 'none'}"
    )
    return of_step(
        case, plan, layout, float(summary["predicted_step_s"]), decoder,  # type: ignore[arg-type]
        int(summary["global_batch_size"]), int(summary["world_size"]),  # type: ignore[call-overload]
        own["recompute"].get("full", 0),
    )  # fmt: skip


def of_step(
    case: str,
    plan: str,
    layout: str,
    step_s: float,
    decoder: Decoder,
    samples: int,
    devices: int,
    recomputed: int,
) -> Throughput:
    """Of a step of so many samples on all devices, with so many layers recomputed in full."""
    model = decoder.model_flops(samples) / devices / step_s
    hardware = decoder.hardware_flops(samples, recomputed) / devices / step_s
    return Throughput(
        case=case, plan=plan, step_s=step_s, layout=layout,
        model_flops_per_s=f"{model / 1e12:.0f}", hardware_flops_per_s=f"{hardware / 1e12:.0f}",
    )  # fmt: skip


def table(rows: list[Throughput]) -> Table:
    """The automatic plan, the hand-tuned one, and what was published, case by case."""
    found = Table(title="Throughput per device, TFLOP/s", title_justify="left")
    for name in ("case", "plan", "step s", "model", "hardware", "layout"):
        found.add_column(
            name, justify="right" if name in ("step s", "model", "hardware") else "left"
        )
    for row in rows:
        found.add_row(
            row.case, row.plan, "-" if row.step_s is None else f"{row.step_s:.2f}",
            row.model_flops_per_s, row.hardware_flops_per_s, row.layout,
        )  # fmt: skip
    return found
