"""What would be captured wrongly without a word is refused here, with the line and a cure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import nn

from autoshard.capture.source import current_location
from autoshard.errors import CaptureError

_WRAPPERS = {
    "DistributedDataParallel": "pass the model it wraps (`model.module`)",
    "DataParallel": "pass the model it wraps (`model.module`)",
    "FullyShardedDataParallel": "pass the model before it is wrapped",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``; distributed wrappers are refused.

    Raises:
        CaptureError: for DDP, DataParallel and both kinds of FSDP.
    """
    while isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        model = model._orig_mod
    for path, module in model.named_modules():
        if cure := _WRAPPERS.get(type(module).__name__):
            raise CaptureError(
                f"expected a plain model but {_show(path)} is a {type(module).__name__}: autoshard "
                f"distributes the model itself; {cure}"
            )
        if type(module).__name__.startswith("FSDP") and hasattr(module, "reshard"):
            raise CaptureError(
                f"expected a plain model but {_show(path)} is already sharded by fully_shard; "
                "pass the model before fully_shard is applied"
            )
    return model


def check_module(model: nn.Module) -> tuple[str, ...]:
    """Refuse what a forward graph cannot hold; notes on what it holds in another way.

    Raises:
        CaptureError: lazy parameters, backward hooks, hooks on parameters.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise CaptureError(
                f"parameter {name} is uninitialized (a lazy module); run the model on one batch "
                "before capturing it"
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise CaptureError(
                f"parameter {name} has a gradient hook, which a captured graph would lose; remove "
                "it and apply it to the gradients in the training loop"
            )
    notes = []
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"module {_show(path)} has a backward hook, which a captured graph would lose; "
                "remove it or write it as a torch.library custom op with register_autograd"
            )
        if isinstance(module, nn.SyncBatchNorm):
            notes.append(
                f"{_show(path)} is a SyncBatchNorm: captured as batch norm over the whole batch"
            )
        notes += [
            f"buffer {name} of {_show(path)} is on the meta device and not in state_dict: planning "
            "needs no values, training does (build the model on a real device there)"
            for name in module._non_persistent_buffers_set
            if (buffer := module._buffers.get(name)) is not None and buffer.is_meta
        ]
    return tuple(notes)


def _show(path: str) -> str:
    return path or "the model"


class CheckpointWishes:
    """Where the user's code asked for activation checkpointing while it was traced."""

    def __init__(self) -> None:
        self.places: list[str] = []

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.places:
            return ()
        return (
            f"activation checkpointing in the model ({len(self.places)} calls, first at "
            f"{self.places[0]}) is not kept: what is recomputed is up to the plan",
        )


@contextlib.contextmanager
def guarded() -> Iterator[CheckpointWishes]:
    """While active: custom backward code raises, checkpointed regions run as plain code."""
    wishes = CheckpointWishes()
    with (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(_function_guard(wishes))),
        mock.patch.object(
            torch.utils.checkpoint,
            "_checkpoint_without_reentrant_generator",
            _plain_checkpoint(wishes),
        ),
        mock.patch.object(torch.Tensor, "register_hook", _refuse_hook),
        # The program is about the whole batch, whose statistics are what SyncBatchNorm computes.
        mock.patch.object(nn.SyncBatchNorm, "forward", nn.modules.batchnorm._BatchNorm.forward),
    ):
        yield wishes


def _function_guard(wishes: CheckpointWishes) -> Callable[..., Any]:
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is torch.utils.checkpoint.CheckpointFunction:
            wishes.places.append(current_location())
            return args[0](*args[2:])  # (function, preserve_rng_state, *inputs)
        if cls.__module__.split(".")[0] == "torch":
            return original.__get__(None, cls)(*args, **kwargs)
        raise CaptureError(
            f"{current_location()}: {cls.__qualname__} is a custom autograd.Function, whose "
            "backward a captured graph would lose; write it as a torch.library.custom_op with "
            "register_autograd, or as plain torch code"
        )

    return apply


def _plain_checkpoint(wishes: CheckpointWishes) -> Callable[..., Iterator[None]]:
    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        wishes.places.append(current_location())
        yield

    return generator


def _refuse_hook(self: torch.Tensor, hook: object) -> None:
    raise CaptureError(
        f"{current_location()}: Tensor.register_hook in forward would be lost in a captured graph; "
        "write the gradient's change as a torch.library.custom_op with register_autograd"
    )
