"""The demo: plan a large model for a cluster, train a small one here, and check it.

``make demo`` plans Llama-3-8B for 64 H100 and prints the plan. Then it trains a small GPT-2 on real
text (the documentation that comes with Python) on 4 processes of this machine, as the planner
decides, and once more as plain PyTorch on one process. It prints predicted and measured step time
and memory, and ends with exit code 1 if the two loss curves differ.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NUM_PROCESSES = 4
STEPS = 20
BATCH_SIZE = 16
LENGTH = 128
SEED = 0
TOLERANCE = 1e-4
"""Of the loss in float32: sums in another order round differently."""
PROFILE_LIMIT_S = 60.0
FOLDER = Path("out/demo")
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """All parts in order; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.demo")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cluster", default="", help=argparse.SUPPRESS)
    parser.add_argument("--skip-large", action="store_true", help="do not plan Llama-3-8B")
    args = parser.parse_args()
    if args.rank:
        train_rank(args.cluster)
        return 0
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    FOLDER.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if not args.skip_large:
        plan_large()
    result = train_distributed(measure_machine())
    losses, seconds = train_plain()
    same = compare(result, losses, seconds)
    print(f"\nThe demo took {time.perf_counter() - start:.0f} s.")
    return 0 if same else 1


# -- 1. plan a large model ------------------------------------------------------------------------


def plan_large() -> None:
    """Llama-3-8B for 64 H100, with the command that a user would type."""
    command = [
        "plan",
        "--model",
        "llama3-8b",
        "--world-size",
        "64",
        "--cluster",
        "h100",
        "--precision",
        "bf16",
        "--global-batch-size",
        "512",
        "--save",
        str(FOLDER / "llama3-8b.json"),
        "--force",
    ]
    title(f"1. autoshard {' '.join(command)}")
    subprocess.run([sys.executable, "-m", "autoshard", *command], check=True, cwd=ROOT)


# -- 2. train a small model on 4 processes --------------------------------------------------------


def measure_machine() -> str:
    """A cluster file of this machine, measured by as many processes as will train; else a preset.

    All processes measure at once, because they will also compute at once.
    """
    title(f"2. Measure this machine, and train a small GPT-2 on {NUM_PROCESSES} processes")
    path = FOLDER / "machine.json"
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    try:
        torchrun("autoshard", "profile", str(path), timeout_s=PROFILE_LIMIT_S)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(f"could not measure ({type(error).__name__}); using the preset 'cpu'", flush=True)
        return "cpu"
    print(f"measured in {time.perf_counter() - start:.0f} s", flush=True)
    return str(path)


def train_distributed(cluster: str) -> dict[str, Any]:
    """What rank 0 recorded."""
    torchrun("benchmarks.demo", "--rank", "--cluster", cluster, timeout_s=240)
    result: dict[str, Any] = json.loads((FOLDER / "distributed.json").read_text())
    return result


def torchrun(module: str, *arguments: str, timeout_s: float) -> None:
    """``torchrun`` on this machine, one thread per process."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={NUM_PROCESSES}",
        "-m",
        module,
        *arguments,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "KINETO_LOG_LEVEL": "99",
        "AUTOSHARD_CACHE_DIR": str(FOLDER / "measurements"),
    }
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=timeout_s)


def train_rank(cluster: str) -> None:
    """One of the processes: an ordinary model, one compile, one loop."""
    import torch

    import autoshard
    from autoshard.commands.text import text_batch
    from benchmarks.peak_memory import held_bytes, peak_bytes

    parallel = autoshard.compile(
        small_model(),
        world_size=NUM_PROCESSES,
        cluster=cluster,
        example_inputs=text_batch(text(), 1, LENGTH, 0),
        global_batch_size=BATCH_SIZE,
        optimizer="adamw",
        costs="measured",
    )
    losses, seconds = [], []
    for step in range(STEPS):
        batch = parallel.local_batch(text_batch(text(), BATCH_SIZE, LENGTH, step))
        start = time.perf_counter()
        losses.append(parallel.step(batch))
        seconds.append(time.perf_counter() - start)
    last = parallel.local_batch(text_batch(text(), BATCH_SIZE, LENGTH, STEPS))
    tensors = [*parallel.module.state_dict().values(), *states(parallel.optimizer)]
    parallel.module.zero_grad(set_to_none=True)
    peak = held_bytes(tensors) + peak_bytes(lambda: parallel.step(last))
    peaks = torch.tensor([float(peak)])
    torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
    if parallel.is_main:
        print(parallel.plan, flush=True)
        parallel.plan.save(FOLDER / "gpt2.json")
        record = {
            "losses": losses,
            "seconds": statistics.median(seconds[1:]),
            "bytes": int(peaks.item()),
            "predicted_s": parallel.plan.prediction.step_s,
            "predicted_bytes": parallel.plan.prediction.peak_bytes,
        }
        (FOLDER / "distributed.json").write_text(json.dumps(record))


# -- 3. the same on one process -------------------------------------------------------------------


def train_plain() -> tuple[list[float], float]:
    """Losses and median step time of plain PyTorch on one process and one thread."""
    import torch

    from autoshard.commands.text import text_batch

    title("3. The same model, data and optimizer as plain PyTorch on one process")
    torch.set_num_threads(1)
    model = small_model()
    update = torch.optim.AdamW(model.parameters())
    losses, seconds = [], []
    for step in range(STEPS):
        batch = text_batch(text(), BATCH_SIZE, LENGTH, step)
        start = time.perf_counter()
        update.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        update.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, statistics.median(seconds[1:])


def compare(result: dict[str, Any], plain: list[float], plain_s: float) -> bool:
    """Print both curves, predicted and measured; whether the curves are the same."""
    distributed = result["losses"]
    largest = max(abs(a - b) for a, b in zip(distributed, plain, strict=True))
    same = largest <= TOLERANCE
    print(f"\nstep   {NUM_PROCESSES} processes   1 process   difference")
    for step, (a, b) in enumerate(zip(distributed, plain, strict=True), 1):
        if step == 1 or step % 5 == 0:
            print(f"{step:4d}   {a:11.6f}   {b:9.6f}   {abs(a - b):10.1e}")
    verdict = "the same curve" if same else "NOT the same curve"
    print(f"largest difference {largest:.1e}, tolerance {TOLERANCE:.0e}: {verdict}")
    mib = 2**20
    print(f"\n{NUM_PROCESSES} processes         predicted     measured")
    print(
        f"seconds per step   {result['predicted_s']:9.3f}    {result['seconds']:9.3f}"
        f"    (plain PyTorch on one: {plain_s:.3f})"
    )
    print(
        f"peak MiB per rank  {result['predicted_bytes'] / mib:9.1f}    {result['bytes'] / mib:9.1f}"
    )
    return same


# -- what both train ------------------------------------------------------------------------------


def small_model() -> Any:
    """GPT-2 with 4 layers of width 128 over bytes, the same parameters at every call.

    Without dropout: the plain model would draw other random numbers.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(
        n_layer=4,
        n_embd=128,
        n_head=4,
        vocab_size=256,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train()


def states(update: Any) -> list[Any]:
    """All tensors of an optimizer's state."""
    import torch

    kept = (value for state in update.state.values() for value in state.values())
    return [value for value in kept if isinstance(value, torch.Tensor)]


def text() -> Any:
    """Python's own documentation as byte tokens."""
    import torch

    joined = "\n\n".join(pydoc_data.topics.topics.values())
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def title(words: str) -> None:
    """A heading between the parts."""
    print(f"\n{words}\n{'-' * len(words)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
