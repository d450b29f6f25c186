"""Calibration of a network whose outputs are sigmoids: pitch of synthetic tones in 360 bins.

    python docs/benchmarks/sigmoid_outputs.py --rows '{}' '{"seed": 1, "polish": {"steps": 600}}'

trains a network of the kind of the pitch estimator CREPE (once a seed; kept), converts it by `group` in 4 groups, and
calibrates it with tones without labels, once for each row of settings, two seeds if none is given. Appends one JSON
line a row: raw pitch accuracy (the highest output within 50 cents of the pitch) on 4,096 tones that nothing
else has seen, of the teacher and after each stage. They decide nothing.

Reference:
    CREPE: Kim et al., 2018, arXiv:1802.06182.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import convsurgeon as cs
from convsurgeon.calibration import Polish, calibrate_and_report

HERE = Path(__file__).parent
BINS, CENTS_A_BIN, LOWEST_HZ = 360, 20, 32.70
RATE_HZ, SAMPLES, HARMONICS = 16_000, 1024, 16
BLUR_CENTS, TOLERANCE_CENTS = 25, 50
SNR_DB = (-14.0, 10.0)
WIDTHS, KERNEL = (32, 32, 32, 64, 64, 128), 31
CALIBRATION_SEED, TEST_SEED = 10**6, 2 * 10**6


class PitchNet(nn.Module):
    """Six 1-d convolutions, written as `Conv2d` with kernels `(k, 1)`, and a sigmoid for each bin of pitch."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for index, width in enumerate(WIDTHS):
            kernel, stride = (65, 4) if index == 0 else (KERNEL, 1)
            layers += [
                nn.ZeroPad2d((0, 0, kernel // 2, kernel // 2)),
                nn.Conv2d(inputs, width, (kernel, 1), stride=(stride, 1)),
                nn.ReLU(),
                nn.BatchNorm2d(width),
                nn.MaxPool2d((2, 1)),
            ]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(WIDTHS[-1] * SAMPLES // 4 // 2 ** len(WIDTHS), BINS)

    def forward(self, x: Tensor) -> Tensor:
        """Map frames `(B, 1, 1024, 1)` to the probability of each bin, `(B, 360)`."""
        return torch.sigmoid(self.classifier(self.features(x).flatten(1)))


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return frames `(N, 1, 1024, 1)` of zero mean and unit variance, and their pitch in cents above the first bin.

    Harmonic tones of random pitch, timbre (slope of the spectrum, harmonics that are missing), phases, vibrato and
    level of white noise.
    """
    parts = [_tones(min(1024, count - start), seed + start) for start in range(0, count, 1024)]
    return torch.cat([frames for frames, _ in parts]), torch.cat([cents for _, cents in parts])


def _tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1,)), generator=generator)

    cents = uniform(0, (BINS - 1) * CENTS_A_BIN)
    hertz = LOWEST_HZ * 2 ** (cents / 1200)
    seconds = (torch.arange(SAMPLES) - SAMPLES / 2) / RATE_HZ
    speed, depth, start = uniform(4, 7), uniform(0, 30) / 1200 * math.log(2), uniform(0, 2 * math.pi)
    # the pitch is that of the middle of the frame: the vibrato's integral, less its slope there
    turns = 2 * math.pi * speed * seconds
    wobble = (torch.sin(turns + start) - torch.sin(start) - turns * torch.cos(start)) * depth / (2 * math.pi * speed)
    phase = 2 * math.pi * hertz * (seconds + wobble)
    number = torch.arange(1, HARMONICS + 1)
    strength = number ** -uniform(0, 2.5) * (uniform(0, 1, HARMONICS) < uniform(0.5, 1))
    strength[:, 0] += 0.05
    strength = strength * (hertz * number < RATE_HZ / 2)
    frames = torch.zeros(count, SAMPLES)
    for index, offset in enumerate(uniform(0, 2 * math.pi, HARMONICS).T):
        frames += strength[:, index, None] * torch.sin((index + 1) * phase + offset[:, None])
    frames = frames / frames.std(1, keepdim=True)
    frames += 10 ** (-uniform(*SNR_DB) / 20) * torch.randn(count, SAMPLES, generator=generator)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames[:, None, :, None], cents[:, 0]


def targets_of(cents: Tensor) -> Tensor:
    """Return pitches as `(N, 360)`: one at the pitch, blurred by a Gaussian."""
    bins = torch.arange(BINS) * CENTS_A_BIN
    return torch.exp(-((bins - cents[:, None]) ** 2) / (2 * BLUR_CENTS**2))


@torch.no_grad()
def accuracy(network: nn.Module, frames: Tensor, cents: Tensor) -> float:
    """Return the share (0..1) of the tones whose highest output is within 50 cents of the pitch."""
    found = torch.cat([network(part).argmax(1) for part in frames.split(256)]) * CENTS_A_BIN
    return float(((found - cents).abs() <= TOLERANCE_CENTS).float().mean())


def teacher_of(seed: int, folder: Path, *, steps: int = 4000, batch_size: int = 64) -> nn.Module:
    """Return the trained network, from its file where there is one."""
    torch.manual_seed(seed)
    network = PitchNet()
    file = folder / f"pitch.{seed}.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        frames, cents = tones(40_000, seed * 10**7)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        started = time.monotonic()
        for step in range(steps):
            chosen = torch.randint(len(frames), (batch_size,))
            loss = functional.binary_cross_entropy(network(frames[chosen]), targets_of(cents[chosen]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % 200 == 0:
                print(
                    f"teacher {seed}: step {step}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        torch.save(network.state_dict(), file)
    network.load_state_dict(torch.load(file, weights_only=True))
    return network.eval()


def measure(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Calibrate as a row says, and return it with what came out."""
    settings = {"seed": 0, "op": "group", "options": {"groups": 4}, "images": 2048, "answers": "auto", **row}
    teacher = teacher_of(settings["seed"], folder)
    test = tones(4096, TEST_SEED)
    frames, _ = tones(settings["images"], CALIBRATION_SEED + 10**5 * settings["seed"])
    student = cs.rewrite(teacher, settings["op"], options=settings["options"])
    polish = Polish(**{"seconds": 36_000.0, **settings.get("polish", {})})
    started = time.monotonic()
    result = calibrate_and_report(
        teacher,
        student,
        frames,
        polish=polish,
        answers=settings["answers"],
        seed=settings["seed"],
        judge=lambda network: accuracy(network, *test),
        report=lambda event: print(event.message, flush=True) if event.message else None,
    )
    stages = {stage.name: round(stage.score or 0.0, 4) for stage in result.stages}
    return {
        **settings,
        "teacher": round(accuracy(teacher, *test), 4),
        **stages,
        "steps": result.polish and result.polish.steps,
        "learning_rate": result.polish and result.polish.learning_rate,
        "note": result.stages[-1].note,
        "error": result.stages[-1].error,
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    """Measure the rows that are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", nargs="+", type=json.loads, default=[{"seed": 0}, {"seed": 1}], help="settings as JSON"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/sigmoid_outputs"), help="where teachers are kept")
    parser.add_argument("--results", type=Path, default=HERE / "sigmoid_outputs.jsonl")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for row in args.rows:
        found = measure(row, args.runs)
        print(json.dumps(found), flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
