"""`convsurgeon distill`: convert if need be, train beside the teacher, and deliver."""

from __future__ import annotations

import contextlib
import json as json_module
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convsurgeon.cli import _arguments as arguments
from convsurgeon.cli._drawing import Drawing, console, draw_comparison, emit, say, tell
from convsurgeon.errors import DistillationError, OptionError

if TYPE_CHECKING:
    from torch import nn

    from convsurgeon.distillation import DistillResult

_COMMAND, _CONFIG = "command.json", "config.json"


def run(
    context: typer.Context,
    teacher: Annotated[str | None, typer.Argument(metavar="TEACHER", help=arguments.MODEL_HELP)] = None,
    student: Annotated[
        str | None,
        typer.Argument(metavar="[STUDENT]", help="A converted student; without, the teacher is converted."),
    ] = None,
    to: arguments.ToOrDefault = None,
    keep: arguments.Keep = None,
    only: arguments.Only = None,
    mapping: arguments.Map = None,
    pointwise: arguments.Pointwise = None,
    option: arguments.Option = None,
    data: arguments.Data = None,
    data_root: arguments.DataRoot = None,
    size: arguments.Size = None,
    mean: arguments.Mean = None,
    std: arguments.Std = None,
    color: arguments.Color = None,
    crop: arguments.Crop = None,
    interpolation: arguments.Interpolation = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the training images held out to choose by.")] = 0.1,
    method: Annotated[str, typer.Option(help="joint, frozen, ensemble, or another file of methods/.")] = "joint",
    method_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Repeatable.")] = None,
    objective: Annotated[str, typer.Option(help="kd, or another file of objectives/.")] = "kd",
    objective_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Repeatable.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    optimizer: Annotated[str, typer.Option(metavar="sgd|muon", help="Muon goes further in few steps.")] = "sgd",
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="The peak; 0.1 with sgd, 0.02 with muon.")
    ] = None,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    seed: arguments.Seed = 0,
    augment: Annotated[bool, typer.Option(help="Random shifts, and mirror images where the data allow.")] = True,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Where to train; a GPU if there is one.")
    ] = None,
    precision: Annotated[str, typer.Option(metavar="auto|no|bf16|fp16")] = "auto",
    threads: arguments.Threads = None,
    limit_batches: arguments.LimitBatches = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="RUN", help="The run folder.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with the run in this folder; nothing else is needed."),
    ] = None,
    weights: arguments.Weights = None,
    weights_key: arguments.WeightsKey = None,
    weights_prefix: arguments.WeightsPrefix = None,
    model_arg: arguments.ModelArg = None,
    trust: arguments.Trust = False,
    trust_module: arguments.TrustModule = None,
    json: arguments.Json = False,
) -> None:
    """Train a student beside its teacher, and end with an ONNX file, proven equal and timed."""
    from convsurgeon.cli._models import file_stem, set_threads
    from convsurgeon.files import write_text

    said: dict[str, Any] = {
        key: str(value) if isinstance(value, Path) else value for key, value in locals().items() if key in _SAID
    }
    if resume is not None:
        if others := _typed(context, but=("resume", "json")):
            raise OptionError(
                f"--resume RUN needs nothing else, the run folder knows how it was started; leave out {others[0]}"
            )
        said, folder = _read_command(resume), resume
    else:
        if teacher is None:
            raise OptionError("distill needs a TEACHER, such as torchvision:resnet18, or --resume RUN")
        if student is None:
            said["to"] = to or arguments.DEFAULT_OP
        made = file_stem(student) if student else "-".join(filter(None, (said["to"], pointwise)))
        folder = output or Path("runs") / f"{file_stem(teacher)}.{made}.{method}"
        _check_free(folder)
    set_threads(said["threads"])
    prepared = _Prepared(said)
    with _started(folder, said, resume=resume is not None), Drawing() as drawing:
        figures, table = prepared.train_and_deliver(folder, resume=resume is not None, report=drawing)
    write_text(folder / "report.json", json_module.dumps(figures, indent=2) + "\n")
    if json:
        emit(figures)
        return
    console().print(table)
    for name in ("student_file", "onnx_file"):
        tell(f"{name.replace('_', ' ')}: {figures[name]}")
    tell(f"run folder: {folder}")


# what decides the run, and is remembered in the run folder
_SAID = (
    "teacher", "student", "to", "keep", "only", "mapping", "pointwise", "option", "data", "data_root", "size", "mean",
    "std", "color", "crop", "interpolation", "val_fraction", "method", "method_option", "objective", "objective_option",
    "epochs", "batch_size",
    "optimizer", "learning_rate", "weight_decay", "seed", "augment", "device", "precision", "threads",
    "limit_batches", "tensorboard", "weights", "weights_key", "weights_prefix", "model_arg", "trust", "trust_module",
)  # fmt: skip


def _check_free(folder: Path) -> None:
    if any((folder / name).exists() for name in (_COMMAND, _CONFIG)):
        raise DistillationError(
            f"{folder} holds a run already; go on with it by --resume {folder}, or choose another folder with -o"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise DistillationError(f"{folder} holds other files; choose a new or an empty folder with -o")


def _typed(context: typer.Context, *, but: tuple[str, ...]) -> list[str]:
    """Return what was typed on the command line besides those parameters, as it is typed."""
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in but and source is not None and source.name == "COMMANDLINE":
            found.append(parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper())
    return found


@contextlib.contextmanager
def _started(folder: Path, said: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Write down how the run is started; where it could not even start, leave nothing behind."""
    from convsurgeon.files import make_folder, write_text

    if resume:
        yield
        return
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder)
    write_text(folder / _COMMAND, json_module.dumps(said, indent=2) + "\n")
    try:
        yield
    except BaseException:
        if not (folder / _CONFIG).exists():
            (folder / _COMMAND).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else's files are in it
                for each in made:
                    each.rmdir()
        raise


class _Prepared:
    """Teacher, student and data of a run, loaded and checked before anything is written."""

    def __init__(self, said: dict[str, Any]) -> None:
        import torch

        from convsurgeon.cli._data import PreprocessingFlags, load_splits
        from convsurgeon.cli._models import check_ops, load_model, trusted
        from convsurgeon.distillation import methods
        from convsurgeon.record import read_record

        self.said = said
        check_ops(said["to"], said["pointwise"])
        methods.get(said["method"])
        torch.manual_seed(said["seed"])  # random weights are the same when the run is resumed
        trust = {"trust": said["trust"], "trust_module": said["trust_module"]}
        weights = {key: said[key] for key in ("weights", "weights_key", "weights_prefix", "model_arg")}
        self.teacher = load_model(said["teacher"], **weights, **trust)
        self.student = self._student(trusted(said["teacher"], said["trust_module"]))
        self.splits = load_splits(
            said["data"],
            PreprocessingFlags.of(said),
            {said["teacher"]: read_record(self.teacher), said["student"] or "the student": read_record(self.student)},
            root=Path(said["data_root"]) if said["data_root"] else None,
            val_fraction=said["val_fraction"],
            seed=said["seed"],
        )
        self.example = self._example()

    def _student(self, admitted: list[str]) -> Any:
        from convsurgeon.cli._models import load_model, selectors
        from convsurgeon.surgery import rewrite

        said = self.said
        choice = selectors(*(said[key] for key in ("keep", "only", "mapping", "pointwise", "option")))
        if said["student"] is None:
            return rewrite(self.teacher, said["to"], **choice)
        if said["to"] or any(choice.values()):
            raise OptionError(
                "the student is converted already; leave out --to, --keep, --only, --map, --pointwise and --option"
            )
        return load_model(said["student"], trust=said["trust"], trust_module=admitted)

    def _example(self) -> Any:
        """Return one image of the data as a batch, having checked that both networks take it."""
        from convsurgeon.cli._models import count_scores
        from convsurgeon.data import ImageSet
        from convsurgeon.evaluation import check_head
        from convsurgeon.surgery import check_outputs

        train = self.splits.train
        example = train[0][0][None] if isinstance(train, ImageSet) else next(iter(train))[0][:1]
        scores = count_scores(self.teacher, example)
        check_outputs(self.teacher, self.student, example)
        if self.splits.classes and scores is not None:
            check_head(scores, len(self.splits.classes), data=self.splits.name)
        return example

    def train_and_deliver(self, folder: Path, *, resume: bool, report: Any) -> tuple[dict[str, Any], Any]:
        """Train, choose, test once, save, export and time; return the figures and the table of them."""
        result = self._train(folder, resume=resume and (folder / _CONFIG).exists(), report=report)
        file = self._save(result.student, folder)
        return self._deliver(result, file, folder, report=report)

    def _train(self, folder: Path, *, resume: bool, report: Any) -> DistillResult:
        from convsurgeon.distillation import Augmentation, distill
        from convsurgeon.options import parse_pairs

        said, splits = self.said, self.splits
        augmentation = None
        if said["augment"]:
            augmentation = Augmentation.usual(tuple(self.example.shape[-2:]), flip=splits.flip)
        return distill(
            self.teacher,
            self.student,
            splits.train,
            splits.val,
            method=said["method"],
            method_options=parse_pairs(said["method_option"] or [], flag="--method-option"),
            objective=said["objective"],
            objective_options=parse_pairs(said["objective_option"] or [], flag="--objective-option"),
            augmentation=augmentation,
            run_dir=folder,
            resume=resume,
            report=report,
            **{key: said[key] for key in (
                "epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "seed", "device", "precision",
                "limit_batches", "tensorboard",
            )},
        )  # fmt: skip

    def _save(self, student: nn.Module, folder: Path) -> Path:
        """Save the student, which remembers like its teacher what images look like."""
        from convsurgeon.record import update_record
        from convsurgeon.storage import default_output, save

        splits = self.splits
        for network in (self.teacher, student):
            update_record(
                network,
                preprocessing=splits.preprocessing.to_dict() if splits.preprocessing else None,
                preprocessing_of=None,
                classes=list(splits.classes) or None,
                input_shape=list(self.example.shape),
            )
        suffix = default_output(student, self.said["teacher"], "student").suffix
        return save(student, folder / f"student{suffix}", force=True)

    def _deliver(self, result: DistillResult, file: Path, folder: Path, *, report: Any) -> tuple[dict[str, Any], Any]:
        from convsurgeon.delivery import compare
        from convsurgeon.distillation import RunFolder
        from convsurgeon.evaluation import evaluate

        splits = self.splits
        judge = splits.test if splits.test is not None else splits.val
        if splits.test is None:
            say(f"note: {splits.name} has no test images; accuracies are those on validation data")
        settings = {"report": report, **{key: self.said[key] for key in ("batch_size", "limit_batches")}}
        comparison = compare(
            self.teacher,
            result.student,
            folder,
            example=self.example,
            test=judge,
            images=_images(judge if judge is not None else splits.train),
            force=True,
            **settings,
        )
        ended = None
        if result.teacher is not None and judge is not None:
            ended = evaluate(result.teacher, judge, **settings).accuracy
        figures = {
            "run": str(folder),
            "student_file": str(file),
            "onnx_file": str(comparison.after.delivery.path),
            "preprocessing": None if splits.preprocessing is None else splits.preprocessing.to_dict(),
            "config": RunFolder.read_config(folder),
            "training": dict(result.metrics),
            "teacher_accuracy_ended": ended,
            **comparison.to_dict(),
        }
        return figures, draw_comparison(comparison, ended=ended)


def _images(part: Any) -> Any:
    from convsurgeon.data import ImageSet, make_loader

    return make_loader(part, batch_size=16, shuffle=False) if isinstance(part, ImageSet) else part


def _read_command(folder: Path) -> dict[str, Any]:
    try:
        said = json_module.loads((folder / _COMMAND).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DistillationError(f"{folder} holds no run that the command line started: no {_COMMAND}") from error
    if not isinstance(said, dict):
        raise DistillationError(f"{folder / _COMMAND} is damaged: it holds no JSON object")
    missing = [key for key in _SAID if key not in said]
    if missing:
        raise DistillationError(f"{folder / _COMMAND} is of another version: it lacks {missing[0]!r}")
    return said
