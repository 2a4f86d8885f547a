"""What all ranks must be given alike: checks that turn a silently wrong run into an error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from autoshard.errors import OptionError


def fingerprint(tensors: Mapping[str, Tensor]) -> int:
    """A number below 2**52 (so that a float64 holds it) that depends on every bit and its place."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_hash(tensor)}".encode())
    return int.from_bytes(digest.digest(), "little") >> 12


def _hash(tensor: Tensor) -> int:
    """Of the elements in order; runs on the tensor's device."""
    if tensor.numel() == 0:
        return 0
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padding = -flat.numel() % 8
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    words = flat.view(torch.int64)
    # Each word is mixed with its place (the finaliser of SplitMix64), so that swaps are seen, too.
    mixed = words + torch.arange(words.numel(), device=words.device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return int((mixed ^ (mixed >> 31)).sum())


def check_model_alike(tensors: Mapping[str, Tensor]) -> None:
    """Every rank starts from the same model; collective over all ranks.

    Each rank takes its parts of parameters from its own copy of the user's model. If the copies
    differ (another random seed per rank), parts of different models would train as one.

    Raises:
        OptionError: on every rank, naming the first tensor that differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    hashes = {name: _hash(tensor) for name, tensor in tensors.items()}
    alike: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(alike, hashlib.blake2b(repr(hashes).encode()).hexdigest())
    if len(set(alike)) == 1:
        return
    every: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, hashes)
    for rank, theirs in enumerate(every):
        for name in dict.fromkeys((*every[0], *theirs)):
            if every[0].get(name) != theirs.get(name):
                raise OptionError(
                    f"expected the same model on every rank but {name!r} on rank {rank} differs "
                    "from rank 0; call torch.manual_seed with one seed before building it, or "
                    "load the same weights on every rank"
                )
