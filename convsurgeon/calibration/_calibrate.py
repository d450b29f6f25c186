"""Calibration: what images without labels can do for a student, stage by stage."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from convsurgeon.calibration._answers import Closeness, answers_of, closeness, look_at_answers, refuse_answers
from convsurgeon.calibration._capture import Places, patches_of, targets_of
from convsurgeon.calibration._fit import Fit, fit_op
from convsurgeon.calibration._images import CalibrationImages, gather
from convsurgeon.calibration._moments import AbstractMoments, Gram, Rows, keeps_gram, rows_an_image
from convsurgeon.calibration._norms import Statistics, estimate_statistics, put_statistics, statistics_of
from convsurgeon.calibration._polish import Polish
from convsurgeon.calibration._polish import polish as run_polish
from convsurgeon.calibration._result import CalibrationResult, PolishRun, SiteFit, Stage, peak_memory
from convsurgeon.calibration._sites import CalibrationSite, sites_in_order
from convsurgeon.errors import CalibrationError, OptionError
from convsurgeon.outputs import ANSWERS, Answers
from convsurgeon.progress import Progress, Report, be_silent
from convsurgeon.surgery import copy_module, expect_module, in_mode, network_inside, refuse_without_layers

Judge = Callable[[nn.Module], float]

_POSITIONS = 64
_TARGET_BYTES = 10**9
"""How much of the teacher's outputs is kept at a time; more sites than fit take another pass."""
_EVERY = 5


def calibrate(
    teacher: nn.Module,
    student: nn.Module,
    images: Any,
    *,
    polish: bool | Polish = True,
    answers: Answers = "auto",
    limit: int = 2048,
    seed: int = 0,
    report: Report = be_silent,
) -> nn.Module:
    """Return the student, brought close to its teacher by images without labels; neither argument is modified.

    First each op is fitted, in order of execution, to give the teacher's outputs from the student's own
    inputs, by least squares over second moments of the images; no gradient runs through the network. Then
    batch-norm statistics are estimated anew, and kept where the answers come closer to the teacher's on a
    fifth of the images that is held out. Then the polish: a short run of the distillation loop in which the
    student imitates the teacher.

    Args:
        teacher: the network that the student was made from.
        student: what `rewrite` made of it, trained since or not.
        images: a tensor `(N, C, H, W)`, a dataset, or batches, as the networks take them; nothing is learned from
            labels, which only help to tell what the answers are.
        polish: False leaves it out; a `Polish` says how.
        answers: `scores`, logits of classes, are compared as class distributions; `probabilities` from 0 to 1 as
            such, as distributions where those of an image sum to 1; `multilabel`, logits of which each has a sigmoid,
            as probabilities; `values` (boxes, maps, embeddings) by their squared error; `auto` finds it out.
        limit: how many images to use.
        seed: of the choice of images and positions, and of the polish.
        report: receives `Progress` events.

    Raises:
        CalibrationError: if the student has no op, or does not come from this teacher.
        DataError: if the images do not serve.
    """
    return calibrate_and_report(
        teacher, student, images, polish=polish, answers=answers, limit=limit, seed=seed, report=report
    ).student


def calibrate_and_report(
    teacher: nn.Module,
    student: nn.Module,
    images: Any,
    *,
    polish: bool | Polish = True,
    answers: Answers = "auto",
    limit: int = 2048,
    seed: int = 0,
    judge: Judge | None = None,
    report: Report = be_silent,
) -> CalibrationResult:
    """Calibrate as `calibrate` does, and return what each stage and each site came to, too.

    Args:
        judge: called with the student after each stage, in eval mode and not to be changed; what it returns,
            such as an accuracy on labelled images, is kept as the stage's score and decides nothing.
    """
    started = time.monotonic()
    if answers not in ANSWERS:
        raise OptionError(f"answers must be one of {', '.join(ANSWERS)}, got {answers!r}")
    # a wrapper gives the parts of its network other names
    teacher = network_inside(teacher, role="the teacher", stage="calibrate", report=report)
    student = network_inside(student, role="the student", stage="calibrate", report=report)
    for network in (teacher, student):
        refuse_calibration(network, polish=polish, seed=seed)
    seed = int(seed)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        taken = gather(images, limit=limit, seed=seed)
        run = _Run(teacher, student, taken, answers=answers, seed=seed, started=started, judge=judge, report=report)
        run.closed_form()
        run.statistics()
        run.fit()
        if polish:
            run.polish(polish if isinstance(polish, Polish) else Polish())
    return run.result()


def refuse_calibration(network: nn.Module, *, polish: bool | Polish, seed: int) -> None:
    """Raise for a network, teacher or student, that cannot be calibrated so, and for arguments of other kinds.

    Raises:
        CalibrationError: if it is TorchScript, or has parameters that the polish cannot train.
        OptionError: if `polish` or `seed` is something else than what `calibrate` takes.
    """
    if not isinstance(polish, bool | Polish):
        raise OptionError(f"polish must be True, False or a Polish, got {polish!r}")
    if isinstance(seed, bool) or not isinstance(seed, SupportsIndex) or not 0 <= seed.__index__() < 2**32:
        raise OptionError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")
    expect_module(network)
    refuse_without_layers(network, role="this cannot be calibrated", error=CalibrationError)
    if polish:
        _refuse_low_precision(network)


def _refuse_low_precision(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize < torch.float32.itemsize:
            raise CalibrationError(
                f"{name} is {parameter.dtype}, in which the polish cannot train; calibrate in float32, "
                "network.float(), and lower the precision afterwards, or leave the polish out"
            )


class _Run:
    """One calibration: the networks in eval mode, the images, and what the stages came to."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        images: CalibrationImages,
        *,
        answers: Answers,
        seed: int,
        started: float,
        judge: Judge | None,
        report: Report,
    ) -> None:
        self.teacher = in_mode(copy_module(teacher), training=False)
        self.student = in_mode(copy_module(student), training=False)
        self.images, self.seed, self.judge, self.report = images.like(self.student), seed, judge, report
        self.stages: list[Stage] = []
        self.fits: list[SiteFit] = []
        self.started, self.stage_started = started, time.monotonic()
        self.judged = 0.0
        self.polish_run: PolishRun | None = None
        self.alone: tuple[Closeness, Statistics] | None = None
        self.sites, self.idle = sites_in_order(self.teacher, self.student, next(self.images.batches()))
        self.wanted = answers_of(self.teacher, self.images.batches(held=True))
        refuse_answers(self.wanted, said=answers)
        self.outputs = look_at_answers(self.teacher, self.wanted, self.images, said=answers)
        if question := self.outputs.question("answers='scores' (--answers scores)"):
            report(Progress("calibrate", message=question))
        for name, parameter in self.student.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise CalibrationError(
                    f"the student's {name} holds NaN or infinite numbers; make it anew with rewrite()"
                )

    def closed_form(self) -> None:
        """Look at the student as it came."""
        self.came = self._closeness()
        self._close("closed form", self.came)

    def statistics(self) -> None:
        """See what new batch-norm statistics alone would do; the fit starts from the old ones."""
        before = statistics_of(self.student)
        if not before:
            return
        estimate_statistics(self.student, self.images.batches())
        found = self._closeness()
        self._close("batch-norm statistics", found, "looked at only; the fit starts from the old ones")
        if found.rank > self.came.rank:
            self.alone = found, statistics_of(self.student)
        put_statistics(self.student, before)

    def fit(self) -> None:
        """Fit every op in order of execution, then estimate batch-norm statistics, and keep what is better.

        What was there before, or that with new statistics, is kept where nothing is closer.
        """
        unfitted = copy.deepcopy(self.student.state_dict())
        for chunk in self._chunks():
            places = {site.fqn: self._places(site) for site in chunk}
            targets = targets_of(self.teacher, chunk, self.images.batches(), places)
            for site in chunk:
                self._fit_site(site, targets.pop(site.fqn), places[site.fqn])
        fitted, before = self._closeness(), statistics_of(self.student)
        note = ""
        if before:
            estimate_statistics(self.student, self.images.batches())
            anew = self._closeness()
            if anew.rank > fitted.rank:
                fitted, note = anew, "with new batch-norm statistics"
            else:
                put_statistics(self.student, before)
                note = "batch-norm statistics kept: new ones are further off"
        earlier, statistics = self.alone or (self.came, None)
        if not fitted.rank >= earlier.rank:
            self.student.load_state_dict(unfitted)
            fitted, note = earlier, "undone: it was further off"
            if statistics is not None:
                put_statistics(self.student, statistics)
                note = "undone: new batch-norm statistics alone are closer"
        self._close("fit", fitted, note)

    def polish(self, settings: Polish) -> None:
        """Let the student imitate the teacher; what was better before is kept."""
        before = self._closeness()
        try:
            self.polish_run = run = run_polish(
                self.teacher,
                self.student,
                self.images,
                settings,
                kind=self.outputs.kind,
                rank=lambda student: self._closeness(student).rank,
                seed=self.seed,
                report=self.report,
            )
        except KeyboardInterrupt:
            # what a run of distillation says of its steps and its folder is not about this one
            raise KeyboardInterrupt("stopped in the polish; nothing was kept") from None
        if run.student is None:
            self._close("polish", before, run.obstacle)
            return
        unpolished, self.student = self.student, run.student
        after = self._closeness()
        notes = [run.cut]
        if after.rank < before.rank:
            self.student, after = unpolished, before
            notes.insert(0, "undone: it was further off")
        elif after.agreement is not None and before.agreement is not None and after.agreement < before.agreement:
            notes.insert(0, "kept: closer in all, though it agrees on fewer images")
        self._close("polish", after, "; ".join(filter(None, notes)))

    def result(self) -> CalibrationResult:
        """Return everything."""
        idle = [SiteFit(fqn, None, None, None, note) for fqn, note in self.idle.items()]
        return CalibrationResult(
            in_mode(self.student, training=False),
            tuple(self.stages),
            (*self.fits, *idle),
            (len(self.images.fitted), len(self.images.held)),
            time.monotonic() - self.started - self.judged,
            peak_memory(),
            self.seed,
            self.polish_run,
        )

    def _chunks(self) -> Iterator[Sequence[CalibrationSite]]:
        """Yield sites in order, as many at a time as have room for their targets."""
        chunk: list[CalibrationSite] = []
        size = 0
        for site in self.sites:
            size += len(self.images.fitted) * self._places(site).count * site.op.out_channels * 4 * site.calls
            if chunk and size > _TARGET_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(site)
        yield chunk

    def _places(self, site: CalibrationSite) -> Places:
        if keeps_gram(site.kernel[0].numel()):
            return Places(_POSITIONS, self.seed)
        return Places(rows_an_image(len(self.images.fitted) * site.calls, most=_POSITIONS), self.seed)

    def _fit_site(self, site: CalibrationSite, targets: list[list[Tensor]], places: Places) -> None:
        donor_OF = site.kernel.flatten(1)
        fit: Fit | None = None
        note = ""
        # a later call may read what an earlier one gives, so the first is fitted beforehand
        for calls in sorted({1, site.calls}):
            moments = self._moments(site, targets, places, calls)
            if moments is None or not all(part.rows for part in moments):
                note = "its outputs in the teacher were not seen" if moments else "takes other rows than in the teacher"
                break
            found = fit_op(site.op, donor_OF, *moments)
            fit = found if fit is None else Fit(found.before, found.after, found.ridge)
            if not isinstance(moments[0], Gram):
                note = f"fitted on a sample of {sum(part.rows for part in moments):,} positions"
        if fit is None:
            self.fits.append(SiteFit(site.fqn, None, None, None, f"{note}; as it was"))
            return
        self.fits.append(SiteFit(site.fqn, fit.before, fit.after, fit.ridge, note))
        self.report(
            Progress(
                "fit",
                len(self.fits),
                len(self.sites),
                {"before": fit.before, "after": fit.after, "seconds_left": self._seconds_left()},
            )
        )

    def _moments(
        self, site: CalibrationSite, targets: list[list[Tensor]], places: Places, calls: int
    ) -> tuple[AbstractMoments, AbstractMoments] | None:
        """Return moments of the rows to fit, and of those of every fifth image.

        None where student and teacher convolve different numbers of rows: which ones belong together is not known.
        """
        features = site.kernel[0].numel()
        gram = keeps_gram(features)

        def empty() -> AbstractMoments:
            return Gram(features, len(site.kernel), site.kernel.device) if gram else Rows()

        parts = empty(), empty()
        bias = 0.0 if site.op.bias is None else site.op.bias.detach().float()
        passes = patches_of(self.student, site, self.images.batches(), places, calls=calls)
        seen = 0
        for images, inputs, outputs in zip(self.images.batches(), passes, targets, strict=True):
            for x_NF, y_NO in zip(inputs, outputs, strict=False):
                if len(x_NF) != len(y_NO):
                    return None
                # all positions of an image go to one part; some networks see more or fewer than there are in a batch
                image_N = torch.arange(len(x_NF), device=site.kernel.device) * len(images) // len(x_NF)
                held_N = (seen + image_N) % _EVERY == 0
                for part, chosen_N in zip(parts, (~held_N, held_N), strict=True):
                    part.add(x_NF[chosen_N].float(), y_NO[chosen_N].float() - bias)
            seen += len(images)
        return parts

    def _seconds_left(self) -> float:
        done = max(1, len(self.fits))
        return (time.monotonic() - self.stage_started) / done * (len(self.sites) - done)

    def _closeness(self, student: nn.Module | None = None) -> Closeness:
        given = answers_of(student or self.student, self.images.batches(held=True))
        return closeness(given, self.wanted, kind=self.outputs.kind)

    def _close(self, name: str, found: Closeness, note: str = "") -> None:
        seconds = round(time.monotonic() - self.stage_started, 1)
        score = None if self.judge is None else self.judge(self.student)
        self.stages.append(Stage(name, found.agreement, found.error, seconds, note, score, found.divergence))
        self.judged += time.monotonic() - self.stage_started - seconds
        self.stage_started = time.monotonic()
        figures = {"error": found.error} | ({} if found.agreement is None else {"agreement": found.agreement})
        self.report(Progress("calibrate", len(self.stages), None, figures, f"{name}: {found}"))
