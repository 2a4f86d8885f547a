"""Readable Python source for every distinct stage, and a manifest of what else a run needs."""

from __future__ import annotations

import json
import linecache
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autoshard.emit.layer import ranges
from autoshard.emit.manifest import manifest
from autoshard.emit.stage import StageWriter
from autoshard.emit.text import docstring
from autoshard.errors import OptionError
from autoshard.ir import Program
from autoshard.passes import StageGraphs, stage_graphs
from autoshard.plan.plan import Plan

if TYPE_CHECKING:
    from autoshard.runtime.stage import BaseStage

MANIFEST = "manifest.json"
CONSTANTS = "constants.pt"


@dataclass(frozen=True, slots=True)
class Emitted:
    """What :func:`emit` made.

    Attributes:
        files: file name -> source.
        manifest: see :mod:`autoshard.emit.manifest`.
        constants: tensors that the model's code held, by name; they are loaded like parameters.
    """

    files: Mapping[str, str]
    manifest: Mapping[str, Any]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def write(self, folder: str | Path, *, force: bool = False) -> None:
        """Write all files and the manifest.

        Raises:
            OptionError: if one of the files is there already, unless ``force``.
        """
        folder = Path(folder)
        names = [*self.files, MANIFEST, *([CONSTANTS] if self.constants else [])]
        if not force:
            for name in names:
                if (folder / name).exists():
                    raise OptionError(
                        f"expected no file {folder / name} but there is one; "
                        "choose another folder or pass force=True"
                    )
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in self.files.items():
            (folder / name).write_text(source)
        (folder / MANIFEST).write_text(json.dumps(self.manifest, indent=2) + "\n")
        if self.constants:
            torch.save(dict(self.constants), folder / CONSTANTS)

    @staticmethod
    def read(folder: str | Path) -> Emitted:
        """What :meth:`write` wrote, edited or not."""
        folder = Path(folder)
        data = json.loads((folder / MANIFEST).read_text())
        names = dict.fromkeys(stage["file"] for stage in data["stages"])
        constants = folder / CONSTANTS
        return Emitted(
            files={name: (folder / name).read_text() for name in names},
            manifest=data,
            constants=torch.load(constants) if constants.exists() else {},
        )


def emit(program: Program, plan: Plan) -> Emitted:
    """Source and manifest of a planned program.

    Raises:
        OptionError: if the plan is for predictions only: it spreads experts over data ranks.
        InternalError: if a pass leaves something that is not legal.
    """
    if plan.mesh.ep > 1:
        raise OptionError(
            f"expected a plan with ep=1 but got ep={plan.mesh.ep}: experts spread over "
            "data-parallel ranks are for predictions only; plan without that pin (the tensor axis "
            "spreads experts, too)"
        )
    return emit_graphs(stage_graphs(program, plan))


def emit_graphs(graphs: StageGraphs) -> Emitted:
    """The same from graphs that the passes have been run on."""
    writers = [StageWriter(graphs, stage) for stage in graphs.stages]
    groups: dict[str, list[StageWriter]] = {}
    for writer in writers:
        groups.setdefault(writer.source(), []).append(writer)
    files: dict[str, str] = {}
    names: dict[int, str] = {}
    for source, group in groups.items():
        name = f"stage_{group[0].stage.index}.py"
        files[name] = _documented(source, group, graphs)
        names.update((w.stage.index, name) for w in group)
    listed = [names[w.stage.index] for w in writers]
    return Emitted(files, manifest(graphs, listed, writers), dict(graphs.program.constants))


def _documented(source: str, group: list[StageWriter], graphs: StageGraphs) -> str:
    """The source with its docstrings, which name the layers of all stages that share it."""
    plan, count = graphs.plan, len(graphs.stages)
    numbers = [str(w.stage.index) for w in group]
    which = f"Stage {numbers[0]}" if len(group) == 1 else f"Stages {', '.join(numbers)}"
    model = plan.model or graphs.program.model_name or "the model"
    cp = f", cp={plan.mesh.cp}" if plan.mesh.cp > 1 else ""
    mesh = f"pp={plan.mesh.pp}, dp={plan.mesh.dp}{cp}, tp={plan.mesh.tp}"
    parts = ranges([c.path for w in group for c in w.stage.calls])
    head = (
        f"{which} of {count} of {model}: {parts}.\n\n"
        f"Ranks: {mesh}. Micro-batches of {plan.micro_batch_size} samples, "
        f"{plan.num_micro_batches} "
        "per step and data-parallel rank. Shapes are those of one rank."
    )
    source = source.replace("@@header@@", "\n".join(docstring(head, 0)))
    for key, written in group[0].classes.items():
        paths = [c.path for w in group for c in w.layers if (c.layer, c.recompute.keep) == key]
        text = "\n".join(docstring(f"{ranges(paths)}.\n\n{written.document}", 4))
        source = source.replace(f"@@document {written.name}@@", text)
    stage = docstring("\n".join([f"{parts}."]), 4)
    return source.replace("@@document Stage@@", "\n".join(stage))


def load_stage(emitted: Emitted, index: int) -> type[BaseStage]:
    """The class of a pipeline stage; tracebacks through it show the emitted source."""
    file = emitted.manifest["stages"][index]["file"]
    source = emitted.files[file]
    name = f"autoshard_emitted_{abs(hash(source)):x}"
    if name not in sys.modules:
        path = f"<emitted {file} {name.rpartition('_')[2]}>"
        module = types.ModuleType(name)
        module.__file__ = path
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        exec(compile(source, path, "exec"), module.__dict__)
        sys.modules[name] = module
    stage: type[BaseStage] = sys.modules[name].Stage
    return stage


__all__ = ["Emitted", "emit", "emit_graphs", "load_stage"]
