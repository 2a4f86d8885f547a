"""A user's training script, as in the README, for the tests of resuming; fails as it is told."""

from __future__ import annotations

import os
import signal
import sys

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import autoshard

STEPS = 6


class Corpus(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(96, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def fail(how: str, step: int) -> None:
    """Rank 3 in the middle of training, the first time that torchrun starts it."""
    if not how or step != 3:
        return
    if os.environ["RANK"] == "3" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise ValueError("this sample is broken")


def main(folder: str, how: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96, n_positions=16, n_embd=32, n_layer=4, n_head=4, bos_token_id=1,
            eos_token_id=1,
        )
    )  # fmt: skip
    ids = torch.zeros(8, 16, dtype=torch.int64)
    parallel = autoshard.compile(
        model, world_size=4, example_inputs={"input_ids": ids, "labels": ids},
        constraints={"pp": 2, "dp": 2, "micro_batch_size": 2, "data_parallel": "zero1"},
    )  # fmt: skip
    parallel.set_scheduler(lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5))
    if parallel.load(folder, missing_ok=True) and parallel.is_main:
        print(f"resumed at step {parallel.steps_done}", flush=True)

    sampler = parallel.sampler(Corpus())
    loader = DataLoader(Corpus(), batch_size=sampler.local_batch_size, sampler=sampler)
    while parallel.steps_done < STEPS:
        sampler.resume_at(parallel.steps_done)
        for batch in loader:
            fail(how, parallel.steps_done)
            loss = parallel.step(batch)
            if parallel.is_main:
                print(f"step {parallel.steps_done}: loss {loss!r}", flush=True)
            if parallel.steps_done % 2 == 0:
                parallel.save(folder, keep=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
