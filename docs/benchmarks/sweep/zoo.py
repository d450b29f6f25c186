"""What is swept: every name of both libraries, how it is built cheaply, and the smallest input it takes."""

from __future__ import annotations

import fnmatch
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_builder

SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 300, 320, 384, 448, 512)
# for models that are built for one size of image
SMALL = 64
CLIPS = ((4, 32), (8, 32), (8, 64), (16, 64), (16, 112), (16, 224), (32, 224))
_LARGE = re.compile(
    r"xlarge|xxlarge|huge|giant|gigantic|enormous|_[1-9]\d?b_|_l2|x4_|2560|1280|x48d|32gf|128gf|_xl|xxl|so400m"
)
_MEDIUM = re.compile(r"large|_l\d?_|_l$|[12]\d\d(?!\d)|_b[5-8]|x3_|x4|x2_|16gf|_m36|_m48|_b36")
# of torchvision's detectors these take the sizes that images are scaled to; the others have one fixed size
_SMALL_DETECTOR = {"min_size": 64, "max_size": 96}


@dataclass(frozen=True)
class Entry:
    """One name of a package; printed as `timm:resnet18`."""

    package: str
    name: str
    family: str

    def __str__(self) -> str:
        return f"{self.package}:{self.name}"


@dataclass(frozen=True)
class Example:
    """An input for a model, and how to write it."""

    label: str
    inputs: Any


def entries(only: Sequence[str] = ()) -> list[Entry]:
    """Return every model of both libraries, small ones of each family first, the large ones last."""
    found = [Entry("torchvision", name, _kind(name)) for name in torchvision.models.list_models()]
    for module in timm.list_modules():
        found += [Entry("timm", name, module) for name in timm.list_models(module=module)]
    chosen = [entry for entry in found if not only or any(fnmatch.fnmatchcase(str(entry), glob) for glob in only)]
    rank: dict[str, int] = {}
    ranked = []
    for entry in sorted(chosen, key=lambda entry: (_weight(entry.name), str(entry))):
        place = rank[entry.family] = rank.get(entry.family, -1) + 1
        ranked.append((_weight(entry.name), place, entry.family, entry.name, entry))
    return [each[-1] for each in sorted(ranked, key=lambda each: each[:-1])]


def build(entry: Entry, *, device: str, **timm_args: Any) -> nn.Module:
    """Return the model with random weights on `cpu` or `meta`, in eval mode."""
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        if entry.package == "timm":
            made: nn.Module = timm.create_model(entry.name, pretrained=False, **timm_args)
            return made.eval()
        builder = get_model_builder(entry.name)
        known = inspect.signature(builder).parameters
        args: dict[str, Any] = {"weights": None}
        if "weights_backbone" in known:
            args["weights_backbone"] = None
        if entry.family == "detection" and not entry.name.startswith("ssd"):
            args |= _SMALL_DETECTOR
        if "init_weights" in known:
            args["init_weights"] = False
        network: nn.Module = builder(**args)
        return network.eval()


def build_smaller(entry: Entry, model: nn.Module, *, device: str) -> tuple[nn.Module, Example] | None:
    """Return a model of one input size built anew for a small one, with that input, or None if it can't be."""
    channels, fixed = _input_facts(model)
    if entry.package != "timm" or fixed is None or fixed <= SMALL:
        return None
    example = _example((1, channels, SMALL, SMALL), device)
    try:
        smaller = build(entry, device=device, img_size=SMALL)
        with torch.no_grad():
            smaller(example.inputs)
    except Exception:  # then it takes no size, or not this one
        return None
    return smaller, replace(example, label=f"{example.label} (built for it)")


def examples(entry: Entry, model: nn.Module, *, device: str) -> Iterator[Example]:
    """Yield inputs to try, the smallest first."""
    if entry.family == "video":
        for frames, size in CLIPS:
            yield _example((1, 3, frames, size, size), device)
        return
    if entry.family == "optical_flow":
        for size in (64, 128, 256):
            one = _example((1, 3, size, size), device)
            yield Example(f"2 x {one.label}", (one.inputs, one.inputs))
        return
    if entry.family == "detection":
        # an image is scaled to what the detector wants, so its own size matters little
        one = _example((3, 64, 64), device)
        yield Example(f"[{one.label}]", ([one.inputs],))
        return
    channels, fixed = _input_facts(model)
    sizes = (fixed,) if fixed else SIZES
    for size in sizes:
        yield _example((1, channels, size, size), device)


def cheap_random_weights() -> None:
    """Make torch's and timm's initialisers cut their numbers from one strip of random ones.

    For this process and its forks. Drawing a billion numbers takes longer than all of the rest.
    """
    # a prime, so that the rows of no kernel repeat
    strip = torch.rand(1_000_003, generator=torch.Generator().manual_seed(0))

    def fill(tensor: Tensor, low: float, high: float) -> Tensor:
        with torch.no_grad():
            if tensor.is_meta or not tensor.is_contiguous() or not tensor.is_floating_point():
                return original(tensor, low, high)
            flat = tensor.detach().view(-1)
            for start in range(0, flat.numel(), strip.numel()):
                part = flat[start : start + strip.numel()]
                part.copy_(strip[: part.numel()]).mul_(high - low).add_(low)
        return tensor

    original: Callable[..., Tensor] = Tensor.uniform_

    def uniform_(self: Tensor, a: float = 0.0, b: float = 1.0, **_: Any) -> Tensor:
        return fill(self, float(a), float(b))

    def normal_(self: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
        return fill(self, mean - 1.73 * std, mean + 1.73 * std)

    def trunc_normal_(tensor: Tensor, mean: float, std: float, *_: Any, **__: Any) -> Tensor:
        return normal_(tensor, mean, std)

    Tensor.uniform_, Tensor.normal_ = uniform_, normal_  # type: ignore[method-assign, assignment]
    torch.nn.init._no_grad_trunc_normal_ = trunc_normal_
    timm.layers.weight_init._trunc_normal_ = trunc_normal_


def _kind(name: str) -> str:
    """Return the kind of a torchvision model: `detection`, `video`, or its family among the classifiers."""
    module: str = get_model_builder(name).__module__
    return module.removeprefix("torchvision.models.").partition(".")[0]


def _weight(name: str) -> int:
    return 2 if _LARGE.search(name) else 1 if _MEDIUM.search(name) else 0


def _example(shape: tuple[int, ...], device: str) -> Example:
    made = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    return Example("x".join(map(str, shape)), made)


def _input_facts(model: nn.Module) -> tuple[int, int | None]:
    """Return a timm model's input channels, and its image size where only one will do."""
    facts = getattr(model, "default_cfg", None) or {}
    channels, *size = facts.get("input_size", (3, 224, 224))
    return int(channels), int(size[0]) if facts.get("fixed_input_size") else None
