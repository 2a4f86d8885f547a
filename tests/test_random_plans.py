"""At least 300 random legal plans over seven models train to the numbers of the plain model."""

from __future__ import annotations

import pytest
import torch
from emitted import check, emitted_step
from random_models import MODELS, build
from random_plans import MESHES, draw_plan

from autoshard.emit import emit
from autoshard.runtime import ops

PLANS_PER_MODEL = 44
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", MODELS)
def test_any_plan_trains_to_the_same_numbers(name: str, part: int) -> None:
    case = build(name)
    for seed in range(part, PLANS_PER_MODEL, PARTS):
        plan = draw_plan(case.program, seed)
        try:
            check(case.expected, emitted_step(case.program, plan, case.model, case.batch), 1e-9)
        except Exception as error:
            error.add_note(f"draw_plan(build({name!r}).program, {seed}): {plan.mesh}")
            raise


def test_plans_differ_in_everything_that_may_differ() -> None:
    plans = [draw_plan(build("gpt2").program, seed) for seed in range(PLANS_PER_MODEL)]
    assert {(p.mesh.dp, p.mesh.tp) for p in plans} == set(MESHES)
    assert {len(p.stages) for p in plans} == {1, 2, 3}
    assert {p.num_micro_batches for p in plans} == {1, 2}
    assert {s.recompute.mode for p in plans for st in p.stages for s in st.segments} == {
        "none", "full"
    }  # fmt: skip
    assignments = [a for p in plans for axes in p.layers.values() for a in axes.values()]
    texts = [t for a in assignments for t in (*a.inputs.values(), *a.parameters.values())]
    assert {t[0] for t in texts} == {"R", "V", "S", "P"}
    source = "".join(t for p in plans[:20] for t in emit(build("gpt2").program, p).files.values())
    missing = [f for f in _CONVERSIONS if f"{f}(" not in source]
    assert not missing


_CONVERSIONS = (
    "all_reduce_gradient", "split", "share", "share_gradient", "split_varying", "share_varying",
    "all_gather_replicated", "all_gather", "all_to_all", "pad", "all_reduce", "all_reduce_both",
    "reduce_scatter",
)  # fmt: skip


@pytest.mark.parametrize("function", ["share", "all_gather", "split_varying"])
def test_a_conversion_that_is_wrong_is_found(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that are off by a millionth are seen."""
    right = getattr(ops, function)

    def wrong(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        y = right(x, *args, **kwargs)
        return y + 1e-6 * (y - y.detach()) if y.requires_grad else y

    monkeypatch.setattr(ops, function, wrong)
    case = build("dlrm")
    with pytest.raises(AssertionError):
        # Loaded sources stay loaded, so no two tests may draw the same plans.
        first = 1000 * (1 + _CONVERSIONS.index(function))
        for seed in range(first, first + 20):
            plan = draw_plan(case.program, seed)
            check(case.expected, emitted_step(case.program, plan, case.model, case.batch), 1e-9)
