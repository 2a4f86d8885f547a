"""The configurations that are searched: mesh shapes, micro-batch sizes, schedules, ZeRO modes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autoshard.cluster import Cluster, Device
from autoshard.errors import OptionError
from autoshard.ir import Program
from autoshard.options import ASYNCHRONOUS, DATA_PARALLEL, Constraints
from autoshard.plan.context_axis import positions
from autoshard.plan.plan import Mesh
from autoshard.plan.stage_bounds import Looped, turns
from autoshard.schedules import SCHEDULES, WITH_SPLIT_BACKWARD, homes

VIRTUAL_STAGES = (1, 2, 4)
"""Chunks per pipeline rank that are searched; other numbers are left to pins."""

LONG = 16384
"""Positions from which on context parallelism is searched: there attention takes as long as all
else, and a sample's activations fill a device."""
MOST_CONTEXT = 16
"""Ranks that then share a sample at most (Llama 3's: Grattafiori et al. 2024, table 4)."""

LEFT_TO_PINS = frozenset({"none", "naive", "gpipe", "looped-bfs"})
"""Schedules that the search leaves to those who pin them, beside those with split backwards and
those with older weights: GPipe and its looped form take as long as 1F1B and interleaved 1F1B and
hold more, and one micro-batch after the other leaves all ranks but one idle. A split backward fills
bubbles that the flush at the end of a step, whose loss all ranks wait for, in part opens again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One point of the outer search.

    Attributes:
        virtual_stages: chunks of the model on every pipeline rank.
        standalone: how many batches like the program's make up a step (1, unless samples interact
            and the user allows it); their micro-batches are counted together.
        workers: ranks that are dealt to stages one by one, which the stage program decides; 0: the
            mesh's. ``replicas`` is how.
    """

    mesh: Mesh
    micro_batch_size: int
    num_micro_batches: int
    schedule: str
    data_parallel: tuple[str, ...]
    virtual_stages: int = 1
    standalone: int = 1
    workers: int = 0
    replicas: tuple[int, ...] = ()

    def turns(self, stage: int) -> int:
        """Micro-batches of a step that one rank of a stage runs."""
        return self.num_micro_batches // (self.replicas[stage] if self.replicas else 1)

    @property
    def kind(self) -> tuple[Mesh, str, int]:
        """What runner-up plans differ in from each other."""
        return self.mesh, self.schedule, self.virtual_stages

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, over all ranks."""
        return self.mesh.pp * self.virtual_stages

    @property
    def homes(self) -> tuple[int, ...]:
        """The pipeline rank of every stage."""
        return homes(self.schedule, self.mesh.pp, self.virtual_stages)

    @property
    def looped(self) -> Looped:
        """The schedule as bounds know it."""
        return Looped(
            self.schedule, self.mesh.pp, self.num_micro_batches, self.virtual_stages
        )  # fmt: skip

    def least_s(self, seconds: float) -> float:
        """The shortest step whose micro-batches take ``seconds`` each, over all stages."""
        return seconds * turns(self.looped)

    def pace(self, device: Device) -> float:
        """Seconds of a rank's compute, over what they are while all ranks compute at once.

        Below 1 where ranks of a pipeline share cores: of ``share`` of a core's time for each, those
        that compute get what those that wait in the bubble leave.
        """
        if device.share == 1 or self.workers:
            return 1.0
        busy = self.num_micro_batches / self.mesh.pp / turns(self.looped)
        return max(device.share, busy)

    @property
    def paces(self) -> int:
        """Over how many micro-batches what is summed once per step is spread, if stages are equal.

        ``m + p - 1`` under schedules that have that closed form; others may have no bubble.
        """
        bubble = self.mesh.pp - 1 if SCHEDULES[self.schedule].closed_form else 0
        return self.num_micro_batches + bubble

    @property
    def parts(self) -> int:
        """Micro-batches that the program's own batch is cut into on a data-parallel rank."""
        return self.num_micro_batches // self.standalone

    def __str__(self) -> str:
        return (
            f"{self.mesh} micro-batch {self.micro_batch_size} "
            f"{self.schedule}{f' x{self.virtual_stages}' if self.virtual_stages > 1 else ''}"
        )


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def meshes(
    program: Program,
    world_size: int,
    constraints: Constraints,
    cluster: Cluster,
    num_samples: int,
) -> Iterator[Mesh]:
    """Every way to write the world size as pp x dp x cp x tp that the pins and the model allow.

    Context parallelism is searched for long sequences, and left to pins for others. So is expert
    parallelism, which the runtime cannot execute yet.

    Tensor parallelism stays within the innermost tier (a node) unless it is pinned: its
    collectives are on the critical path of every layer.
    """
    for cp in _context_degrees(program, world_size, constraints):
        yield from _meshes(program, world_size // cp, cp, constraints, cluster, num_samples)


def _context_degrees(program: Program, world_size: int, constraints: Constraints) -> list[int]:
    if constraints.cp is not None:
        return [constraints.cp] if world_size % constraints.cp == 0 else []
    if positions(program) < LONG:
        return [1]
    degrees = (2**k for k in range(MOST_CONTEXT.bit_length()))
    return [cp for cp in degrees if world_size % cp == 0 and positions(program) % cp == 0]


def _meshes(
    program: Program, ranks: int, cp: int, constraints: Constraints, cluster: Cluster,
    num_samples: int,
) -> Iterator[Mesh]:  # fmt: skip
    node = cluster.tiers[0].size or ranks * cp
    stages = _parts_with_parameters(program)
    for tp in divisors(ranks):
        if tp != (constraints.tp or tp) or (constraints.tp is None and tp > node):
            continue
        for pp in divisors(ranks // tp):
            dp = ranks // tp // pp
            if pp != (constraints.pp or pp) or dp != (constraints.dp or dp):
                continue
            if pp * (constraints.virtual_stages or 1) > stages:
                continue
            ep = constraints.ep or 1
            if num_samples % dp == 0 and dp % ep == 0:
                yield Mesh(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep)


def configurations(
    program: Program,
    world_size: int,
    constraints: Constraints,
    cluster: Cluster,
    *,
    coupled: bool,
    standalone: int = 1,
    num_samples: int | None = None,
) -> list[Configuration]:
    """The declared space.

    Args:
        standalone: see :class:`Configuration`.
        num_samples: per step, if not the program's batch.
        coupled: samples interact, so there is one micro-batch.

    Raises:
        OptionError: nothing is left, with the pins or sizes that contradict each other.
    """
    found = []
    num_samples = num_samples or program.batch_size
    if constraints.replicated:
        return _replicated(program, world_size, constraints, num_samples, coupled, standalone)
    parts = _parts_with_parameters(program)
    shapes = list(meshes(program, world_size, constraints, cluster, num_samples))
    for mesh in shapes:
        local = num_samples // mesh.dp
        for size in divisors(local):
            if size != (constraints.micro_batch_size or size):
                continue
            if (coupled and size != local) or program.batch_size % size:
                continue
            if coupled and mesh.cp != (constraints.cp or 1):
                continue
            for schedule, virtual_stages in _schedules(mesh, constraints, parts, cluster.device):
                found.append(
                    Configuration(
                        mesh=mesh, micro_batch_size=size,
                        num_micro_batches=local // size * standalone, standalone=standalone,
                        schedule=schedule, virtual_stages=virtual_stages,
                        data_parallel=_modes(mesh, constraints, schedule),
                    )
                )  # fmt: skip
    if not found:
        raise OptionError(
            _why_empty(program, world_size, constraints, shapes, coupled, num_samples)
        )
    return found


def _replicated(
    program: Program,
    world_size: int,
    constraints: Constraints,
    num_samples: int,
    coupled: bool,
    standalone: int,
) -> list[Configuration]:
    """Stages that are replicated one by one, by size of the micro-batches.

    Raises:
        OptionError: no size goes with the pins.
    """
    asynchronous = constraints.data_parallel in ASYNCHRONOUS
    updates_each = asynchronous or constraints.schedule == "pipedream"
    sizes = [num_samples] if updates_each or coupled else divisors(num_samples)
    pinned, replicas = constraints.micro_batch_size, constraints.replicas or (1,)
    found = [
        Configuration(
            mesh=Mesh(pp=len(replicas)), micro_batch_size=size,
            num_micro_batches=num_samples // size * standalone, standalone=standalone,
            schedule="none" if asynchronous else str(constraints.schedule),
            data_parallel=(constraints.data_parallel or "ddp",), workers=world_size,
        )
        for size in sizes
        if size == (pinned or size)
        and program.batch_size % size == 0
        and all(num_samples // size * standalone % r == 0 for r in replicas)
    ]  # fmt: skip
    if not found:
        raise OptionError(
            f"replicas {replicas} expect micro-batches that each stage's ranks can share, but "
            f"micro_batch_size={pinned} cuts {num_samples * standalone} samples into "
            f"{num_samples * standalone / (pinned or num_samples):g} of them"
            f"{' (samples interact in forward)' if coupled else ''}: change the global batch size "
            "or a pin"
        )
    return found


def _parts_with_parameters(program: Program) -> int:
    """The most stages that there can be."""
    return sum(bool(s.layer.graph.parameters) for s in program.segments)


def _schedules(
    mesh: Mesh, constraints: Constraints, parts: int, device: Device
) -> Iterator[tuple[str, int]]:
    """Schedules with their virtual stages: the pinned one, or all that run and could be best.

    On processors without an engine for copies, whose own time every transfer takes, more chunks per
    rank do not pay: there several are left to pins.
    """
    pinned, chunks = constraints.schedule, constraints.virtual_stages
    if constraints.stages is not None:  # their number says it
        chunks = chunks or 1
    if mesh.pp == 1:
        if pinned is None or SCHEDULES[pinned].closed_form:
            yield "none", chunks or 1
        return
    if pinned is not None:
        if pinned != "none":
            yield pinned, chunks or 1
        return
    for name, kind in SCHEDULES.items():
        if kind.splits or kind.stale or name in LEFT_TO_PINS:
            continue
        least, most = kind.least_virtual, kind.most_virtual or max(VIRTUAL_STAGES)
        menu = VIRTUAL_STAGES if device.kind == "cuda" else (1,)
        for virtual in (chunks,) if chunks else menu:
            if least <= virtual <= most and mesh.pp * virtual <= parts:
                yield name, virtual


def _modes(mesh: Mesh, constraints: Constraints, schedule: str) -> tuple[str, ...]:
    if constraints.data_parallel is not None:
        return (constraints.data_parallel,)
    if mesh.replicas == 1:
        return ("ddp",)
    return WITH_SPLIT_BACKWARD if SCHEDULES[schedule].splits else DATA_PARALLEL


def _why_empty(
    program: Program,
    world_size: int,
    constraints: Constraints,
    shapes: list[Mesh],
    coupled: bool,
    num_samples: int,
) -> str:
    pins = ", ".join(f"{k}={v}" for k, v in constraints.pins.items()) or "none"
    if not shapes:
        stages = _parts_with_parameters(program)
        experts = f" and be divided by ep={constraints.ep}" if constraints.ep else ""
        most = "pp" if constraints.virtual_stages is None else "pp times virtual_stages"
        return (
            f"no mesh pp x dp x cp x tp of {world_size} ranks fits: dp must divide the global "
            f"batch of {num_samples}{experts}, {most} may be at most {stages} (parts with "
            f"parameters), and the pins are: {pins}. Change a pin, the global batch size or the "
            "world size"
        )
    if coupled and constraints.micro_batch_size:
        return (
            f"micro_batch_size={constraints.micro_batch_size} would cut the batch although samples "
            "interact in forward; remove the pin, or set allow_coupled_micro_batches=True"
        )
    return (
        f"the pins ({pins}) leave nothing: micro_batch_size must divide the samples of a "
        f"data-parallel rank (global batch {num_samples} over dp="
        f"{sorted({m.dp for m in shapes})}), and schedule 'none' needs pp=1"
    )
