"""How long converting takes and how much memory, beside the bare work that cannot be avoided.

    python docs/benchmarks/convert.py            # the rows that convert.json lacks; about ten minutes on two cores
    python docs/benchmarks/convert.py --fresh    # all rows again
    python docs/benchmarks/convert.py --networks resnet18 --repeats 3
    python docs/benchmarks/convert.py --report   # only the page, from the rows that are there

The bare work is `copy.deepcopy`, the cheapest exact decomposition of every kernel, and a forward pass
of teacher and student in eval mode and, with a batch of two, in train mode; convert_work.py has it,
written from scratch. Rewrite and bare work take turns in one process, each first in every other
round. Peak memory is that of a fresh process each, above what it held with the network loaded and the
code imported. The peer is torch-pruning (extra `bench`). Linux only: the peaks come from /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# measurements are forked off, which wants a parent without threads
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import convert_report
import convert_work as work
import torch
import torch_pruning
import torchvision
from torch import Tensor, nn

import convsurgeon as cs

ROWS = Path(__file__).parent / "convert.json"
PAGE = Path(__file__).parent / "convert.md"
NETWORKS = ("resnet18", "resnet152", "vgg16_bn", "densenet201", "deeplabv3_resnet101", "convnext_large")
EVERY_OP = "vgg16_bn"
THREADS = (1, 2)
IMAGE = (1, 3, 224, 224)
PEER = "torch-pruning"


def ops_for(network: str) -> list[str]:
    """One network is converted with every op that has its bare work written down, the others with the default."""
    return [name for name in cs.ops.names() if name in work.BARE] if network == EVERY_OP else ["depthwise"]


def build(network: str) -> nn.Module:
    """Return a torchvision network with random weights."""
    torch.manual_seed(0)
    backbone = {"weights_backbone": None} if "deeplab" in network else {}
    return torchvision.models.get_model(network, weights=None, **backbone).eval()


def measure(network: str, threads: int, *, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each op and one for the peer."""
    model, image = build(network), torch.randn(IMAGE)
    common = {
        "network": network,
        "threads": threads,
        "model_mb": sum(t.nbytes for t in model.state_dict().values()) / 1e6,
        "environment": environment(),
    }
    rows = []
    for op in ops_for(network):
        decisions = list(cs.plan(model, op, example_inputs=image).converted)
        warm_up(op)
        row = {
            "op": op,
            "converted": len(decisions),
            **forked(threads, take_turns, model, op, decisions, image, repeats),
        }
        for kind, function in (
            ("rewrite", lambda op=op: work.rewrite(model, op, image)),
            ("bare", lambda decisions=decisions: work.bare(model, decisions, image)),
        ):
            row[kind]["peak_mb"] = [forked(threads, with_peak, function)["peak_mb"] for _ in range(2)]
        rows.append({**common, **row})
    peer = forked(threads, with_peak, lambda: work.prune(model, image))
    return [*rows, {**common, "op": PEER, "peer": peer}]


def warm_up(op: str) -> None:
    """Import and set up what the first call would, on a network of two layers."""
    tiny = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).eval()
    image = torch.randn(1, 3, 8, 8)
    work.bare(tiny, list(cs.plan(tiny, op).converted), image)
    work.rewrite(tiny, op, image)


def take_turns(model: nn.Module, op: str, decisions: list[Any], image: Tensor, repeats: int) -> dict[str, Any]:
    """Time both, `repeats` times in turn; what comes first alternates."""
    contenders: dict[str, Callable[[], Any]] = {
        "rewrite": lambda: work.rewrite(model, op, image),
        "bare": lambda: work.bare(model, decisions, image),
    }
    found: dict[str, Any] = {name: {"seconds": [], "stages": []} for name in contenders}
    with torch.no_grad():
        model(image)
    for turn in range(repeats):
        for name in sorted(contenders, reverse=bool(turn % 2)):
            gc.collect()
            started = time.perf_counter()
            _, stages = contenders[name]()
            found[name]["seconds"].append(time.perf_counter() - started)
            found[name]["stages"].append(stages)
    return found


def with_peak(function: Callable[[], Any]) -> dict[str, Any]:
    """Return seconds and the peak of memory in MB (10⁶ bytes) above what was held before, or how it failed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident_mb("VmRSS"), time.perf_counter()
    try:
        result = function()  # held until the peak is read
    except Exception as error:  # the peer's, whatever it raises
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - started
    del result
    return {"seconds": seconds, "peak_mb": resident_mb("VmHWM") - before}


def resident_mb(field: str) -> float:
    """Return a field of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def forked(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function gives in a fresh process with that many threads, forked off this one."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(threads)
        sender.send(function(*args))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"a measurement ended without an answer (exit code {process.exitcode})") from None
    finally:
        process.join()


def environment() -> dict[str, str]:
    """Say where and with what a row was made."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":unknown")
    return {
        "machine": f"{model.split(':')[1].strip()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "torch-pruning": torch_pruning.__version__,
        "convsurgeon": cs.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Measure what is missing, one network and thread count at a time, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS, metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    for network in () if asked.report else asked.networks:
        for threads in asked.threads:
            mine = [row for row in rows if (row["network"], row["threads"]) == (network, threads)]
            if mine and not asked.fresh:
                continue
            started = time.perf_counter()
            measured = measure(network, threads, repeats=asked.repeats)
            rows = [row for row in rows if row not in mine] + measured
            rows.sort(key=lambda row: (NETWORKS.index(row["network"]), row["threads"]))
            ROWS.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{network}, {threads} threads: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    PAGE.write_text(convert_report.render(rows))


if __name__ == "__main__":
    main()
