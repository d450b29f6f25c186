"""Convert every model of torchvision and timm, and write docs/coverage.md.

    python docs/benchmarks/sweep            # go on where it stopped; hours on one core
    python docs/benchmarks/sweep --report   # only the table, from the rows that are there
    python docs/benchmarks/sweep --failed   # the bad rows again
    python docs/benchmarks/sweep --refresh  # also rows that an older version of the code made

Rows are appended to docs/coverage.jsonl as they come, so it can be stopped at any time.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import signal
import sys
from pathlib import Path

# workers are forked, which wants a parent without threads; numpy and torch start theirs when imported
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from sweep import examine, report, rows, runner, zoo

DOCS = Path(__file__).parents[2]
OPS = ("depthwise", "group")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=(), metavar="GLOB", help="names, as 'timm:resnet*'")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="the K-th of N parts, each with its own --rows")
    parser.add_argument("--refresh", action="store_true", help="also rows made by another version of the code")
    parser.add_argument("--failed", action="store_true", help="only models that have a bad row")
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("--rows", type=Path, default=DOCS / "coverage.jsonl", help="the file of rows")
    parser.add_argument("--table", type=Path, default=DOCS / "coverage.md", help="the table")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a model")
    parser.add_argument("--gigabytes", type=float, default=14, help="memory limit of a model, 10^9 bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # so that the worker ends, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not arguments.report:
        examine.warm_up(OPS)
        # what is there now stays: collections in the workers need not look at it
        gc.collect()
        gc.freeze()
        part, parts = map(int, arguments.shard.split("/"))
        runner.sweep(
            zoo.entries(arguments.only)[part - 1 :: parts],
            OPS,
            path=arguments.rows,
            limits=runner.Limits(arguments.seconds, arguments.gigabytes * 1e9),
            refresh=arguments.refresh,
            failed=arguments.failed,
            tell=functools.partial(print, flush=True),
        )
    if arguments.rows.exists():
        rows.compact(arguments.rows)
    report.write(arguments.rows, arguments.table)


if __name__ == "__main__":
    main()
