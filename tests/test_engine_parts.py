"""What the engine is made of: boundaries, keys, precision, modes of ZeRO, optimizers, buckets."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from typing import Any, ClassVar

import pytest
import torch
from engine_model import BLOCKS, Stage, batch, batch_values, plain, stage
from ranks import Pool
from test_engine import SIZE, Case, Result, check, distributed, make_engine, reference
from torch import Tensor, nn

from autoshard.errors import OptionError
from autoshard.ir import TensorType, Value
from autoshard.runtime import data, optimizer
from autoshard.runtime.agreement import fingerprint
from autoshard.runtime.data_parallel import Replicated, data_parallel, is_split_over_dp
from autoshard.runtime.engine import Engine, EngineConfig, gathered_units
from autoshard.runtime.mesh import Mesh, using
from autoshard.runtime.parameters import (
    Layer,
    Parameter,
    declared,
    load_parameters,
    local,
    local_part,
)
from autoshard.schedule import Schedule
from autoshard.schedules import gpipe

ALONE = {"pp": 1, "dp": 1, "tp": 1}


def local_part_of(step: int, mesh: Mesh, values: tuple[Value, ...] = ()) -> dict[str, Tensor]:
    return data.local_batch(
        batch(SIZE, step), values or batch_values(SIZE), rank=mesh.rank("dp"), size=mesh.size("dp")
    )


# -- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(optimizer.NAMED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_named_optimizers_update_as_torch_does(name: str, dtype: torch.dtype) -> None:
    """In one pass over memory where there is such a kernel, with the same result."""
    made = optimizer.factory(name)
    weight = torch.linspace(-1, 1, 24).reshape(4, 6).to(dtype)
    one, other = (nn.Parameter(weight.clone()) for _ in range(2))
    ours = made([one])
    options = inspect.signature(type(ours)).parameters.keys() & ours.defaults.keys()
    plain = {name: ours.defaults[name] for name in options} | {"foreach": False}
    if "fused" in options:
        plain["fused"] = False
    theirs = type(ours)([other], **plain)
    if "fused" in options:
        assert bool(ours.defaults["fused"]) == dtype.is_floating_point
    for step in range(3):
        for parameter in (one, other):
            parameter.grad = torch.cos(weight * (step + 1))
        ours.step()
        theirs.step()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_an_optimizer_over_nothing_steps() -> None:
    optimizer.build("adamw", [], split=False).step()


def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Page faults of a process that makes and frees the same tensors again and again."""
    program = (
        "import resource, sys, torch\n"
        "from autoshard.runtime.host_memory import keep_freed_memory\n"
        "kept = sys.argv[1] == 'keep' and keep_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def step(): [torch.ones(2**20) for _ in range(8)]\n"
        "for _ in range(3): step()\n"
        "before = faults()\n"
        "for _ in range(5): step()\n"
        "print(kept, faults() - before)\n"
    )
    outcomes = {}
    for way in ("keep", "leave"):
        command = [sys.executable, "-c", program, way]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        outcomes[way] = (found[0] == "True", int(found[1]))
    kept, faults = outcomes["keep"]
    if kept:  # with the GNU C library and its own allocator
        assert faults < 0.1 * outcomes["leave"][1]


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ddp", "zero1", "zero3"])
def test_float32(mode: str, ranks: Pool) -> None:
    case = Case(dp=2, tp=2, micro=2, mode=mode, dtype=torch.float32, steps=1, optimizer="sgd")
    check(ranks.run(distributed, case, world=case.world), reference(case), 2e-6)


@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_bfloat16(mode: str, ranks: Pool) -> None:
    """Nearer to the exact gradient than a few roundings; a wrong factor would be far off."""
    case = Case(dp=4, mode=mode, dtype=torch.bfloat16, steps=1, optimizer="sgd")
    exact = reference(Case(steps=1, optimizer="sgd")).gradients
    for result in ranks.run(distributed, case, world=4):
        for name, gradient in result.gradients.items():
            error = (gradient.double() - exact[name]).norm() / exact[name].norm()
            assert error < 0.05, (name, error)


# -- ZeRO -----------------------------------------------------------------------------------------


def held(mode: str) -> dict[str, Any]:
    """What a rank holds at rest, while the second block runs, and between micro-batches."""
    mesh = Mesh.create({"pp": 1, "dp": 4, "tp": 1})
    seen: dict[str, Any] = {"during": [], "gradients": []}
    with using(mesh):
        engine = make_engine(Case(dp=4, mode=mode, micro=2), mesh)
        first, second = (engine.module.get_submodule(f"blocks.{i}") for i in (0, 1))
        weight = "gate_up.weight"

        def look(*_: object) -> None:
            seen["during"].append(is_split_over_dp(first.get_parameter(weight), mesh))
            gradient = first.get_parameter(weight).grad
            seen["gradients"].append(gradient is not None)

        second.register_forward_pre_hook(look)
        engine.step(local_part_of(0, mesh))
        parameter = first.get_parameter(weight)
        seen["rest"] = is_split_over_dp(parameter, mesh)
        slot = next(s for s in engine.slots if s.name == f"blocks.0.{weight}")
        seen["part"] = slot.local.numel() / parameter.numel()
        state = engine.optimizer.state[slot.local]["exp_avg"]
        seen["state"] = state.numel() / parameter.numel()
        assert slot.local.data_ptr() == local_part(parameter).data_ptr()
    return seen


@pytest.mark.parametrize(
    ("mode", "part", "during"),
    [("ddp", 1.0, False), ("zero1", 0.25, False), ("zero2", 0.25, False), ("zero3", 0.25, True)],
)
def test_what_each_mode_holds(mode: str, part: float, during: bool, ranks: Pool) -> None:
    for seen in ranks.run(held, mode):
        assert seen["part"] == seen["state"] == part
        assert seen["rest"] is (mode != "ddp")
        assert seen["during"] == [during, during]


def test_units_that_are_gathered_alone() -> None:
    with using(Mesh(ALONE)):
        made = stage(Mesh(ALONE))
        units = list(gathered_units(made))
        assert units == [made.get_submodule(f"blocks.{i}") for i in range(BLOCKS)]

        class Borrower(Layer):
            PARAMETERS: ClassVar = {"w": Parameter((16, 12), torch.float64)}

        from autoshard.runtime.parameters import attach

        borrower = Borrower()
        names = {"w": "blocks.1.down.weight"}
        made.get_submodule("blocks.1.down").__dict__["_declarations"]["weight"] = (
            Borrower.PARAMETERS["w"]
        )
        attach(made, borrower, "elsewhere", names)
        made.__dict__["_calls"] = [(borrower, 9), (units[2], 3), (units[2], 4)]
        # Block 1 lends a weight to another layer; block 2 runs twice.
        assert list(gathered_units(made)) == [units[0], units[3]]


def unknown_mode() -> None:
    data_parallel(nn.Linear(1, 1), mode="zero4", size=2, group=None, mesh=None)


def test_unknown_mode() -> None:
    with pytest.raises(OptionError, match="ddp, zero1, zero2, zero3 but got 'zero4'"):
        unknown_mode()


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1)


def warnings_of_views() -> list[str]:
    mesh = Mesh.create({"pp": 1, "dp": 4, "tp": 1})
    with using(mesh), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unit = Flat(8, 8)
        split = nn.Sequential(unit)
        data_parallel(
            split, mode="zero3", size=4, group=mesh.group("dp"), mesh=mesh.device_mesh["dp"],
            units=[unit],
        )  # fmt: skip
        split(torch.ones(2, 8)).sum().backward()
        warnings.warn("another", stacklevel=1)
    return [str(w.message) for w in caught]


def test_a_unit_that_returns_a_view_is_no_reason_to_warn(ranks: Pool) -> None:
    for found in ranks.run(warnings_of_views):
        assert "another" in found
        assert not [text for text in found if "returned a view" in text]


# -- buckets --------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    """Uses a parameter again in a backward of its own, as recomputation may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter) -> Tensor:
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            (ctx.weight * gradient.detach().sum()).sum().backward()
        return gradient, None


def buckets(bucket_bytes: int) -> tuple[bool, list[Tensor]]:
    import torch.distributed as dist

    torch.manual_seed(3)
    weights = [nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(5)]
    unused = nn.Parameter(torch.ones(4, dtype=torch.float64))
    sync = Replicated([unused, *weights], dist.group.WORLD, bucket_bytes)
    scale = dist.get_rank() + 1.0
    for last in (False, True):
        x = torch.ones(4, dtype=torch.float64, requires_grad=True)
        out = Twice.apply(x, weights[4])
        for weight in weights:
            out = out * weight
        sync.before_backward(last=last)
        (out.sum() * scale).backward()
    started = sync._next > 0
    sync.finish()
    assert unused.grad is None
    return started, [w.grad for w in weights if w.grad is not None]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 10**9])
def test_buckets(bucket_bytes: int, ranks: Pool) -> None:
    """Also a gradient that arrives when its bucket is under way, and a parameter without one."""
    torch.manual_seed(3)
    weights = [torch.randn(4, dtype=torch.float64) for _ in range(5)]
    total = 2 * (1 + 2 + 3)  # micro-batches, and the scales of three ranks
    product = torch.stack(weights).prod(0)
    for started, gradients in ranks.run(buckets, bucket_bytes, world=3):
        assert started is (bucket_bytes < 10**9)  # the one big bucket waits for the unused one
        for index, gradient in enumerate(gradients):
            expected = total * product / weights[index]
            if index == 4:
                expected = expected + total * product.sum()
            assert (gradient - expected).abs().max() < 1e-10


# -- boundaries -----------------------------------------------------------------------------------


class Relay(Layer):
    """Sends an activation, a mask and ids; the first stage is frozen if ``frozen``."""

    BATCH: tuple[str, ...] = ()
    PROLOGUE: tuple[str, ...] = ("weights", "count")
    CUT = ("weights",)

    def __init__(self, index: int, frozen: bool) -> None:
        self.PARAMETERS = {f"w{index}": Parameter((4, 4), torch.float64)}
        super().__init__()
        self.index = index
        self.BATCH = ("x", "ids") if index == 0 else ()
        torch.manual_seed(index)
        load_parameters(self, {f"w{index}": torch.randn(4, 4, dtype=torch.float64)})
        self.w.requires_grad_(not (frozen and index == 0))
        self.seen: list[int] = []

    @property
    def w(self) -> Any:
        return getattr(self, f"w{self.index}")

    def prologue(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"weights": batch["x"].abs().sum(1), "count": batch["x"].abs().sum()}


class First(Relay):
    def forward(
        self, *, x: Tensor, ids: Tensor, key: Tensor, weights: Tensor, count: Tensor
    ) -> Any:  # type: ignore[override]
        self.seen.append(int(key))
        return x @ local(self.w), ids > 2, ids


class Middle(Relay):
    def forward(self, x: Any, mask: Any = None, ids: Any = None, **_: Any) -> Any:
        return torch.tanh(x @ local(self.w)), mask, ids  # the mask and ids pass through


class Last(Relay):
    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor, ids: Tensor, *, key: Tensor, weights: Tensor, count: Tensor
    ) -> Tensor:
        self.seen.append(int(key))
        y = (x @ local(self.w)).masked_fill(mask, 0.0) * ids
        return (y.sum(1) * weights).sum() / count


RELAY_VALUES = (
    Value("x", TensorType((SIZE, 4), torch.float64, per_sample=True)),
    Value("ids", TensorType((SIZE, 4), torch.int64, per_sample=True)),
)


def relay_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "x": torch.randn(SIZE, 4, dtype=torch.float64, generator=generator),
        "ids": torch.randint(5, (SIZE, 4), generator=generator),
    }


def relay(frozen: bool, schedule: str) -> tuple[list[float], Tensor | None, list[int]]:
    mesh = Mesh.create({"pp": 3, "dp": 1, "tp": 1})
    index = mesh.rank("pp")
    edge = (
        TensorType((2, 4), torch.float64, differentiable=not (frozen and index <= 1)),
        TensorType((2, 4), torch.bool),
        TensorType((2, 4), torch.int64),
    )
    out = (TensorType((2, 4), torch.float64, differentiable=not (frozen and index == 0)), *edge[1:])
    with using(mesh):
        made = (First, Middle, Last)[index](index, frozen)
        config = EngineConfig(
            batch=RELAY_VALUES, num_micro_batches=4, schedule=schedule, seed=3,
            inputs=edge if index else (), outputs=out if index < 2 else (),
        )  # fmt: skip
        engine = Engine(made, mesh=mesh, config=config, optimizer="sgd")
        losses = [engine.step(relay_batch(step)) for step in range(2)]
        gradient = made.w.grad
        return losses, None if gradient is None else local_part(gradient), made.seen


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
@pytest.mark.parametrize("frozen", [False, True])
def test_masks_ids_and_cut_values_along_three_stages(
    frozen: bool, schedule: str, ranks: Pool
) -> None:
    weights = []
    for index in range(3):
        torch.manual_seed(index)
        weights.append(torch.randn(4, 4, dtype=torch.float64, requires_grad=True))
    expected: list[float] = []
    for step in range(2):
        given = relay_batch(step)
        for w in weights:
            w.grad = None
        y = torch.tanh(given["x"] @ weights[0] @ weights[1]) @ weights[2]
        y = y.masked_fill(given["ids"] > 2, 0.0) * given["ids"]
        size = given["x"].abs()
        loss = (y.sum(1) * size.sum(1)).sum() / size.sum()
        loss.backward()
        expected.append(float(loss.detach()))
        with torch.no_grad():
            for w in weights[1 if frozen else 0 :]:
                w -= 1e-3 * w.grad
    results = ranks.run(relay, frozen, schedule, world=3)
    for index, (losses, gradient, seen) in enumerate(results):
        assert losses == pytest.approx(expected, rel=1e-12)
        if frozen and index == 0:
            assert gradient is None
        else:
            assert gradient is not None
            assert (gradient - weights[index].grad).abs().max() < 1e-12
        if index != 1:  # every micro-batch of every step has its own key, alike on all ranks
            assert len(set(seen)) == 8
            assert seen == results[0][2]


# -- the rest of a step ---------------------------------------------------------------------------


def alone(**changes: Any) -> Engine:
    mesh = Mesh(ALONE)
    settings: dict[str, Any] = {"batch": batch_values(SIZE), "num_micro_batches": 2}
    optimizer_and_schedule = {k: changes.pop(k) for k in ("optimizer", "scheduler") if k in changes}
    with using(mesh):
        config = EngineConfig(**{**settings, **changes})
        return Engine(stage(mesh), mesh=mesh, config=config, **optimizer_and_schedule)


def test_scheduler_follows_the_plain_one() -> None:
    def decay(made: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(made, 0.5)

    engine = alone(scheduler=decay)
    model = plain()
    adamw = torch.optim.AdamW(model.parameters())
    scheduler = decay(adamw)
    for step in range(3):
        adamw.zero_grad()
        model(**batch(SIZE, step)).backward()
        adamw.step()
        scheduler.step()
        engine.step(batch(SIZE, step))
    assert engine.optimizer.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == 1.25e-4
    for name, parameter in engine.module.named_parameters():
        assert (parameter - model.get_parameter(name)).abs().max() < 1e-12


def test_evaluation_changes_nothing() -> None:
    engine = alone()
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    gradient_before = engine.step(batch(SIZE, 0)) and engine.gradient_norm()
    after_step = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.evaluate(batch(SIZE, 1))
    assert engine.gradient_norm() == gradient_before
    assert engine.module.training and engine.step_number == 1
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, after_step[name])
        assert not torch.equal(parameter, before[name])


def test_clipping_can_change_between_steps() -> None:
    engine = alone()
    engine.step(batch(SIZE, 0))
    norm = engine.gradient_norm()
    engine = alone()
    engine.set_max_norm(norm / 10)
    engine.step(batch(SIZE, 0))
    assert engine.gradient_norm() == pytest.approx(norm / 10, rel=1e-5)


def test_wrong_configurations() -> None:
    with pytest.raises(OptionError, match="choose a multiple of 3"):
        alone(num_micro_batches=3)
    with pytest.raises(OptionError, match="expected optimizer to be one of adamw"):
        alone(optimizer="adamx")
    with pytest.raises(OptionError, match="have 8 samples but got 4 samples"):
        alone().step(batch(4, 0))


def wrong_schedule(schedule: str | Schedule, words: str) -> None:
    mesh = Mesh.create({"pp": 2, "dp": 1, "tp": 1})
    with using(mesh), pytest.raises(OptionError, match=words):
        config = EngineConfig(batch=batch_values(SIZE), num_micro_batches=2, schedule=schedule)
        Engine(Stage(mesh.rank("pp"), 2, torch.float64), mesh=mesh, config=config)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("none", "a pipeline schedule for 2 stages"),
        (gpipe(2, 4), "2 ranks and 2 micro-batches but got one of 2 and 4"),
    ],
    ids=["none", "gpipe"],
)
def test_schedule_that_does_not_fit(schedule: str | Schedule, words: str, ranks: Pool) -> None:
    ranks.run(wrong_schedule, schedule, words, world=2)


# -- agreement ------------------------------------------------------------------------------------


def given_other_samples(pp: int, dp: int, tp: int) -> list[str]:
    """Each rank loads samples by its rank in the world, as for plain data parallelism."""
    import torch.distributed as dist

    mesh = Mesh.create({"pp": pp, "dp": dp, "tp": tp})
    with using(mesh):
        case = Case(pp=pp, dp=dp, tp=tp, schedule="gpipe" if pp > 1 else "none")
        engine = make_engine(case, mesh)
        other = batch(SIZE, 10 + dist.get_rank())
        wrong = {name: tensor[: SIZE // dp] for name, tensor in other.items()}
        try:
            engine.step(wrong)
        except OptionError as error:
            return [str(error)]
        return []


@pytest.mark.parametrize(("pp", "dp", "tp"), [(2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 4, 1)])
def test_ranks_of_one_coordinate_given_different_samples(
    pp: int, dp: int, tp: int, ranks: Pool
) -> None:
    for errors in ranks.run(given_other_samples, pp, dp, tp):
        if dp == 4:
            assert errors == []
        else:
            assert "expected the same batch on all ranks along" in errors[0]


def models(seed_by_rank: bool) -> str:
    import torch.distributed as dist

    from autoshard.runtime.agreement import check_model_alike

    torch.manual_seed(dist.get_rank() // 3 if seed_by_rank else 0)
    try:
        check_model_alike(dict(nn.Linear(3, 3).named_parameters()))
    except OptionError as error:
        return str(error)
    return ""


def test_models_of_different_seeds(ranks: Pool) -> None:
    assert ranks.run(models, False) == [""] * 4
    for message in ranks.run(models, True):
        assert "'weight' on rank 3 differs from rank 0" in message


def test_fingerprints_see_every_element_and_its_place() -> None:
    base = torch.arange(11)
    seen = {fingerprint({"x": base})}
    for index in range(11):
        changed = base.clone()
        changed[index] += 1
        swapped = base.clone()
        swapped[[index, (index + 1) % 11]] = base[[(index + 1) % 11, index]]
        seen |= {fingerprint({"x": changed}), fingerprint({"x": swapped})}
    seen |= {fingerprint({"y": base}), fingerprint({"x": base.int()})}
    seen |= {fingerprint({"x": base.bool()}), fingerprint({"x": base.bfloat16()})}
    assert len(seen) == 1 + 22 + 4
    assert fingerprint({"x": torch.empty(0)}) == fingerprint({"x": torch.empty(0)})


# -- optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [("adamw", 2), ("adam", 2), ("sgd", 0), ("sgd-momentum", 1), ("nesterov", 1), ("rmsprop", 1),
     ("adagrad", 1), ("nadam", 2), ("radam", 2), ("adamax", 2)],
)  # fmt: skip
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_bytes_of_state(name: str, count: int, itemsize: int) -> None:
    before = torch.get_rng_state()
    assert optimizer.state_bytes_per_parameter(name, itemsize) == count * itemsize
    assert torch.equal(torch.get_rng_state(), before)


def test_every_named_optimizer_has_its_state_counted_and_its_defaults_from_torch() -> None:
    made = optimizer.build("adamw", [nn.Parameter(torch.ones(2))], split=True)
    plain = torch.optim.AdamW([nn.Parameter(torch.ones(2))]).defaults
    assert made.defaults == {**plain, "fused": True}
    assert optimizer.optimizer_name("sgd") == "sgd"
    assert optimizer.optimizer_name(torch.optim.Adam) == "Adam"


def test_wrong_optimizers() -> None:
    parameters = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(OptionError, match=r"to return a torch.optim.Optimizer but got NoneType"):
        optimizer.build(lambda p: None, parameters, split=False)  # type: ignore[arg-type, return-value]
    other = nn.Parameter(torch.ones(1))
    with pytest.raises(OptionError, match="over the parameters it was given"):
        optimizer.build(lambda p: torch.optim.SGD([*p, other]), parameters, split=False)
    optimizer.build(torch.optim.Adafactor, parameters, split=False)
    with pytest.raises(OptionError, match="Adafactor, which needs whole tensors"):
        optimizer.build(torch.optim.Adafactor, parameters, split=True)
    assert optimizer.build("adamw", [], split=False).param_groups  # a stage without weights


def own_parameters_only() -> Result:
    mesh = Mesh.create({"pp": 1, "dp": 2, "tp": 2})
    with using(mesh):
        engine = make_engine(Case(dp=2, tp=2, mode="zero1"), mesh)
        names = {name for name, declaration, _ in declared(engine.module)}
        assert {slot.name for slot in engine.slots} == names
        counted = sum(slot.local.numel() for slot in engine.slots if slot.counted)
        return Result(losses=[float(counted)])


def test_every_element_counts_once_in_the_norm(ranks: Pool) -> None:
    counted = sum(result.losses[0] for result in ranks.run(own_parameters_only))
    assert counted == sum(p.numel() for p in plain().parameters())
