"""Trials of the fit: what other choices would do before any polish.

    python docs/benchmarks/fit_trials.py --ops depthwise group --seeds 0 1

fits with each of the choices and appends one JSON line each: accuracy on the labelled validation images,
agreement and divergence from the teacher there, and accuracy on the test images, which choose nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from calibration import HERE, OPTIONS, teacher_of
from polish_trials import look
from torch import Tensor, nn
from torch.nn import functional

import convsurgeon as cs
from convsurgeon.calibration import _calibrate, _fit
from convsurgeon.calibration._capture import Places, patches_of, targets_of
from convsurgeon.calibration._sites import CalibrationSite
from convsurgeon.data import load_data

IMAGES = 2048
LEAST_WEIGHT = 0.1


class Sensitivity:
    """Weights each position by the squared gradient of the teacher's answer there, as a Fisher matrix has it.

    The answer is a class drawn from the teacher's own distribution, and the gradient that of its log
    probability (Martens, 2014, arXiv:1412.1193). A position counts for a tenth of the mean at least.
    """

    def __init__(self) -> None:
        self.weights: dict[str, list[Tensor]] = {}

    def targets_of(
        self,
        teacher: nn.Module,
        sites: Sequence[CalibrationSite],
        batches: Iterable[Tensor],
        places: Mapping[str, Places],
    ) -> dict[str, list[list[Tensor]]]:
        """Return the targets, each row times the root of its weight."""
        batches = list(batches)
        found = targets_of(teacher, sites, batches, places)
        self.weights = {
            fqn: [weight.sqrt() for weight in some]
            for fqn, some in self._weigh(teacher, sites, batches, places).items()
        }
        return {
            fqn: [[rows * root for rows in calls] for calls, root in zip(passes, self.weights[fqn], strict=True)]
            for fqn, passes in found.items()
        }

    def patches_of(
        self, student: nn.Module, site: CalibrationSite, batches: Iterable[Tensor], places: Places, *, calls: int
    ) -> Iterator[list[Tensor]]:
        """Yield the patches, each row times the root of its weight."""
        passes = patches_of(student, site, batches, places, calls=calls)
        for inputs, root in zip(passes, self.weights[site.fqn], strict=True):
            yield [rows * root for rows in inputs]

    @staticmethod
    def _weigh(
        teacher: nn.Module, sites: Sequence[CalibrationSite], batches: Sequence[Tensor], places: Mapping[str, Places]
    ) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {site.fqn: [] for site in sites}
        outputs: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for site in sites:
                assert isinstance(site.partner, nn.Module)
                stack.callback(site.partner.register_forward_hook(_noted(outputs, site.fqn)).remove)
            for index, images in enumerate(batches):
                with torch.enable_grad():
                    logs = functional.log_softmax(teacher(images.detach().requires_grad_()), dim=1)
                    drawn = torch.multinomial(logs.detach().exp(), 1)
                    gradients = torch.autograd.grad(logs.gather(1, drawn).sum(), [outputs[site.fqn] for site in sites])
                for site, gradient_BOPQ in zip(sites, gradients, strict=True):
                    weight_B1n = gradient_BOPQ.square().sum(1, keepdim=True).flatten(2)
                    height, width = gradient_BOPQ.shape[-2:]
                    chosen = places[site.fqn].choose((height, width), len(images), index=index, call=0)
                    found[site.fqn].append(weight_B1n.gather(2, chosen[:, None]).mT.flatten(0, 1))
        means = {fqn: torch.cat(some).mean() for fqn, some in found.items()}
        return {
            fqn: [LEAST_WEIGHT + (1 - LEAST_WEIGHT) * some / means[fqn] for some in weights]
            for fqn, weights in found.items()
        }


def _noted(outputs: dict[str, Tensor], fqn: str) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda _module, _args, out: outputs.update({fqn: out})


def choices() -> dict[str, list[Any]]:
    """Return what is changed in each trial."""
    weighted = Sensitivity()
    return {
        "as it is": [],
        "four times the iterations": [patch.multiple(_fit, _ITERATIONS=600, _TRIAL_ITERATIONS=100, _WORK=1e15)],
        "ridge 1e-6": [patch.object(_fit, "_RIDGES", (1e-6,))],
        "ridge 0.1": [patch.object(_fit, "_RIDGES", (1e-1,))],
        "256 positions": [patch.object(_calibrate, "_POSITIONS", 256)],
        "weighted by sensitivity": [
            patch.multiple(_calibrate, targets_of=weighted.targets_of, patches_of=weighted.patches_of)
        ],
        "two sweeps": [],
    }


def main() -> None:
    """Run the trials that are not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"), help="where the teachers are kept")
    parser.add_argument("--results", type=Path, default=HERE / "fit_trials.jsonl")
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--networks", nargs="+", default=["resnet20"])
    parser.add_argument("--ops", nargs="+", default=["depthwise", "group"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_data("fashion-mnist", root=args.data_root)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    trials = [
        {"network": network, "op": op, "seed": seed, "what": what}
        for network in args.networks
        for op in args.ops
        for seed in args.seeds
        for what in choices()
    ]
    for trial in trials:
        if any(trial.items() <= row.items() for row in done):
            continue
        teacher = teacher_of(trial["network"], data, args.runs)
        student = cs.rewrite(teacher, trial["op"], options=OPTIONS.get(trial["op"]))
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            for change in choices()[trial["what"]]:
                stack.enter_context(change)
            for _ in range(2 if trial["what"] == "two sweeps" else 1):
                student = cs.calibrate(teacher, student, data.train, polish=False, limit=IMAGES, seed=trial["seed"])
        seconds = round(time.monotonic() - started)
        row = {**trial, **look(teacher, student, data), "seconds": seconds}
        print(json.dumps(row), flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
