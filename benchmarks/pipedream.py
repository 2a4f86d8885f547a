"""Splits of given PipeDream profiles, next to the published answers.

    python -m benchmarks.pipedream FOLDER [--machines N] [--bandwidth B]

FOLDER holds profiles as PipeDream's repository has them: ``NAME.graph.txt`` files, or
``NAME/graph.txt``. The command fails if a split is slower than the published optimiser's for the
same profile, machines and bandwidth, or takes longer than 5 s to find.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autoshard.profile import split_pipedream
from autoshard.profile.pipedream_split import ProfileSplit

GOAL_S = 5.0
"""To find a split."""
PUBLISHED_S = {
    ("alexnet", 4, 1e9): 0.0342171,
    ("densenet121", 4, 1e9): 0.089976,
    ("gnmt", 4, 1e9): 0.025868,
    ("gnmt_large", 4, 1e9): 0.137129,
    ("resnet18", 4, 1e9): 0.100004,
    ("resnet50", 4, 1e9): 0.162881,
    ("resnet101", 4, 1e9): 0.116555,
    ("resnext50", 4, 1e9): 0.201407,
    ("resnext101", 4, 1e9): 0.154141,
    ("squeezenet1_0", 4, 1e9): 0.074414,
    ("vgg16", 4, 1e9): 0.205521,
}
"""What PipeDream's optimiser answers (activation compression ratio 1), by profile, machines and
bandwidth, to the digits given. It was not run on the profiles that are missing, which have
too many cuts for it."""
ROUNDING = 1e-5
"""Relative, of those digits."""


def profiles(folder: Path) -> dict[str, Path]:
    """The profiles in a folder by name."""
    found = {p.name.removesuffix(".graph.txt"): p for p in folder.rglob("*.graph.txt")}
    found.update({p.parent.name: p for p in folder.rglob("graph.txt")})
    return dict(sorted(found.items()))


def row(name: str, split: ProfileSplit, published_s: float | None, seconds: float) -> list[str]:
    """One line of the table."""
    return [
        name,
        " + ".join(f"{len(s.nodes)}x{s.replicas}" for s in split.stages),
        f"{split.bottleneck_s:.6g}",
        f"{published_s:.6g}" if published_s else "",
        "yes" if split.optimal else f"within {split.bottleneck_s / split.bound_s - 1:.1%}",
        f"{seconds:.2f}",
    ]


def main() -> int:
    """Split every profile; 1 if an answer is worse than published, or late."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipedream", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--machines", type=int, default=4, metavar="N")
    parser.add_argument("--bandwidth", type=float, default=1e9, metavar="B", help="bytes/s")
    args = parser.parse_args()
    found = profiles(args.folder)
    if not found:
        parser.error(f"expected profiles (*.graph.txt) in {args.folder} but there are none")
    table = Table("profile", "nodes x replicas", "s", "published", "optimal", "found in s")
    failed = []
    for name, path in found.items():
        start = time.perf_counter()
        split = split_pipedream(path, args.machines, args.bandwidth)
        seconds = time.perf_counter() - start
        published_s = PUBLISHED_S.get((name, args.machines, args.bandwidth))
        table.add_row(*row(name, split, published_s, seconds))
        if published_s and split.bottleneck_s > published_s * (1 + ROUNDING):
            failed.append(f"{name}: {split.bottleneck_s:.6g} s, published {published_s:.6g} s")
        if seconds > GOAL_S:
            failed.append(f"{name}: found in {seconds:.1f} s, expected {GOAL_S:g} s")
    Console(width=120).print(table)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
