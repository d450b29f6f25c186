"""The polish: a short run of the distillation loop, with a frozen teacher and without labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from convsurgeon.calibration._images import CalibrationImages
from convsurgeon.calibration._result import PolishRun
from convsurgeon.distillation import Augmentation, Training, distill, methods
from convsurgeon.distillation.methods.imitate import signal_axis
from convsurgeon.errors import ConvSurgeonError, DivergenceError, OptionError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.options import parse_options
from convsurgeon.outputs import Kind
from convsurgeon.progress import Progress, Report, be_silent

_FEWEST_STEPS = 10
# the first step is slower than those that follow; where steps are short, some more are looked at
_SHORT, _MORE_STEPS, _MEASUREMENTS = 2.0, 5, 2
# how many times as long as expected is worth a word
_LATE = 1.5
# a student that is close already is thrown back by the rate that brings another one forward
_RATES, _TRIAL_SHARE = (0.02, 0.005), 0.05

_DIVERGED = "undone: it diverged"

Run = Callable[[int, float, Report], tuple[nn.Module, float]]
Rank = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Polish:
    """How the polish trains.

    Args:
        steps: how many, those of the trials of a learning rate included.
        seconds: what is bearable: fewer steps are taken where a few of them, timed beforehand, say that it would last
            longer, but ten in any case. What it cuts is said.
        batch_size: images a step.
        learning_rate: the peak of the schedule of Muon; None for the one that does better in a short trial.
        blocks: weight of the blocks' outputs beside the answers at first; it falls to 0.
        cutmix: share of the batches that are mixed, where the images are pictures or signals.
        frozen_norms: share of the steps, at the end, in which batch norm normalises by its running statistics.
        flip: whether half of the pictures are mirrored.
    """

    steps: int = 2000
    seconds: float = 1800.0
    batch_size: int = 64
    learning_rate: float | None = None
    blocks: float = 10.0
    cutmix: float = 0.5
    frozen_norms: float = 0.5
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seconds", "learning_rate"):
            value, kind = getattr(self, name), (int,) if name in ("steps", "batch_size") else (int, float)
            if value is None and name == "learning_rate":
                continue
            if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
                what = "a number" if float in kind else "a whole number"
                raise OptionError(f"Polish: {name} must be {what} above 0, got {value!r}")
        if not isinstance(self.flip, bool):
            raise OptionError(f"Polish: flip must be True or False, got {self.flip!r}")
        said = {"blocks": self.blocks, "cutmix": self.cutmix, "frozen_norms": self.frozen_norms}
        parse_options(methods.get("imitate").Options, said, owner="Polish")


def polish(
    teacher: nn.Module,
    student: nn.Module,
    images: CalibrationImages,
    settings: Polish,
    *,
    kind: Kind,
    rank: Rank,
    seed: int,
    report: Report,
) -> PolishRun:
    """Let a copy of the student imitate the teacher on the fitted images, and return it with what was done.

    Says how long it is going to take before it starts. Ops learn whatever their `requires_grad` says. A run that
    diverges is done again at a lower learning rate, while there is one left.

    Args:
        kind: of the first answer.
        rank: says how close a student is to its teacher on images held out; more is closer.
    """
    train = images.fitted.cpu()
    run = _Imitation(teacher, student, train, min(settings.batch_size, len(train)), kind, settings, seed)
    frozen = _thaw_ops(student)
    try:
        step_seconds = _time_step(run)
    except DivergenceError:
        _put_back(frozen, student)
        return PolishRun(None, 0, _RATES[0], run.batch_size, _DIVERGED)
    except Exception as error:  # whatever somebody's forward raises where it is trained
        _put_back(frozen, student)
        reason = str(error) if isinstance(error, ConvSurgeonError) else one_line(error)
        return PolishRun(None, 0, _RATES[0], run.batch_size, f"left out: the student cannot be trained: {reason}")
    affordable = min(settings.steps, max(_FEWEST_STEPS, int(settings.seconds / step_seconds)))
    for message in _announced(affordable, step_seconds, settings, run.batch_size):
        report(Progress("polish", message=message))
    rate, tried = _choose_rate(run, rank, settings, affordable, report)
    steps = affordable - tried
    polished, rate, seconds = _run_without_diverging(run, steps, rate, report)
    for network in (student, polished or student):
        _put_back(frozen, network)
    if seconds > _LATE * steps * step_seconds:
        expected = _minutes(steps * step_seconds)
        report(Progress("polish", message=f"polish: took {_minutes(seconds)} where {expected} were expected"))
    obstacle = "" if polished else _DIVERGED
    return PolishRun(polished, steps, rate, run.batch_size, obstacle, settings.steps, tried, seconds / steps)


def _announced(affordable: int, step_seconds: float, settings: Polish, batch_size: int) -> list[str]:
    """Return what is said before it starts: how long it will take, and what the time cuts."""
    lines = [
        f"polish: {affordable} steps of {batch_size} images, about "
        f"{_minutes(affordable * step_seconds)} ({step_seconds:.2g} s a step)"
    ]
    if affordable < settings.steps:
        minutes = math.ceil(settings.steps * step_seconds / 60)
        lines.append(
            f"polish: only {affordable} of {settings.steps} steps fit into {_minutes(settings.seconds)}; for all of "
            f"them say Polish(seconds={60 * minutes}) (--polish-minutes {minutes})"
        )
    return lines


@dataclass(frozen=True)
class _Imitation:
    """Lets a copy of the student imitate the teacher for some steps; returns it, and the seconds that it took."""

    teacher: nn.Module
    student: nn.Module
    train: Tensor
    batch_size: int
    kind: Kind
    settings: Polish
    seed: int

    def __call__(self, steps: int, rate: float, report: Report) -> tuple[nn.Module, float]:
        settings, train = self.settings, self.train
        signals = signal_axis(train.shape) is not None
        moved = signals or (train.dim() == 4 and train.shape[1] in (1, 3))
        size = (train.shape[-2], train.shape[-1]) if train.dim() == 4 else (train.shape[-1], 1)
        data = TensorDataset(train)
        # one long pass, so that there are as many steps as were said
        order = RandomSampler(data, num_samples=steps * self.batch_size, generator=torch.Generator())
        loader: DataLoader[tuple[Tensor, ...]] = DataLoader(data, batch_size=self.batch_size, sampler=order)
        result = distill(
            self.teacher,
            self.student,
            loader,
            method="imitate",
            method_options={
                "blocks": settings.blocks,
                "cutmix": settings.cutmix if moved else 0.0,
                "frozen_norms": settings.frozen_norms,
                "full_precision": _in_full_precision(self.student),
                # found again: those that sum to 1
                "answers": "probabilities" if self.kind == "distribution" else self.kind,
            },
            epochs=1,
            batch_size=self.batch_size,
            optimizer="muon",
            learning_rate=rate,
            seed=self.seed,
            augmentation=Augmentation.usual(size, flip=settings.flip and not signals) if moved else None,
            report=report,
        )
        return result.student, float(result.metrics["seconds"])


def _run_without_diverging(run: Run, steps: int, rate: float, report: Report) -> tuple[nn.Module | None, float, float]:
    """Return the student after a run at a rate or, where it diverges, at a lower one, and that run's rate and seconds.

    None instead of the student, and no seconds, where all diverge.
    """
    for lower in (rate, *(each for each in _RATES if each < rate)):
        rate = lower
        try:
            student, seconds = run(steps, rate, lambda event: _pass_on(event, report))
        except DivergenceError:
            report(Progress("polish", message=f"diverged at learning rate {rate:g}"))
        else:
            return student, rate, seconds
    return None, rate, 0.0


def _in_full_precision(student: nn.Module) -> bool:
    """Whether the student runs in float32 beside a teacher in bf16: on processors, with depthwise convolutions.

    Their gradients are slow in bf16. Found by a rule and not by a clock, so that a seed says what comes out.
    """
    if torch.cuda.is_available() or Training().autocast(torch.device("cpu")) != "bf16":
        return False
    convolutions = (part for part in student.modules() if isinstance(part, nn.Conv2d))
    return any(conv.groups == conv.in_channels > 1 for conv in convolutions)


def _choose_rate(run: Run, rank: Rank, settings: Polish, affordable: int, report: Report) -> tuple[float, int]:
    """Return the learning rate, and how many steps it took to find it."""
    steps = round(_TRIAL_SHARE * affordable)
    if settings.learning_rate is not None:
        return settings.learning_rate, 0
    if steps < _FEWEST_STEPS:
        return _RATES[0], 0
    ranks = {rate: _rank_after(run, rank, steps, rate) for rate in _RATES}
    best = max(ranks, key=lambda rate: ranks[rate])
    report(Progress("polish", message=f"learning rate {best:g}: closer than another one after {steps} steps"))
    return best, len(_RATES) * steps


def _rank_after(run: Run, rank: Rank, steps: int, rate: float) -> float:
    try:
        return rank(run(steps, rate, be_silent)[0])
    except DivergenceError:
        return -math.inf


def _time_step(run: Run) -> float:
    """Return about how many seconds a step takes, from runs whose results are thrown away.

    Where steps are short, of two measurements the faster one: what else runs on the machine only slows them down.
    """
    _, first = run(1, _RATES[0], be_silent)
    if first > _SHORT:
        return first
    more = min(run(1 + _MORE_STEPS, _RATES[0], be_silent)[1] for _ in range(_MEASUREMENTS))
    return max(more - first, 0.1 * more) / _MORE_STEPS


def _thaw_ops(student: nn.Module) -> dict[str, bool]:
    """Let all parameters of ops learn; return which did before."""
    before = {}
    for fqn, op in student.named_modules():
        if isinstance(op, AbstractCheapConv):
            for name, parameter in op.named_parameters():
                before[f"{fqn}.{name}".lstrip(".")] = parameter.requires_grad
                parameter.requires_grad_(True)
    return before


def _put_back(flags: dict[str, bool], network: nn.Module) -> None:
    for name, flag in flags.items():
        network.get_parameter(name).requires_grad_(flag)


def _pass_on(event: Progress, report: Report) -> None:
    """Report the steps as those of a polish; its one long pass is nobody's epoch."""
    if event.stage == "train":
        figures = {name: value for name, value in event.figures.items() if not name.startswith("epoch")}
        report(replace(event, stage="polish", figures=figures))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
