"""What kind of outputs a network gives, by the best evidence that there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from convsurgeon.outputs._sources import Source
from convsurgeon.outputs._statistics import FEWEST_ROWS, confidence, lead, shared_part, uniqueness

Answers = Literal["auto", "scores", "values", "probabilities", "multilabel"]
"""What a user may say that outputs are."""
Kind = Literal["scores", "distribution", "probabilities", "multilabel", "values"]
ANSWERS: tuple[str, ...] = get_args(Answers)

_TOLERANCE = 1e-3
_ROUGHLY = 0.1
"""In bf16, by many classes."""
_SHARED, _UNIQUE = 0.15, 0.05
# of few numbers the lead says nothing: classes may be alike in pairs
_MANY, _LEAD = 8, 2.1
# where the highest is far ahead the rest may move together more, of very many classes in proportion
_FAR_LEAD, _CONFIDENT, _SHARED_IF_FAR, _VERY_MANY, _SHARED_EACH = 2.4, 0.5, 0.25, 20, 0.1
_IMAGENET = 1000


@dataclass(frozen=True)
class Outputs:
    """What kind of outputs a network gives, and why.

    Args:
        kind: `scores`, logits of classes of which an image has one; `distribution`, their softmax; `multilabel`,
            logits of which each has a sigmoid; `probabilities`, their sigmoids; or `values`.
        evidence: one clause that says what shows it.
        sure: whether the evidence settles it. Where not, they are matched as values for lack of anything better.
    """

    kind: Kind
    evidence: str
    sure: bool = True

    def question(self, option: str) -> str:
        """Return one line for the user where nothing settles it; empty where something does.

        Args:
            option: how `scores` is said, such as `--answers scores`.
        """
        if self.sure:
            return ""
        return (
            f"the outputs are matched as values: nothing shows that they are class scores ({self.evidence}); if they "
            f"are, say {option}, and multilabel in its place where an image may have several labels"
        )


def has_classes(kind: Kind) -> bool:
    """Whether the highest output of an image is its class."""
    return kind in ("scores", "distribution")


def kind_of_outputs(
    output: Tensor,
    *,
    said: Answers = "auto",
    last_operation: str = "",
    labels: Tensor | None = None,
    class_names: int = 0,
    source: Source | None = None,
) -> Outputs:
    """Return what kind a network's first output is.

    What the user says decides, then shape and range, the labels that came with the images, what the network says
    of itself, and last a statistic of the numbers.

    Args:
        output: of a trained network in eval mode, for some images, `(B, ...)`.
        said: what the user says; `probabilities` whose rows sum to 1 are a `distribution`.
        last_operation: what gave the output, as `last_operation` finds it.
        labels: of the images, `(B, ...)`, or of more images.
        class_names: how many classes the images' data set has; 0 if unknown.
        source: what the network says of its classes.
    """
    output = output.detach().float()
    if said != "auto":
        evidence = "it was said"
        if said == "probabilities":
            return Outputs("distribution" if _sums_to_one(output) else "probabilities", evidence)
        return Outputs(said, evidence)
    if found := _by_range(output, last_operation):
        return found
    found = _by_labels(output, labels, class_names)
    if _are_shares(output):
        if found is None:
            return Outputs("values", "all numbers are from 0 to 1, do not sum to 1, and no sigmoid was seen")
        return replace(found, kind="values" if found.kind == "values" else "probabilities")
    return found or _by_source(output, source or Source()) or _by_statistic(output, last_operation)


def why_not(kind: str, output: Tensor) -> str | None:
    """Return why an output, `(B, ...)`, cannot be of a kind that the user said, or None if it can."""
    if kind == "scores" and (output.dim() != 2 or output.shape[1] < 2):
        return (
            "answers='scores' needs a row of two class scores or more an image, and the teacher's first answer is "
            f"{tuple(output.shape)} for a batch"
        )
    if kind == "probabilities" and not _are_shares(output):
        return (
            "answers='probabilities' needs numbers from 0 to 1, and the teacher's first answer runs from "
            f"{float(output.min()):.3g} to {float(output.max()):.3g}"
        )
    return None


def fits(kind: Kind, output: Tensor) -> bool:
    """Whether one of several outputs can be of the kind of the first one."""
    if kind == "scores":
        return output.dim() == 2 and output.shape[1] > 1
    if kind == "distribution":
        return _sums_to_one(output, _ROUGHLY)
    return kind == "multilabel" or (kind == "probabilities" and _are_shares(output))


def _by_range(output: Tensor, last_operation: str) -> Outputs | None:
    """Settle what shape, range and the last operation settle."""
    if last_operation == "sigmoid" and _are_shares(output):
        return Outputs("probabilities", "the last operation is a sigmoid")
    if _sums_to_one(output) and (output.dim() == 2 or last_operation == "softmax"):
        return Outputs("distribution", "the numbers of an image are from 0 to 1 and sum to 1")
    if output.dim() != 2 or output.shape[1] < 2:
        return Outputs("values", f"the shape {tuple(output.shape)} is no row of two numbers or more an image")
    if last_operation == "log_softmax":
        return Outputs("scores", "the last operation is a log-softmax")
    if last_operation == "tanh":
        return Outputs("values", "the last operation is a tanh")
    norms = output.norm(dim=1)
    if len(norms) > 1 and bool((norms - norms.mean()).abs().max() <= _TOLERANCE * norms.mean()):
        return Outputs("values", "all rows have the same length, as embeddings have")
    return None


def _by_labels(output: Tensor, labels: Tensor | None, class_names: int) -> Outputs | None:
    columns = output.shape[1]
    if class_names == columns:
        return Outputs("scores", f"the images' data set has {columns} classes")
    if labels is None or not labels.numel():
        return None
    if labels.shape[1:] == output.shape[1:] and bool(((labels == 0) | (labels == 1)).all()):
        if bool((labels.sum(1) == 1).all()):
            return Outputs("scores", f"each label is one of {columns} classes")
        return Outputs("multilabel", f"the labels are {columns} zeros and ones an image")
    if labels.dim() != 1 or labels.is_floating_point():
        return Outputs("values", f"the labels are {labels.dtype} of shape {tuple(labels.shape[1:])} an image")
    lowest, classes = int(labels.min()), int(labels.max()) + 1
    if lowest >= 0 and classes == columns:
        return Outputs("scores", f"the labels are class numbers from 0 to {columns - 1}")
    return None


def _by_source(output: Tensor, source: Source) -> Outputs | None:
    columns = output.shape[1]
    if source.names == columns:
        return Outputs("scores", f"the model's record names {columns} classes")
    if source.package and columns == _IMAGENET:
        return Outputs("scores", f"it is a classifier of {source.package} with {columns} classes")
    if dict(source.counts).get("num_classes") == 0:
        return Outputs("values", "the model's num_classes is 0")
    name = next((name for name, count in source.counts if count == columns), None)
    if name is None or _go_down_together(output):
        return None
    return Outputs("scores", f"the model's {name} is {columns}")


def _go_down_together(output: Tensor) -> bool:
    """Whether outputs look like those of several labels an image, most of which are absent from every image."""
    means = output.mean(1)
    return float(means.mean()) < -1 and bool(2 * means.square().mean() > output.square().mean())


def _by_statistic(output: Tensor, last_operation: str) -> Outputs:
    if last_operation != "linear":
        return Outputs("values", f"their last operation is {last_operation or 'not known'}", sure=False)
    if len(output) < FEWEST_ROWS:
        return Outputs("values", f"{len(output)} images are too few to tell", sure=False)
    if _like_softmax(output):
        return Outputs("scores", "the numbers of an image are spread as those before a trained softmax are")
    evidence = f"R = {shared_part(output):.2f}"
    if output.shape[1] >= _MANY:
        evidence += f", lead = {lead(output):.1f}"
    return Outputs("values", evidence, sure=False)


def _like_softmax(output: Tensor) -> bool:
    columns, shared = output.shape[1], shared_part(output)
    if columns < _MANY:
        return shared < _SHARED and uniqueness(output) <= _UNIQUE
    ahead = lead(output)
    if shared < _SHARED and uniqueness(output) <= _UNIQUE and ahead >= _LEAD:
        return True
    # Adam lets all scores of an image move together, a little
    most = _SHARED_EACH * columns if columns >= _VERY_MANY else _SHARED_IF_FAR
    return ahead >= _FAR_LEAD and confidence(output) >= _CONFIDENT and shared < most


def _are_shares(output: Tensor) -> bool:
    return bool((output >= 0).all() and (output <= 1).all())


def _sums_to_one(output: Tensor, tolerance: float = _TOLERANCE) -> bool:
    if output.dim() < 2 or output.shape[1] < 2 or not _are_shares(output):
        return False
    return bool((output.float().sum(1) - 1).abs().max() <= tolerance)
