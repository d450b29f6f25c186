"""What a picture becomes before a network sees it: size, color, mean and standard deviation, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import DataError, OptionError
from convsurgeon.record import read_record

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "nearest-exact")
"""What torchvision resizes tensors with."""

_CHANNELS = {"gray": 1, "rgb": 3}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Preprocessing:
    """Color, resize and centre crop on uint8 pixels, then `(pixel / 255 - mean) / std`.

    Args:
        size: height and width in pixels of what the network gets.
        mean: per channel, in units of full brightness (0..1).
        std: per channel, in the same units.
        color: `"rgb"` or `"gray"`.
        crop: the share of the resized image that the centre crop keeps, per side
            (torchvision's resize to 256 and crop to 224 is 0.875); 1 crops no more than the shape demands.
        interpolation: of the resize, antialiased: one of `INTERPOLATIONS`.

    Raises:
        OptionError: if the values contradict each other.

    Examples:
        >>> print(Preprocessing((28, 28), (0.286,), (0.353,), color="gray"))
        28x28, gray, mean 0.286, std 0.353
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    color: str = "rgb"
    crop: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.color not in _CHANNELS:
            raise OptionError(f"preprocessing: color is 'rgb' or 'gray', not {self.color!r}")
        if len(self.size) != 2 or not all(type(side) is int for side in self.size):
            raise OptionError(f"preprocessing: size is height and width in whole pixels, not {self.size}")
        if min(self.size) < 1:
            raise OptionError(f"preprocessing: size must be at least 1x1, not {self.size[0]}x{self.size[1]}")
        if not 0 < self.crop <= 1:
            raise OptionError(f"preprocessing: crop is a share in (0, 1], not {self.crop}")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise OptionError(f"preprocessing: interpolation is one of {known}, not {self.interpolation!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise OptionError(
                    f"preprocessing: {self.color} needs {self.channels} {name} value(s), got {len(values)}"
                )
            if not all(math.isfinite(value) for value in values):
                raise OptionError(f"preprocessing: {name} must be finite, got {_listed(values)}")
        if min(self.std) <= 0:
            raise OptionError(f"preprocessing: std must be above 0, got {_listed(self.std)}")

    @property
    def channels(self) -> int:
        """1 for gray, 3 for rgb."""
        return _CHANNELS[self.color]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Rebuild it from `to_dict()`, whose tuples JSON has made lists.

        Raises:
            OptionError: if a field is missing, unknown or of the wrong kind.
        """
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise OptionError(f"preprocessing cannot be read from {dict(data)}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def fit(self, image: Image | Tensor) -> Tensor:
        """Return a picture's pixels in the color and size that the network takes.

        A PIL image or a uint8 tensor `(H, W)`, `(C, H, W)` or `(B, C, H, W)` becomes uint8 `(C, H, W)`, or
        `(B, C, H, W)` for a batch. The picture is scaled until it just covers
        `size / crop`, then cropped to `size` at its centre; one that has that size already is only
        recolored where `crop` is 1.

        Raises:
            DataError: if the tensor is not uint8, or has no 1, 2 (alpha), 3 or 4 (alpha) channels.
        """
        from torchvision.transforms.v2 import functional as transforms

        pixels = self._recolored(_pixels_of(image))
        height, width = pixels.shape[-2:]
        if (height, width) == self.size and self.crop == 1:
            return pixels
        how = transforms.InterpolationMode(self.interpolation)
        scaled = transforms.resize(pixels, self._cover(height, width), interpolation=how, antialias=True)
        cropped: Tensor = transforms.center_crop(scaled, list(self.size))
        return cropped.contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """Turn fitted uint8 pixels `(B, C, H, W)` into the float32 batch that the network takes."""
        if images.dtype != torch.uint8:
            raise DataError(f"normalize takes uint8 pixels, not {images.dtype}; fit() the pictures first")
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)

    def _recolored(self, pixels: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as transforms

        count = pixels.shape[-3]
        if count not in (1, 2, 3, 4):
            raise DataError(f"a picture has 1 to 4 channels, not {count} (shape {tuple(pixels.shape)})")
        pixels = pixels[..., : 1 if count < 3 else 3, :, :]  # alpha is dropped, as PIL's convert does
        if pixels.shape[-3] == self.channels:
            return pixels
        recolor = transforms.rgb_to_grayscale if self.channels == 1 else transforms.grayscale_to_rgb
        recolored: Tensor = recolor(pixels)
        return recolored.contiguous()

    def _cover(self, height: int, width: int) -> list[int]:
        """The smallest size of the picture's own shape that covers `size / crop`."""
        least_height, least_width = (round(side / self.crop) for side in self.size)
        if height * least_width <= width * least_height:
            return [least_height, max(least_width, int(least_height * width / height))]
        return [max(least_height, int(least_width * height / width)), least_width]

    def __str__(self) -> str:
        parts = [f"{self.size[0]}x{self.size[1]}", self.color]
        parts += [f"mean {_listed(self.mean)}", f"std {_listed(self.std)}"]
        if self.crop != 1:
            parts.append(f"crop {self.crop:.4g}")
        if self.interpolation != "bilinear":
            parts.append(self.interpolation)
        return ", ".join(parts)


def parse_preprocessing(
    base: Preprocessing,
    *,
    size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    color: str | None = None,
    crop: str | None = None,
    interpolation: str | None = None,
) -> Preprocessing:
    """Change what the command line names.

    `size` is `32` or `32,48` (height, width), `mean` and `std` are one number or one for each channel, `crop` is a
    share such as `0.875`, or `none`. Where the color changes and mean or std are not given, the old ones are averaged
    (to gray) or repeated (to rgb).

    Raises:
        OptionError: naming the option that cannot be read.

    Examples:
        >>> base = Preprocessing((28, 28), (0.286,), (0.353,), color="gray")
        >>> print(parse_preprocessing(base, size="32", color="rgb"))
        32x32, rgb, mean 0.286,0.286,0.286, std 0.353,0.353,0.353
    """
    color = base.color if color is None else color
    if color not in _CHANNELS:
        raise OptionError(f"--color is 'rgb' or 'gray', not {color!r}")
    channels = _CHANNELS[color]
    return replace(
        base,
        size=base.size if size is None else _size(size),
        mean=_stretched(base.mean if mean is None else _numbers("mean", mean, channels), channels),
        std=_stretched(base.std if std is None else _numbers("std", std, channels), channels),
        color=color,
        crop=base.crop if crop is None else _crop(crop),
        interpolation=base.interpolation if interpolation is None else _interpolation(interpolation),
    )


def choose_preprocessing(
    stored: Preprocessing | None,
    natural: Preprocessing | None,
    flags: Mapping[str, str | None],
    *,
    who: str,
    data: str,
    input_shape: Sequence[int] | None = None,
) -> tuple[Preprocessing, str | None]:
    """Return what pictures go through before a network sees them, and a remark on what of it nobody has said.

    What the network's source or its file says comes first, then what is natural to a data set that has a name. Where
    there is neither, the size must be known, and ImageNet's mean and standard deviation are assumed, without a crop.
    The flags change each of these.

    Args:
        stored: of the network.
        natural: of the data set.
        flags: what `parse_preprocessing` takes.
        who: the network, in messages.
        data: the data set, in messages.
        input_shape: a batch shape that the network takes, where it is known.

    Raises:
        OptionError: if the size is not known, or a flag cannot be read.
    """
    said = {name: value for name, value in flags.items() if value is not None}
    if stored is not None:
        return parse_preprocessing(stored, **said), None
    if natural is not None:
        wanted = parse_preprocessing(natural, **said)
        assumed = [name for name in ("size", "mean", "std", "color") if name not in said]
        return wanted, _assumption(who, assumed, f"taken from {data}")
    channels, *size = input_shape[1:] if input_shape is not None and len(input_shape) == 4 else (3,)
    if "size" not in said and not size:
        raise OptionError(f"the size of the images that {who} takes is not known; say it: --size H or --size H,W")
    height, width = size or (1, 1)  # the flag replaces it
    base = Preprocessing((height, width), IMAGENET_MEAN, IMAGENET_STD)
    if channels == 1:
        said = {"color": "gray", **said}
    wanted = parse_preprocessing(base, **said)
    return wanted, _assumption(who, [name for name in ("mean", "std") if name not in said], "assumed to be ImageNet's")


def _assumption(who: str, assumed: Sequence[str], what: str) -> str | None:
    if not assumed:
        return None
    *others, last = assumed
    names = f"{', '.join(others)} and {last}" if others else last
    flags = ", ".join(f"--{name}" for name in assumed)
    verb, change = ("are", "change") if others else ("is", "changes")
    return f"{who} has no stored preprocessing; {names} {verb} {what}: {flags} {change} {'them' if others else 'it'}"


def preprocessing_of(model: nn.Module) -> Preprocessing | None:
    """Return what the model remembers of its preprocessing, or None where it remembers nothing."""
    data = read_record(model).get("preprocessing")
    return None if data is None else Preprocessing.from_dict(data)


def _pixels_of(image: Image | Tensor) -> Tensor:
    """Pixels as a uint8 tensor, channels before height and width."""
    if not isinstance(image, Tensor):
        return _decoded(image)
    if image.dtype != torch.uint8:
        raise DataError(f"a picture must be uint8 with values 0 to 255, not {image.dtype}")
    if image.ndim not in (2, 3, 4):
        raise DataError(f"a picture is (H, W), (C, H, W) or a batch of those, not {tuple(image.shape)}")
    return image[None] if image.ndim == 2 else image


def _decoded(image: Image) -> Tensor:
    """A PIL image of any mode as uint8 gray or rgb, the way up in which a viewer shows it."""
    import numpy as np
    from PIL import ImageOps
    from torchvision.transforms.v2.functional import pil_to_tensor

    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; convert() would clip them to 255
        return torch.from_numpy((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))[None]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    gray = image.mode in ("1", "L", "LA", "La", "F")
    pixels: Tensor = pil_to_tensor(image.convert("L" if gray else "RGB"))
    return pixels


def _size(text: str) -> tuple[int, int]:
    try:
        sides = [int(part) for part in text.lower().replace("x", ",").split(",")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise OptionError(f"--size takes pixels such as 32, or height,width such as 32,48; got {text!r}")
    return sides[0], sides[-1]


def _crop(text: str) -> float:
    try:
        share = 1.0 if text.lower() == "none" else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise OptionError(f"--crop takes a share above 0 and up to 1 such as 0.875, or none; got {text!r}")
    return share


def _interpolation(text: str) -> str:
    if text not in INTERPOLATIONS:
        raise OptionError(f"--interpolation is one of {', '.join(INTERPOLATIONS)}, not {text!r}")
    return text


def _numbers(option: str, text: str, channels: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"--{option} takes numbers such as 0.5 or 0.5,0.5,0.5; got {text!r}") from error
    if len(values) not in (1, channels):
        wanted = "1 number" if channels == 1 else f"1 or {channels} numbers"
        raise OptionError(f"--{option} takes {wanted} here, got {len(values)}: {text!r}")
    return values


def _stretched(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Repeat one value for every channel, or average several into one."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
