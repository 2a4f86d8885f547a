"""Which samples a rank gets, and what a wrong batch is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from autoshard.errors import OptionError
from autoshard.ir import TensorType, Value
from autoshard.runtime import data

VALUES = (
    Value("ids", TensorType((8, 3), torch.int64, per_sample=True)),
    Value("table", TensorType((5,), torch.float32)),
)


def good(size: int = 8) -> dict[str, torch.Tensor]:
    return {"ids": torch.arange(size * 3).view(size, 3), "table": torch.ones(5)}


def test_runs_of_samples() -> None:
    parts = [data.local_batch(good(), VALUES, rank=r, size=2) for r in range(2)]
    assert torch.equal(torch.cat([p["ids"] for p in parts]), good()["ids"])
    assert all(torch.equal(p["table"], torch.ones(5)) for p in parts)
    micro = data.micro_batches(parts[1], VALUES, 4)
    assert [m["ids"].shape for m in micro] == [(1, 3)] * 4
    assert torch.equal(torch.cat([m["ids"] for m in micro]), parts[1]["ids"])


def test_sequences_and_nones() -> None:
    batch = data.local_batch((good()["ids"], torch.ones(5)), VALUES, rank=0, size=1)
    assert list(batch) == ["ids", "table"]
    assert list(data.named_batch({**good(), "mask": None}, VALUES)) == ["ids", "table"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": good()["ids"]}, "add table"),
        ({**good(), "mask": torch.ones(8)}, "remove mask"),
        (3, "a batch as a dict of tensors but got int"),
        ((torch.ones(8),), "2 tensors \\(ids, table\\) but got 1"),
        ({**good(), "table": [1.0]}, "'table'\\] to be a tensor but got list"),
        (good(7), "to have 8 samples but got 7 samples; pass 8 samples"),
        ({**good(), "ids": torch.zeros(8, 4, dtype=torch.int64)}, "shape \\(8, 3\\) but got"),
        ({**good(), "ids": torch.zeros(8, 3)}, "dtype torch.int64 but got torch.float32"),
        ({**good(), "table": torch.ones(6)}, "shape \\(5,\\)"),
    ],
)  # fmt: skip
def test_wrong_batches(batch: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        data.local_batch(batch, VALUES, rank=0, size=2)


def test_global_batch_given_to_one_rank() -> None:
    with pytest.raises(OptionError, match=r"have 4 samples but got 8 samples.*local_batch"):
        data.check_batch(good(), VALUES, 2)


@given(
    length=st.integers(1, 60),
    steps_of=st.integers(1, 4),
    size=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
    skip=st.integers(0, 30),
)
def test_ranks_together_take_the_global_batches(
    length: int, steps_of: int, size: int, shuffle: bool, epoch: int, skip: int
) -> None:
    """Step k of all ranks is the k-th global batch of one rank, also after a resume."""
    global_size = steps_of * size
    if length < global_size:
        with pytest.raises(OptionError, match="at least one global batch"):
            data.GlobalBatchSampler(range(length), global_size, size=size)
        return

    def make(rank: int, size: int) -> data.GlobalBatchSampler:
        made = data.GlobalBatchSampler(
            range(length), global_size, rank=rank, size=size, seed=5, shuffle=shuffle
        )
        made.set_epoch(epoch)
        return made

    alone = list(make(0, 1))
    assert len(alone) == len(set(alone)) == length // global_size * global_size
    parts = [list(make(rank, size)) for rank in range(size)]
    local = global_size // size
    for step in range(length // global_size):
        together = [i for part in parts for i in part[step * local : (step + 1) * local]]
        assert together == alone[step * global_size : (step + 1) * global_size]
    resumed = make(0, 1)
    step = epoch * resumed.steps_per_epoch + skip % resumed.steps_per_epoch
    resumed.resume_at(step)
    assert list(resumed) == alone[skip % resumed.steps_per_epoch * global_size :]
    assert len(resumed) == len(list(resumed))
    copy = make(0, 1)
    copy.load_state_dict(resumed.state_dict())
    assert list(copy) == list(resumed)


def test_shuffles_anew_each_epoch() -> None:
    sampler = data.GlobalBatchSampler(range(50), 10, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) and first != list(sampler)
    assert list(data.GlobalBatchSampler(range(50), 10, shuffle=False)) == list(range(50))


def test_with_a_loader() -> None:
    sampler = data.GlobalBatchSampler(range(10), 4, rank=1, size=2, shuffle=False)
    loader = DataLoader(list(range(10)), batch_size=sampler.local_batch_size, sampler=sampler)
    assert [batch.tolist() for batch in loader] == [[2, 3], [6, 7]]


def test_global_batch_that_ranks_cannot_share() -> None:
    with pytest.raises(OptionError, match="choose a multiple of 4"):
        data.GlobalBatchSampler(range(100), 6, size=4)
