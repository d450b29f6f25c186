"""What verbs do with their shared arguments: load, select, shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsurgeon.cli._drawing import say
from convsurgeon.errors import ModelError, OptionError, one_line
from convsurgeon.options import parse_pairs
from convsurgeon.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convsurgeon.surgery import Plan


def load_model(
    source: str,
    *,
    weights: str | None = None,
    weights_key: str | None = None,
    weights_prefix: str | None = None,
    model_arg: list[str] | None = None,
    trust: bool = False,
    trust_module: list[str] | None = None,
) -> nn.Module:
    """Load a model; what it has to say goes to stderr in one line."""
    from convsurgeon.storage import load, parse_model_args

    def speak(event: Progress) -> None:
        if event.message:
            say(f"note: {event.message}")

    return load(
        source,
        weights=weights,
        weights_key=weights_key,
        weights_prefix=weights_prefix,
        model_args=parse_model_args(model_arg or []),
        trust=trust,
        trust_modules=trust_module or [],
        report=speak,
    )


def trusted(source: str, trust_module: list[str] | None) -> list[str]:
    """Return the modules whose classes a further file may use: those said, and one typed as `module:factory`."""
    module, colon, _ = source.partition(":")
    typed = [module] if colon and module not in ("torchvision", "timm") and not Path(source).exists() else []
    return [*(trust_module or []), *typed]


def selectors(
    keep: list[str] | None,
    only: list[str] | None,
    mapping: list[str] | None,
    pointwise: str | None,
    option: list[str] | None,
) -> dict[str, Any]:
    """Return the keyword arguments of `plan` that the flags stand for."""
    return {
        "keep": keep or (),
        "only": only or (),
        "mapping": _in_order(mapping or []),
        "pointwise": pointwise,
        "options": parse_pairs(option or [], flag="--option") or None,
    }


def check_ops(*names: str | None) -> None:
    """Raise an `UnknownNameError` for an op that does not exist, before a large model is loaded."""
    from convsurgeon import ops
    from convsurgeon.surgery import NO_OP

    for name in names:
        if name is not None and name != NO_OP:
            ops.get(name)


def _in_order(items: list[str]) -> dict[str, str]:
    """Return patterns and ops with a repeated pattern where it was said last, since the last match wins.

    >>> _in_order(["a=shift", "*=group", "a=bsconv"])
    {'*': 'group', 'a': 'bsconv'}
    """
    found: dict[str, str] = {}
    for item in items:
        for pattern, op in parse_pairs([item], flag="--map").items():
            found.pop(pattern, None)
            found[pattern] = op
    return found


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: naming the file.
    """
    from convsurgeon.storage import read_plan as read

    return read(path)


def parse_shape(text: str) -> tuple[int, ...]:
    """Read `1,3,224,224`.

    Raises:
        OptionError: for anything else than positive whole numbers.
    """
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise OptionError(f"--input-shape must be like 1,3,224,224, got {text!r}") from error
    if len(shape) < 2 or min(shape) < 1:
        raise OptionError(f"--input-shape must be like 1,3,224,224, got {text!r}")
    return shape


def example_for(model: nn.Module, input_shape: str | None) -> Tensor | None:
    """Return an input of batch 1: of the shape asked for, else of the one the model's source knows, else None."""
    from convsurgeon.record import read_record
    from convsurgeon.surgery import example_like

    shape = _known_shape(read_record(model)) if input_shape is None else parse_shape(input_shape)
    try:
        return None if shape is None else example_like(model, [1, *shape[1:]])
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # torch, of a size beyond memory
        raise OptionError(f"--input-shape {input_shape}: no such input can be made: {one_line(error)}") from error


def _known_shape(record: Mapping[str, Any]) -> Sequence[int] | None:
    """Return a batch shape that a model takes by its record: that of an input, or of its preprocessed images."""
    from convsurgeon.preprocessing import Preprocessing

    if record.get("input_shape") is not None or record.get("preprocessing") is None:
        return record.get("input_shape")
    preprocessing = Preprocessing.from_dict(record["preprocessing"])
    return (1, preprocessing.channels, *preprocessing.size)


def need_example(model: nn.Module, input_shape: str | None) -> Tensor:
    """Return an input of batch 1.

    Raises:
        OptionError: if its shape is neither given nor known.
    """
    example = example_for(model, input_shape)
    if example is None:
        raise OptionError("the input's shape is not known for this model; say it: --input-shape 1,3,224,224")
    return example


def count_scores(model: nn.Module, example: Tensor) -> int | None:
    """Return how many class scores a model gives for one image; None where it is no classifier.

    Raises:
        ModelError: if it cannot take the image.
    """

    import torch

    from convsurgeon.evaluation import logits_of
    from convsurgeon.surgery import copy_module, in_mode

    try:
        with torch.no_grad():
            answer = in_mode(copy_module(model), training=False)(example)
    except Exception as error:  # whatever a foreign forward raises
        size = "x".join(map(str, example.shape[1:]))
        raise ModelError(
            f"{type(model).__name__} cannot take images of {size}: {one_line(error)}; --size and --color change them"
        ) from error
    try:
        logits = logits_of(answer)
    except ModelError:
        return None
    return logits.shape[1] if logits.ndim == 2 else None


def set_threads(threads: int | None) -> None:
    """Set torch's processor threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def args_for(source: str, model_arg: list[str] | None, *, other: str | None) -> list[str] | None:
    """Leave `--model-arg` out for a file, which takes none, where it is meant for the other model."""
    meant_for_other = other is not None and Path(source).exists() and not Path(other).exists()
    return None if meant_for_other else model_arg


def file_stem(source: str) -> str:
    """Return what a model is called in the name of a file or folder.

    >>> file_stem("torchvision:resnet18"), file_stem("nets.small:Net")
    ('torchvision-resnet18', 'nets.small-Net')
    """
    return Path(source).stem if Path(source).exists() else source.replace(":", "-").replace("/", "-")
