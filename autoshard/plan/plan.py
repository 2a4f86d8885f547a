"""The plan: everything that was decided, as plain data that a person can read and edit.

A plan is a frozen tree of dataclasses, saved as JSON. Hand-tuned and automatic plans are the same
thing: one has its choices pinned. Placements are text, as :class:`autoshard.placement.state.State`
prints them; strategies are text, as :class:`autoshard.placement.strategy.Strategy` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autoshard.cluster import Cluster
from autoshard.schedules import homes
from autoshard.versioned import Rules

PLAN_VERSION = 2
BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients that ``ddp`` reduces at once: torch DDP's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Degrees of pipeline, data, context and tensor parallelism, outermost axis first.

    ``tp`` lies on the fastest links: its collectives are in the way of every op. Then come ``cp``,
    whose collectives are in every layer, ``dp``, and ``pp``, whose ranks exchange least. ``ep``
    is no axis of its own: so many neighbouring data-parallel ranks share the experts of sparse
    layers.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def __str__(self) -> str:
        rare = "".join(f" {a}={n}" for a, n in (("cp", self.cp), ("ep", self.ep)) if n > 1)
        return f"pp={self.pp} dp={self.dp}{rare} tp={self.tp}"

    @property
    def replicas(self) -> int:
        """Ranks that have the same parameters, ``tp`` devices apart: gradients are summed over
        them, and ZeRO shards state over them."""
        return self.dp * self.cp


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """How one layer class lies on one mesh axis.

    Attributes:
        ops: op name -> strategy text.
        inputs: class input -> the state in which the layer receives it.
        parameters: class parameter -> its state at rest.
        outputs: class output -> the state in which the layer hands it on.
    """

    ops: Mapping[str, str]
    inputs: Mapping[str, str]
    parameters: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """What backward recomputes of a layer: ``none``, everything (``full``), or all but ``keep``."""

    mode: str = "none"
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """One segment of the program in a stage; ``index`` counts the program's segments."""

    index: int
    path: str
    layer: str
    recompute: Recompute = Recompute()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peak bytes of one rank, by kind."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One pipeline stage: its segments and what it is predicted to cost.

    A rank that has several stages holds the sum of their memory; what it holds once counts for the
    first of them.

    Attributes:
        forward_s, backward_s: per micro-batch, communication inside the stage included.
        communication_s: the part of both that tensor-parallel collectives take.
        send_bytes: what one micro-batch sends to the next stage, forward.
        replicas: ranks that take micro-batches of this stage in turn (besides the mesh's ``dp``).
        weight_versions: of this stage's weights that a rank holds at most.
    """

    segments: tuple[SegmentPlan, ...]
    forward_s: float
    backward_s: float
    communication_s: float
    send_bytes: int
    memory: Memory
    replicas: int = 1
    weight_versions: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """The collectives of one kind on one mesh axis that a rank takes part in during a step.

    Attributes:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` or ``send``.
        num_bytes: of the whole tensors, all calls together.
        seconds: of all calls.
        exposed_s: what they add to the step; the rest is hidden behind compute.
    """

    kind: str
    axis: str
    count: int
    num_bytes: int
    seconds: float
    exposed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Where a step goes on one pipeline rank: the parts add up to the predicted step.

    Attributes:
        recompute_s: collectives that are run again for it included.
        bubble_s: what the rank waits for others, sends aside.
    """

    compute_s: float
    recompute_s: float
    communication: tuple[Communication, ...]
    optimizer_s: float
    bubble_s: float

    @property
    def exposed_s(self) -> float:
        """Communication that the step waits for."""
        return sum(c.exposed_s for c in self.communication)

    @property
    def hidden_s(self) -> float:
        """Communication behind compute."""
        return sum(max(0.0, c.seconds - c.exposed_s) for c in self.communication)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """A value of a layer that changes its state on the way to some of its users.

    Attributes:
        forward, backward: what moves each way: a collective, or a local copy.
        num_bytes: of the value on one rank, before.
        seconds: of both ways, per micro-batch.
    """

    value: str
    users: tuple[str, ...]
    axis: str
    source: str
    target: str
    forward: str
    backward: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What one layer class costs one rank for one micro-batch.

    Attributes:
        op_s: forward and backward of each op, without conversions.
        saved_bytes: by op, what of its results is kept for backward without recompute.
        parameter_bytes: of each parameter, as it lies on the rank.
    """

    op_s: Mapping[str, float]
    saved_bytes: Mapping[str, int]
    parameter_bytes: Mapping[str, int]
    conversions: tuple[ConversionReport, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a step is predicted to cost.

    Attributes:
        parts: seconds of the step by kind: compute, collectives, pipeline bubble, sends, gradient
            reduction, optimizer.
        origin: share of the compute time that was ``measured``, ``analytic`` or ``assumed``.
        ranks: per pipeline rank, where its step goes.
        layers: by layer class, what it costs.
    """

    step_s: float
    peak_bytes: int
    parts: Mapping[str, float]
    origin: Mapping[str, float]
    ranks: tuple[Breakdown, ...] = ()
    layers: Mapping[str, LayerReport] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Another configuration that was considered, and why it lost."""

    mesh: Mesh
    micro_batch_size: int
    schedule: str
    data_parallel: str
    step_s: float | None
    peak_bytes: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A configuration that the search solved, with what it takes.

    Pinning its mesh, schedule, virtual stages, micro-batch size and (for those of a front)
    ``memory_bytes`` gives it as a plan, or a faster one: once a configuration cannot win, the
    search tries no leaner sharding for it.

    Attributes:
        recompute: segments by what backward recomputes of them (``none``, ``selective``, ``full``).
        step_s: predicted; the same simulation as :attr:`Prediction.step_s`.
        peak_bytes: of the device that holds most.
    """

    mesh: Mesh
    schedule: str
    virtual_stages: int
    micro_batch_size: int
    data_parallel: str
    recompute: Mapping[str, int]
    step_s: float
    peak_bytes: int

    @property
    def kind(self) -> tuple[Mesh, str, int]:
        """What runner-up plans differ in from each other: mesh, schedule, virtual stages."""
        return self.mesh, self.schedule, self.virtual_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverReport:
    """How the plan was found: bound and gap of the search, seconds by phase.

    Bound and gap speak of what plans are compared by: for pipelines of one stage per rank that is
    the closed form of :mod:`autoshard.plan.stages`, while the prediction simulates the schedule.
    """

    bound_s: float
    gap: float
    status: str
    seconds: Mapping[str, float]
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedOp:
    """An op that has no sharding rule (or no split one could use) and what that costs."""

    op: str
    target: str
    module: str
    source: str
    share_of_step: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that was decided for one model on one cluster.

    Attributes:
        program: fingerprint of the captured program that the plan is for.
        data_parallel: ``ddp``, ``zero1``, ``zero2`` or ``zero3``; or ``asp`` or ``ssp``, whose
            workers are the replicas of the only stage.
        bucket_bytes: of gradients that ``ddp`` reduces at once.
        vertical_sync: micro-batches meet weights of the same age in all stages.
        staleness: per stage by how many updates the weights that a gradient changes are ahead of
            those that it is of, at most; ``None``: by any number. Empty where training is exact.
        schedule: a name of :data:`autoshard.schedules.SCHEDULES`; ``none`` for one stage.
        virtual_stages: chunks of the model on every pipeline rank; ``stages`` has one entry per
            chunk, in the order of the model.
        layers: layer class -> axis (``dp``, ``micro``, ``tp``) -> assignment.
        coupled: where samples interact in forward, so that micro-batches would change the result.
        standalone: into how many batches of their own a step is cut because samples interact and
            the user allowed it, or because each makes an update; the loss is the mean over them.
            1: not cut, the result is exact.
        ssp_bound: minibatches that an ``ssp`` worker may be ahead of the slowest.
        runners_up: the fastest plan of other meshes and schedules, fastest first, among the
            configurations that the search solved: those that might have won, and where these are
            few the next ones by their bounds. One that was not solved may come before the later
            ones of them.
        front: seconds of a step against peak bytes of a device, fastest (the plan itself) first:
            Pareto-optimal among what the search solved, and not among all configurations. Beside
            what it solved to find the plan, that is two fast ones (no pipeline, or 1F1B) in less
            memory.
    """

    version: int = PLAN_VERSION
    program: str
    model: str
    cluster: Cluster
    world_size: int
    mesh: Mesh
    global_batch_size: int
    micro_batch_size: int
    schedule: str
    data_parallel: str
    precision: str
    optimizer: str
    seed: int
    layers: Mapping[str, Mapping[str, Assignment]]
    stages: tuple[StagePlan, ...]
    prediction: Prediction
    solver: SolverReport
    replicated: tuple[ReplicatedOp, ...] = ()
    coupled: tuple[str, ...] = ()
    virtual_stages: int = 1
    standalone: int = 1
    bucket_bytes: int = BUCKET_BYTES
    vertical_sync: bool = False
    staleness: tuple[int | None, ...] = ()
    ssp_bound: int | None = None
    notes: tuple[str, ...] = ()
    pins: Mapping[str, object] = field(default_factory=dict)
    runners_up: tuple[Alternative, ...] = ()
    front: tuple[Alternative, ...] = ()

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per data-parallel rank and step."""
        return self.global_batch_size // (self.mesh.dp * self.micro_batch_size)

    @property
    def replicas(self) -> tuple[int, ...]:
        """Ranks of every stage, apart from the mesh's."""
        return tuple(stage.replicas for stage in self.stages)

    @property
    def is_replicated(self) -> bool:
        """Stages are replicated one by one, or their weights have versions: other ranks than the
        mesh's, and the engine for that."""
        return max(self.replicas, default=1) > 1 or bool(self.staleness)

    @property
    def rules(self) -> Rules:
        """What a replicated pipeline's ranks do."""
        return Rules(
            schedule=self.schedule, replicas=self.replicas,
            num_micro_batches=self.num_micro_batches, vertical_sync=self.vertical_sync,
        )  # fmt: skip

    @property
    def homes(self) -> tuple[int, ...]:
        """The pipeline rank of every stage."""
        return homes(self.schedule, self.mesh.pp, self.virtual_stages)

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON and return the path written."""
        from autoshard.plan import files

        return files.save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanFileError: the file is missing, truncated, or of another version.
        """
        from autoshard.plan import files

        return files.load(Path(path))

    def diff(self, other: Plan) -> str:
        """What differs between two plans, one line per difference; empty if nothing does."""
        from autoshard.plan import files

        return files.diff(self, other)

    def explain(self, name: str) -> str:
        """Why an op, layer or parameter is placed as it is, and what it costs.

        Raises:
            OptionError: the plan has nothing of that name; suggests close ones.
        """
        from autoshard.report import explain

        return explain.explain(self, name)

    def print(self) -> None:
        """Print the plan to the terminal."""
        from autoshard.report import table

        table.show(self)

    def __rich__(self) -> object:
        from autoshard.report import table

        return table.render(self)

    def __str__(self) -> str:
        from autoshard.report import table

        return table.as_text(self)

    def _repr_html_(self) -> str:
        from autoshard.report import html

        return html.render(self)
