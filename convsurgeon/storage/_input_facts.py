"""What the model zoos know about the pictures their networks were made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from convsurgeon.preprocessing import INTERPOLATIONS


def torchvision_facts(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Read size, mean and standard deviation off the transforms of the library's own weights.

    Classifiers resize the shorter side and cut out the middle; segmentation networks only resize.
    Of detectors, video and flow networks nothing is said that would hold for one picture.
    """
    from torchvision.models import get_model_weights
    from torchvision.transforms._presets import ImageClassification, SemanticSegmentation

    preset = get_model_weights(name).DEFAULT.transforms()
    if isinstance(preset, ImageClassification):
        size = _pair(preset.crop_size)
        crop = min(size) / min(_pair(preset.resize_size))
    elif isinstance(preset, SemanticSegmentation):
        size, crop = _pair(preset.resize_size), 1.0
    else:
        return {}
    size = _pair(args.get("image_size", size))
    return _entries(size, 3, mean=preset.mean, std=preset.std, crop=crop, interpolation=preset.interpolation.value)


def timm_facts(model: nn.Module, args: Mapping[str, Any]) -> dict[str, Any]:
    """Read them off `pretrained_cfg`, which every timm model carries; the stem says how many channels."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if "input_size" not in config:
        return {}
    channels, *size = config["input_size"]
    stem = config.get("first_conv")
    if isinstance(stem, str) and stem:
        channels = getattr(_submodule(model, stem), "in_channels", args.get("in_chans", channels))
    return _entries(
        _pair(args.get("img_size", size)),
        channels,
        mean=config.get("mean", ()),
        std=config.get("std", ()),
        crop=config.get("crop_pct") or 1.0,
        interpolation=config.get("interpolation"),
    )


def _entries(size: list[int], channels: int, *, mean: Any, std: Any, crop: float, interpolation: Any) -> dict[str, Any]:
    """Return record entries: one channel sees a grey picture, and of other counts than 3 nothing is known.

    An interpolation that tensors do not offer is replaced by bicubic, the closest one.
    """
    entries: dict[str, Any] = {"input_shape": [1, channels, *size]}
    mean, std = [float(value) for value in mean], [float(value) for value in std]
    if channels == 1 and mean and std:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    if len(mean) == len(std) == channels and channels in (1, 3):
        color = "gray" if channels == 1 else "rgb"
        entries["preprocessing"] = {
            "size": size,
            "mean": mean,
            "std": std,
            "color": color,
            "crop": min(crop, 1.0),
            "interpolation": interpolation if interpolation in INTERPOLATIONS else "bicubic",
        }
    return entries


def _pair(size: Any) -> list[int]:
    values = [int(size)] if isinstance(size, int) else [int(value) for value in size]
    return values * 2 if len(values) == 1 else values


def _submodule(model: nn.Module, fqn: str) -> nn.Module | None:
    return dict(model.named_modules()).get(fqn)
