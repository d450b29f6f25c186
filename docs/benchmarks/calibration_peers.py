"""Beside other tools: who keeps how much of a trained ResNet-20 at equal multiply-adds, without labels.

    pip install -e '.[peers]'
    python docs/benchmarks/calibration_peers.py

fasterai's conv decompositions and TensorLy-Torch's factorised convolutions replace the same layers of the same
teacher as convsurgeon does, each at the largest setting whose multiply-adds don't exceed the budget of an op of
convsurgeon. The peers' networks are tested as their tools give them, and once more with batch-norm statistics
estimated anew by torch's `update_bn`, on the images that convsurgeon calibrates on. One JSON line a network.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

import convsurgeon as cs
from convsurgeon.calibration import Polish, calibrate_and_report
from convsurgeon.data import load_data, make_loader
from convsurgeon.errors import NothingToConvertError
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import count_params

sys.path.insert(0, str(Path(__file__).parent))
from calibration import HERE, IMAGE, OPTIONS, teacher_of

IMAGES = 2048
BUDGETS = ("group", "depthwise")
SETTINGS = [step / 100 for step in range(1, 100)]
OURS = ("tucker", "cp")
Maker = Callable[[float], nn.Module]


def macs_of(network: nn.Module) -> int:
    """Return the multiply-adds that a network runs for an image, as torch's own counter sees them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(IMAGE)
    return int(counter.get_total_flops() // 2)


def peers(teacher: nn.Module, layers: list[str]) -> Iterator[tuple[str, Maker]]:
    """Yield the peers' networks by the share of the rank that is kept."""
    from fasterai.misc.conv_decomposer import Conv_Decomposer
    from tltorch import FactorizedConv

    for method in ("tucker", "svd", "spatial", "cp"):

        def by_fasterai(kept: float, method: str = method) -> nn.Module:
            network: nn.Module = Conv_Decomposer().decompose(teacher, 1 - kept, method=method, layers=layers)
            return network

        yield f"fasterai {method}", by_fasterai
    for kind in ("tucker", "cp"):

        def by_tensorly(kept: float, kind: str = kind) -> nn.Module:
            network = copy.deepcopy(teacher)
            for name in layers:
                parent, _, last = name.rpartition(".")
                factorised = FactorizedConv.from_conv(
                    network.get_submodule(name), rank=kept, factorization=kind, implementation="factorized"
                )
                setattr(network.get_submodule(parent), last, factorised)
            return network

        yield f"tensorly-torch {kind}", by_tensorly


def made(make: Maker, setting: float) -> nn.Module | None:
    """Return the network, or None where every convolution would be dearer than it was."""
    try:
        return make(setting)
    except NothingToConvertError:
        return None


def within(make: Maker, budget: int) -> tuple[float, nn.Module] | None:
    """Return the network of the largest setting that stays in a budget of multiply-adds, found by bisection."""
    low, high, found = 0, len(SETTINGS) - 1, None
    while low <= high:
        middle = (low + high) // 2
        network = made(make, SETTINGS[middle])
        if network is not None and macs_of(network) <= budget:
            found, low = (SETTINGS[middle], network), middle + 1
        else:
            high = middle - 1
    return found


def own(op: str, teacher: nn.Module, budget: int) -> tuple[float | None, nn.Module] | None:
    """Return our student: as it comes for an op that sets budgets, else of the largest rank within the budget."""
    if op in BUDGETS:
        return None, cs.rewrite(teacher, op, options=OPTIONS.get(op))
    return within(lambda rank: cs.rewrite(teacher, op, options={"rank": rank}), budget)


def main() -> None:
    """Measure every network at every budget, and append it to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"), help="where the teachers are kept")
    parser.add_argument("--results", type=Path, default=HERE / "calibration_peers.jsonl")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    data = load_data("fashion-mnist", root=args.data_root)
    teacher = teacher_of("resnet20", data, args.runs)
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:IMAGES]
    images = make_loader(data.train.subset(chosen), batch_size=128, shuffle=False)

    def score(network: nn.Module) -> float:
        accuracy = cs.evaluate(network, data.test).accuracy
        assert accuracy is not None
        return accuracy

    def note(budget: str, who: str, found: tuple[float | None, nn.Module] | None, **measured: Any) -> None:
        row: dict[str, Any] = {"budget": budget, "who": who}
        if found is not None:
            setting, network = found
            row |= {"setting": setting, "macs": macs_of(network), "params": count_params(network), **measured}
        print(json.dumps(row), flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def is_there(budget: str, who: str) -> bool:
        return any((row["budget"], row["who"]) == (budget, who) for row in done)

    if not is_there("none", "teacher"):
        note("none", "teacher", (None, teacher), scores={"as it is": score(teacher)})
    layers = [name for name, op in cs.rewrite(teacher, "group").named_modules() if isinstance(op, AbstractCheapConv)]
    for op in BUDGETS:
        budget = macs_of(cs.rewrite(teacher, op, options=OPTIONS.get(op)))
        for who, make in peers(teacher, layers):
            if is_there(op, who):
                continue
            started = time.monotonic()
            if (found := within(make, budget)) is None:
                note(op, who, None)
                continue
            scores = {"closed form": score(found[1])}
            update_bn(images, found[1])
            scores["batch-norm statistics"] = score(found[1])
            note(op, who, found, scores=scores, seconds=round(time.monotonic() - started))
        for ours in (op, *OURS):
            if is_there(op, f"convsurgeon {ours}"):
                continue
            if (found := own(ours, teacher, budget)) is None:
                note(op, f"convsurgeon {ours}", None)
                continue
            result = calibrate_and_report(
                teacher, found[1], data.train, polish=Polish(flip=data.flip), limit=IMAGES, judge=score
            )
            scores = {stage.name: stage.score for stage in result.stages}
            note(op, f"convsurgeon {ours}", found, scores=scores, seconds=round(result.seconds))


if __name__ == "__main__":
    main()
