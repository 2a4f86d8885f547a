"""What the user may ask for, checked at the door."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from autoshard import schedules, versioned
from autoshard.errors import OptionError
from autoshard.placement.state import State

if TYPE_CHECKING:
    from autoshard.cluster import Cluster
    from autoshard.ir import Program

SCHEDULES = tuple(schedules.SCHEDULES)
AXES = ("pp", "dp", "cp", "tp")
"""Of the mesh, outermost first."""
DATA_PARALLEL = ("ddp", "zero1", "zero2", "zero3")
ASYNCHRONOUS = ("asp", "ssp")
"""Data-parallel modes whose workers do not wait for each other's gradients."""
RECOMPUTE = ("none", "full", "selective")
PRECISIONS = ("bf16",)
MEASURED = "measured"
"""Costs that are measured on the present device rather than computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Pins: what the planner may not choose freely. Everything is optional.

    Attributes:
        pp, dp, cp, tp: mesh degrees; those given must multiply to a divisor of the world size.
            ``cp``, context parallelism, is 1 if not given, but for sequences of 16,384 positions
            or more.
        ep: over so many neighbouring data-parallel ranks the experts of sparse layers are spread;
            divides ``dp``, and is for predictions only.
        micro_batch_size: samples per micro-batch on one data-parallel rank.
        schedule: one of ``SCHEDULES``.
        virtual_stages: chunks of the model on every pipeline rank; more than one need a schedule
            that has them (``interleaved-1f1b`` if none is pinned).
        data_parallel: one of ``DATA_PARALLEL``, or (with ``allow_stale``) of ``ASYNCHRONOUS``:
            ``asp``, or ``ssp`` whose workers are at most ``staleness`` minibatches apart.
        bucket_bytes: of gradients that ``ddp`` reduces at once.
        replicas: ranks of every pipeline stage, such as ``(3, 1)``, which take micro-batches in
            turn; pins ``pp``, too. The sum is the world size.
        allow_stale: permit training with gradients of older weights: schedules ``pipedream`` and
            ``pipedream-2bw``, data parallelism ``asp`` and ``ssp``. The result changes, and the
            plan says so with the staleness in steps. Nothing of it is chosen without a pin.
        vertical_sync: under ``pipedream`` a micro-batch meets weights of the same age in all
            stages.
        staleness: minibatches that an ``ssp`` worker may be ahead of the slowest.
        recompute: one of ``RECOMPUTE``, for every layer.
        recompute_ops: names or ``fnmatch`` patterns of the ops that every layer recomputes, all
            others being kept; pins ``recompute`` to ``selective``.
        sharding: parameter or op name (``fnmatch`` patterns allowed) -> its state on the tensor
            axis: ``"S(0)"``, ``"R"``, ... For an op the state of its (first) output; one that is
            pinned whole works on whole operands. A parameter that is pinned to be split is also
            used so: it is not gathered.
        sequence_parallel: whether activations are split over positions on the tensor axis where
            they pass between products with weights (norms, dropout, sums) and between layers; if
            not, every rank has them whole. Either way the axis splits no samples.
        stages: for each pipeline stage the number of segments, in order; pins ``pp``, too. With
            ``virtual_stages`` that is ``pp * virtual_stages`` numbers.
        memory_bytes: use no more than this of each device.
        allow_coupled_micro_batches: permit micro-batches although samples interact in forward
            (batch norm, in-batch negatives): changes the result, and the plan says so.
    """

    pp: int | None = None
    dp: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None
    micro_batch_size: int | None = None
    schedule: str | None = None
    virtual_stages: int | None = None
    data_parallel: str | None = None
    recompute: str | None = None
    recompute_ops: tuple[str, ...] = ()
    sharding: Mapping[str, str] = field(default_factory=dict)
    sequence_parallel: bool | None = None
    stages: tuple[int, ...] | None = None
    memory_bytes: int | None = None
    allow_coupled_micro_batches: bool = False
    bucket_bytes: int | None = None
    replicas: tuple[int, ...] | None = None
    allow_stale: bool = False
    vertical_sync: bool = False
    staleness: int | None = None

    def __post_init__(self) -> None:
        for name in (
            *AXES,
            "ep",
            "micro_batch_size",
            "virtual_stages",
            "memory_bytes",
            "bucket_bytes",
        ):
            value = getattr(self, name)
            wrong_type = isinstance(value, bool) or not isinstance(value, int)
            if value is not None and (wrong_type or value < 1):
                raise OptionError(f"constraint {name} expects a positive integer but got {value!r}")
        _validate_choice("schedule", self.schedule, SCHEDULES)
        _validate_choice("data_parallel", self.data_parallel, (*DATA_PARALLEL, *ASYNCHRONOUS))
        _validate_choice("recompute", self.recompute, RECOMPUTE)
        _validate_recompute_ops(self.recompute_ops, self.recompute)
        if self.recompute_ops:
            object.__setattr__(self, "recompute", "selective")
        if self.sequence_parallel not in (None, True, False):
            raise OptionError(
                "constraint sequence_parallel expects True, False or None but got "
                f"{self.sequence_parallel!r}"
            )
        _validate_stages(self.stages)
        self._check_stale()
        self._check_replicas()
        self._check_pipeline()
        if self.data_parallel not in (None, "ddp") and self.dp == 1 == (self.cp or 1):
            raise OptionError(
                f"data_parallel {self.data_parallel!r} spreads state over data-parallel ranks, but "
                "dp is pinned to 1: drop one of the two pins"
            )
        if self.dp is not None and self.dp % (self.ep or 1):
            raise OptionError(
                f"constraint ep={self.ep} expects a divisor of dp, over whose ranks experts are "
                f"spread, but dp is {self.dp}: change one of the two pins"
            )
        _validate_sharding(self.sharding, self.tp)

    @property
    def stale(self) -> bool:
        """Training with gradients of older weights is pinned."""
        scheduled = self.schedule is not None and schedules.SCHEDULES[self.schedule].stale
        return scheduled or self.data_parallel in ASYNCHRONOUS

    @property
    def replicated(self) -> bool:
        """Stages are replicated one by one, rather than all ``dp`` times."""
        return self.stale or self.replicas is not None

    def _check_stale(self) -> None:
        """Stale training is allowed where it is pinned, and its options go with it."""
        for name in ("allow_coupled_micro_batches", "allow_stale", "vertical_sync"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(
                    f"constraint {name} expects True or False but got {getattr(self, name)!r}"
                )
        if self.stale and not self.allow_stale:
            pinned = (
                f"data_parallel={self.data_parallel!r}"
                if self.data_parallel in ASYNCHRONOUS
                else f"schedule={self.schedule!r}"
            )
            raise OptionError(
                f"{pinned} trains with gradients of older weights, so results differ from those of "
                "one process: pin allow_stale=True, too, if that is wanted"
            )
        if self.vertical_sync and self.schedule != "pipedream":
            raise OptionError(
                "vertical_sync is of the weight versions of schedule 'pipedream', but schedule is "
                f"{self.schedule!r}: pin that schedule, or drop vertical_sync"
            )
        wrong = isinstance(self.staleness, bool) or not isinstance(self.staleness, int)
        if self.data_parallel == "ssp" and (wrong or (self.staleness or 0) < 0):
            raise OptionError(
                "data_parallel 'ssp' expects staleness, the minibatches that a worker may be ahead "
                f"of the slowest (0 or more), but got {self.staleness!r}: pin it, or use 'asp'"
            )
        if self.staleness is not None and self.data_parallel != "ssp":
            raise OptionError(
                "staleness is a bound of data_parallel 'ssp', but data_parallel is "
                f"{self.data_parallel!r}: pin 'ssp', or drop staleness"
            )

    def _check_replicas(self) -> None:
        """What goes with stages that are replicated one by one; pins ``replicas`` and ``pp``."""
        if not self.replicated:
            return
        if self.data_parallel in ASYNCHRONOUS and self.replicas is None and self.dp is not None:
            object.__setattr__(self, "replicas", (self.dp,))
        elif self.dp not in (None, 1) and self.data_parallel not in ASYNCHRONOUS:
            raise OptionError(
                f"stages that are replicated one by one expect dp to be 1 but it is {self.dp}: pin "
                "replicas instead, such as (2, 2) for two stages on two ranks each"
            )
        for axis in ("tp", "cp", "ep", "virtual_stages"):
            if getattr(self, axis) not in (None, 1):
                raise OptionError(
                    "stale training and stages that are replicated one by one expect "
                    f"{axis} to be 1 but it is {getattr(self, axis)}: drop one of the two pins"
                )
        if self.data_parallel not in (None, "ddp", *ASYNCHRONOUS):
            raise OptionError(
                "stages that are replicated one by one hold weights and optimizer state whole, but "
                f"data_parallel is {self.data_parallel!r}: drop one of the two pins"
            )
        _validate_replicas(self.replicas)
        if self.data_parallel in ASYNCHRONOUS:
            if self.pp not in (None, 1) or len(self.replicas or (1,)) != 1 or self.schedule not in (
                None, "none"
            ):  # fmt: skip
                raise OptionError(
                    f"data_parallel {self.data_parallel!r} is of models that lie whole on every "
                    f"worker, but pp={self.pp}, schedule={self.schedule!r} and replicas="
                    f"{self.replicas} are pinned: drop them"
                )
            object.__setattr__(self, "pp", 1)
            object.__setattr__(self, "dp", None)
            return
        if self.schedule is None:
            object.__setattr__(self, "schedule", "1f1b")
        if self.schedule not in versioned.SCHEDULES:
            raise OptionError(
                f"stages that are replicated one by one expect schedule to be one of "
                f"{', '.join(versioned.SCHEDULES)} but it is {self.schedule!r}: choose one of them"
            )
        if self.replicas is not None:
            if self.pp not in (None, len(self.replicas)):
                raise OptionError(
                    f"constraint replicas={self.replicas} has {len(self.replicas)} stages but pp "
                    f"is {self.pp}: drop one of the two pins"
                )
            object.__setattr__(self, "pp", len(self.replicas))

    def _check_pipeline(self) -> None:
        """Pins of pipeline ranks, chunks, schedule and stages agree; stages pin ``pp``."""
        if self.virtual_stages is not None and self.schedule is None and self.virtual_stages > 1:
            object.__setattr__(self, "schedule", "interleaved-1f1b")
        if self.schedule is not None:
            least = schedules.SCHEDULES[self.schedule].least_virtual
            if self.virtual_stages is None and schedules.SCHEDULES[self.schedule].folds:
                object.__setattr__(self, "virtual_stages", least)
            schedules.check_virtual_stages(self.schedule, self.virtual_stages or 1)
            if self.data_parallel is not None and (self.dp or 2) > 1:
                splits = schedules.SCHEDULES[self.schedule].splits
                schedules.check_data_parallel(splits, self.data_parallel)
        chunks = self.virtual_stages or 1
        if self.replicas is not None:
            object.__setattr__(self, "replicas", tuple(self.replicas))
        if self.stages is not None and self.pp is None and len(self.stages) % chunks == 0:
            object.__setattr__(self, "pp", len(self.stages) // chunks)
        if self.stages is not None and len(self.stages) != (self.pp or 0) * chunks:
            times = f" with {chunks} virtual stages each" if chunks > 1 else ""
            raise OptionError(
                f"constraint stages has {len(self.stages)} entries but pp is {self.pp}{times}: "
                "give one number of segments per stage"
            )
        if self.schedule == "none" and (self.pp or 1) > 1:
            raise OptionError(
                f"schedule 'none' means one stage, but pp is {self.pp}: pin pp=1, or another "
                "schedule (gpipe, 1f1b)"
            )
        if chunks > 1 and self.pp == 1:
            raise OptionError(
                f"virtual_stages={chunks} are chunks of a pipeline's ranks, but pp is pinned to 1: "
                "drop one of the two pins"
            )

    @property
    def pins(self) -> dict[str, object]:
        """What was pinned, for the plan."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        default = Constraints()
        return {name: v for name, v in found.items() if v != getattr(default, name)}

    @staticmethod
    def of(value: Constraints | Mapping[str, object] | None) -> Constraints:
        """From ``None``, a mapping, or constraints.

        Raises:
            OptionError: unknown names (with the closest known one) or bad values.
        """
        if value is None:
            return Constraints()
        if isinstance(value, Constraints):
            return value
        if not isinstance(value, Mapping):
            raise OptionError(
                f"constraints expects a mapping such as {{'tp': 2}} but got {type(value).__name__}"
            )
        known = [f.name for f in fields(Constraints)]
        for name in value:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise OptionError(f"unknown constraint {name!r}{hint} (known: {', '.join(known)})")
        return Constraints(**value)  # type: ignore[arg-type]


def _validate_recompute_ops(patterns: object, recompute: str | None) -> None:
    if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) for p in patterns):
        raise OptionError(
            "constraint recompute_ops expects names or patterns of ops such as ('*softmax*',) but "
            f"got {patterns!r}"
        )
    if patterns and recompute not in (None, "selective"):
        raise OptionError(
            f"constraint recompute_ops names what is recomputed, but recompute is {recompute!r}: "
            "drop one of the two pins, or set recompute to 'selective'"
        )


def _validate_stages(stages: object) -> None:
    if stages is None:
        return
    numbers = list(stages) if isinstance(stages, (tuple, list)) else []
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise OptionError(
            f"constraint stages expects a number of segments per stage such as (3, 4) but got "
            f"{stages!r}"
        )


def _validate_replicas(replicas: object) -> None:
    if replicas is None:
        return
    numbers = list(replicas) if isinstance(replicas, (tuple, list)) else []
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise OptionError(
            "constraint replicas expects a number of ranks per stage such as (3, 1) but got "
            f"{replicas!r}"
        )


def _validate_sharding(sharding: object, tp: int | None) -> None:
    if not isinstance(sharding, Mapping):
        raise OptionError(
            "constraint sharding expects a mapping such as {'lm_head.weight': 'S(0)'} but got "
            f"{sharding!r}"
        )
    for name, text in sharding.items():
        try:
            state = State.parse(str(text))
        except ValueError as error:
            raise OptionError(f"constraint sharding[{name!r}]: {error}") from error
        if state.is_split and tp == 1:
            raise OptionError(
                f"constraint sharding[{name!r}]={text} splits over the tensor axis, but tp is "
                "pinned to 1: drop one of the two pins"
            )


def _validate_choice(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise OptionError(f"{name} expects one of {', '.join(allowed)} but got {value!r}")


def validate_world_size(world_size: object, constraints: Constraints) -> int:
    """The world size, checked against the pinned degrees.

    Raises:
        OptionError: not a positive integer, or pins that no mesh of that size can hold.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise OptionError(
            f"world_size expects the number of devices, an integer of at least 1, but got "
            f"{world_size!r}"
        )
    if constraints.replicas is not None and sum(constraints.replicas) != world_size:
        raise OptionError(
            f"the pinned replicas {tuple(constraints.replicas)} hold {sum(constraints.replicas)} "
            f"ranks but world_size is {world_size}: change one of them"
        )
    if constraints.replicated:
        return world_size
    degrees = {axis: getattr(constraints, axis) for axis in AXES}
    pinned = {axis: degree for axis, degree in degrees.items() if degree}
    product = 1
    for degree in pinned.values():
        product *= degree
    text = " x ".join(f"{a}={d}" for a, d in pinned.items())
    if world_size % product:
        raise OptionError(
            f"the pinned mesh {text} holds {product} ranks, which does not divide "
            f"world_size={world_size}: change a pin or the world size"
        )
    if {"pp", "dp", "tp"} <= pinned.keys() and product != world_size:
        raise OptionError(
            f"the pinned mesh {text} holds {product} ranks but world_size is {world_size}: "
            f"leave one axis free, or use world_size={product}"
        )
    return world_size


def validate_precision(precision: str | None) -> str | None:
    """The precision, if it is one that there is.

    Raises:
        OptionError: it is not.
    """
    if precision is not None and precision not in PRECISIONS:
        raise OptionError(
            f"precision expects None (as the parameters are) or one of {', '.join(PRECISIONS)} "
            f"but got {precision!r}"
        )
    return precision


def validate_costs(costs: object, cluster: Cluster) -> None:
    """Where costs come from: ``None``, ``"measured"``, or a cost model of the same cluster.

    Raises:
        OptionError: something else.
    """
    if costs is None or costs == MEASURED:
        return
    if isinstance(costs, str) or not hasattr(costs, "inner_collectives"):
        raise OptionError(
            f"costs expects None (computed from the cluster's figures), {MEASURED!r} or a "
            f"CostModel but got {costs!r}"
        )
    theirs = costs.cluster  # type: ignore[attr-defined]
    if theirs != cluster:
        raise OptionError(
            f"costs are for cluster {theirs.name!r} but cluster is {cluster.name!r}: give "
            "cluster=costs.cluster"
        )


def validate_numbers(*, global_batch_size: object, time_limit_s: object, seed: object) -> None:
    """The plain numbers of a call.

    Raises:
        OptionError: names the argument, what it expects and what it got.
    """
    wrong_size = isinstance(global_batch_size, bool) or not isinstance(global_batch_size, int)
    if global_batch_size is not None and (wrong_size or global_batch_size < 1):  # type: ignore[operator]
        raise OptionError(
            f"global_batch_size expects a positive number of samples but got {global_batch_size!r}"
        )
    wrong_limit = isinstance(time_limit_s, bool) or not isinstance(time_limit_s, (int, float))
    if time_limit_s is not None and (wrong_limit or not time_limit_s > 0):  # type: ignore[operator]
        raise OptionError(
            f"time_limit_s expects a positive number of seconds but got {time_limit_s!r}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise OptionError(f"seed expects an integer of at least 0 but got {seed!r}")


def validate_sharding_names(sharding: Mapping[str, str], program: Program) -> None:
    """Every pinned name is a parameter or op of the program, and has the pinned dim.

    Raises:
        OptionError: names the pin, with the closest known names.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for segment in program.segments:
        graph = segment.layer.graph
        for value in graph.parameters:
            shapes[segment.bindings[value.name]] = shapes[value.name] = value.type.shape
        for op in graph.ops:
            shapes[op.name] = shapes[f"{segment.layer.name}.{op.name}"] = op.output.type.shape
    for pattern, text in sharding.items():
        matches = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matches:
            close = difflib.get_close_matches(pattern, shapes, 3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise OptionError(
                f"constraint sharding[{pattern!r}] matches no parameter or op of "
                f"{program.model_name}{hint}"
            )
        state = State.parse(text)
        short = [name for name in matches if state.is_split and state.dim >= len(shapes[name])]
        if short:
            raise OptionError(
                f"constraint sharding[{pattern!r}]={text} splits dim {state.dim}, but {short[0]} "
                f"has shape {list(shapes[short[0]])}: name one of its {len(shapes[short[0]])} dims"
            )
