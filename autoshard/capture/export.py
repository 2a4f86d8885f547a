"""From a model to the raw graph of ``torch.export``, without touching or allocating the model.

Parameters and buffers are replaced by fake tensors for the time of the export, so a model on the
meta device, on a GPU or in memory gives the same graph.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autoshard.capture.batch import BatchLayout, LossFn
from autoshard.capture.guards import guarded
from autoshard.capture.huggingface import training_branches
from autoshard.capture.repeats import NotRepeatable, Repeats, expand
from autoshard.capture.source import location_of_error
from autoshard.errors import CaptureError

PREFIX = "model."
"""Qualified names in the exported graph start with this: the model is a child of the wrapper."""
_GIVE_A_LOSS = (
    "pass loss_fn=lambda output, batch: ..., or let forward return the scalar loss (Hugging Face "
    "models do when example_inputs has labels)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The raw graph, and what was noticed while it was traced."""

    program: torch.export.ExportedProgram
    notes: tuple[str, ...]


class _TrainingStep(nn.Module):
    """The model and its loss as one forward on a flat list of tensors."""

    def __init__(self, model: nn.Module, layout: BatchLayout, loss_fn: LossFn | None) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.loss_fn = loss_fn

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        batch = self.layout.rebuild(tensors)
        args, kwargs = self.layout.arguments(batch)
        return loss_of(self.model(*args, **kwargs), batch, self.loss_fn)


def loss_of(output: Any, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
    """The scalar that training minimises.

    Raises:
        CaptureError: there is none, or it is no scalar.
    """
    if loss_fn is not None:
        loss, where = loss_fn(output, batch), "loss_fn returned"
    else:
        loss, where = _own_loss(output), "the model's loss is"
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        cure = _GIVE_A_LOSS if loss_fn is None else "return one number, such as the mean"
        raise CaptureError(f"expected a scalar floating-point loss but {where} {what}; {cure}")
    return loss.reshape(())


def _own_loss(output: Any) -> torch.Tensor:
    candidates: list[Any]
    if isinstance(output, torch.Tensor):
        candidates = [output]
    elif (loss := getattr(output, "loss", None)) is not None:
        candidates = [loss]
    elif isinstance(output, dict):
        candidates = [output["loss"]] if output.get("loss") is not None else []
    else:
        items = output if isinstance(output, (tuple, list)) else ()
        candidates = [t for t in items if isinstance(t, torch.Tensor) and t.ndim == 0]
    if len(candidates) != 1:
        raise CaptureError(
            f"no loss: the model returned {type(output).__name__} without a loss; {_GIVE_A_LOSS}"
        )
    return candidates[0]  # type: ignore[no-any-return]


def export(model: nn.Module, layout: BatchLayout, loss_fn: LossFn | None) -> Exported:
    """Trace one training step, forward only, in training mode; the model is as before afterwards.

    Raises:
        CaptureError: the model cannot be traced; names the user's line and the cure.
    """
    if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()):
        raise CaptureError(
            "loss_fn is a module with parameters, which no optimizer would be given; make it a "
            "part of the model"
        )
    try:
        return _exported(model, layout, loss_fn, Repeats())
    except NotRepeatable:
        return _exported(model, layout, loss_fn, None)


def _exported(
    model: nn.Module, layout: BatchLayout, loss_fn: LossFn | None, repeats: Repeats | None
) -> Exported:
    """One export; equal layers are traced once if there is a record of ``repeats``."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with mode:
        inputs = tuple(
            torch.empty(shape, dtype=dtype)
            for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
        )
    notes: list[str] = []
    step = _TrainingStep(model, layout, loss_fn)
    with (
        _random_state_kept(),
        _training_mode(model),
        training_branches(model, notes),
        _fake_tensors(model, mode),
        repeats.tracing(model) if repeats else contextlib.nullcontext(),
        guarded() as wishes,
        _no_garbage_collection(),
        _no_tracebacks(),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*were assigned during export.*")
        try:
            program = torch.export.export(step, inputs, strict=False)
            if repeats:
                expand(program.graph)
        except (CaptureError, NotRepeatable):
            raise
        except Exception as error:
            if repeats and repeats.used:  # without them it may succeed, or says what is wrong
                raise NotRepeatable(str(error)) from error
            raise _translated(error) from error
    return Exported(program=program, notes=(*notes, *wishes.notes))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Tracing makes millions of objects that all stay alive: looking at them costs a quarter."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """torch logs what its shape functions raise, too; the error itself says it better."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was_disabled


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    python = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)


@contextlib.contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode; a model that is in it keeps the submodules that the user put in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _fake_tensors(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Every parameter and buffer replaced by a CPU fake, one per tensor so that ties stay ties."""
    memo: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in memo:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = empty
        return memo[id(tensor)]

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in tables:
                stack.callback(_put_back, held, dict(held))
                held.update({k: fake(t) for k, t in held.items() if t is not None})
            if isinstance(module, nn.RNNBase):  # holds its weights in a list as well
                stack.callback(module.__dict__.__setitem__, "_flat_weights", module._flat_weights)
                module.__dict__["_flat_weights"] = [
                    getattr(module, name, None) for name in module._flat_weights_names
                ]
        yield


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    held.clear()
    held.update(before)


_ADVICE: tuple[tuple[str, str], ...] = (
    (
        "GuardOnDataDependent|data-dependent|DataDependentOutput|DynamicOutputShape",
        "Python control flow or a shape depends on tensor values; use torch.where or torch.cond, "
        'or hoist the decision out of forward (layerdrop=0, experts_implementation="grouped_mm")',
    ),
    (
        "SymFloat|SymInt|SymBool",
        "a tensor's value is read in forward (.item(), print or format); move that out of forward",
    ),
    (
        r"\.numpy\(\) is not supported|numpy",
        "forward leaves torch; use torch operations or a torch.library.custom_op",
    ),
    (
        "not a known type",
        "an object in the output or input is no pytree; return tensors, use_cache=False, or "
        "register the type with torch.utils._pytree.register_pytree_node",
    ),
    (
        "exported program constant|autograd.grad",
        "a gradient is taken inside forward, which cannot be captured as a forward graph",
    ),
    ("FlexAttention|flex_attention", 'use attn_implementation="sdpa"'),
)


def _translated(error: Exception) -> CaptureError:
    text = f"{type(error).__name__}: {error}"
    advice = next((cure for pattern, cure in _ADVICE if re.search(pattern, text)), "")
    first = text.strip().splitlines()[0][:300]
    where = location_of_error(error)
    return CaptureError(
        "; ".join(part for part in (f"cannot capture the model at {where or 'an unknown line'}",
                                    first, advice) if part)
    )  # fmt: skip
