"""``autoshard profile``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from autoshard.commands import shared
from autoshard.errors import LaunchError, OptionError

if TYPE_CHECKING:
    from autoshard.cluster import Cluster


class ProfileCommand:
    """Measure this machine and write a cluster file that plans can be made for.

    Measures the device's rates for matrix products, memory and kernel launches, and what each kind
    of collective takes between the processes, which are as many as will train: processes that share
    cores slow each other down. Under torchrun it uses the processes that are there, on all nodes.

    examples:
      autoshard profile here.json --processes 4
      autoshard plan --model gpt2 --world-size 4 --cluster here.json
      torchrun --nnodes 2 --nproc-per-node 8 ... -m autoshard profile cluster.json
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("path", type=Path, metavar="FILE.json", help="where to write")
        parser.add_argument(
            "--processes",
            type=int,
            metavar="N",
            help="how many to measure with; default: one per GPU or core. 1 measures no links",
        )
        parser.add_argument("--name", metavar="NAME", help="of the cluster; default: the device's")
        parser.add_argument("--force", action="store_true", help="overwrite FILE")

    def run(self, args: argparse.Namespace) -> None:
        if args.processes is not None and args.processes < 1:
            raise OptionError(f"--processes expects a positive number but got {args.processes}")
        shared.check_free(args.path, args.force)
        from autoshard.runtime import launch

        environment = launch.environment()
        if environment is None:
            number = args.processes or _devices()
            if number == 1:
                _measure(args)
                return
            from autoshard.commands import launching

            launching.run(number, args.argv)
        elif args.processes not in (None, environment.world_size):
            raise LaunchError(
                f"expected {args.processes} processes (--processes) but torchrun started "
                f"{environment.world_size}: drop --processes, or make them agree"
            )
        else:
            launch.start(environment.world_size)
            try:
                _measure(args)
            finally:
                launch.shut_down()


def _devices() -> int:
    import torch

    from autoshard.cluster import num_cores

    return torch.cuda.device_count() or num_cores()


def _measure(args: argparse.Namespace) -> None:
    import torch

    from autoshard.profile.machine import write_cluster
    from autoshard.runtime import launch

    torch.set_num_threads(1)
    cluster = write_cluster(args.path, name=args.name)
    environment = launch.environment()
    if environment is None or environment.rank == 0:
        print(_summary(cluster))
        print(f"wrote {args.path}", file=sys.stderr)


def _summary(cluster: Cluster) -> str:
    """What was measured, for people."""
    from autoshard.report.units import nbytes, seconds

    device = cluster.device
    rates = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in device.flops_per_s.items())
    lines = [
        f"device     {device.name}, {nbytes(device.memory_bytes)}",
        f"products   {rates} GFLOP/s; attention {device.attention_efficiency or 1:.0%} of it",
        f"memory     {device.bytes_per_s / 1e9:.3g} GB/s, {device.memory_efficiency:.0%} of it "
        "where results are allocated",
        f"launch     {seconds(device.launch_s)} per operation",
    ]
    for tier in cluster.tiers:
        kinds = ", ".join(
            f"{k} {seconds(tier.latency_s * tier.latency_factor.get(k, 1.0))} and "
            f"{tier.bytes_per_s * share / 1e9:.3g} GB/s"
            for k, share in tier.efficiency.items()
        )
        lines.append(f"{tier.name:10} per message: {kinds}")
    return "\n".join([*lines, f"links      {cluster.source}"])
