"""What a picture becomes: pixels, color, size, and the options that change them."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convsurgeon.errors import DataError, OptionError
from convsurgeon.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    parse_preprocessing,
    preprocessing_of,
)
from convsurgeon.record import update_record

IMAGENET = Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD, crop=0.875)
GRAY = Preprocessing((4, 6), (0.25,), (0.5,), color="gray")
RGB = Preprocessing((4, 6), (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))


def test_says_itself_in_one_line():
    assert str(GRAY) == "4x6, gray, mean 0.25, std 0.5"
    assert str(IMAGENET) == "224x224, rgb, mean 0.485,0.456,0.406, std 0.229,0.224,0.225, crop 0.875"


@pytest.mark.parametrize("given", [GRAY, RGB, IMAGENET])
def test_survives_json_and_pickle(given):
    assert Preprocessing.from_dict(json.loads(json.dumps(given.to_dict()))) == given
    assert pickle.loads(pickle.dumps(given)) == given
    assert hash(given) == hash(Preprocessing.from_dict(given.to_dict()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (0.1,)}, "rgb needs 3 mean value(s), got 1"),
        ({"std": (0.1, 0.2)}, "rgb needs 3 std value(s), got 2"),
        ({"std": (0.1, 0.0, 0.2)}, "std must be above 0, got 0.1,0,0.2"),
        ({"mean": (0.1, float("nan"), 0.2)}, "mean must be finite, got 0.1,nan,0.2"),
        ({"size": (0, 4)}, "size must be at least 1x1, not 0x4"),
        ({"size": (4,)}, "size is height and width in whole pixels, not (4,)"),
        ({"size": (4.5, 4)}, "size is height and width in whole pixels, not (4.5, 4)"),
        ({"color": "bgr"}, "color is 'rgb' or 'gray', not 'bgr'"),
        ({"crop": 0.0}, "crop is a share in (0, 1], not 0.0"),
        ({"crop": 1.5}, "crop is a share in (0, 1], not 1.5"),
        ({"interpolation": "cubic"}, "interpolation is one of bilinear, bicubic, nearest, nearest-exact, not 'cubic'"),
        ({"zoom": 2}, "zoom"),
        ({"size": None}, "cannot be read"),
    ],
)
def test_refuses_what_cannot_be(fields, message):
    with pytest.raises(OptionError, match=re.escape(message)) as caught:
        Preprocessing.from_dict({**RGB.to_dict(), **fields})
    assert "\n" not in str(caught.value)


def test_normalize_is_the_formula():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 4, 6)
    before = pixels.clone()
    batch = RGB.normalize(pixels)
    assert batch.dtype == torch.float32
    assert batch.shape == (2, 3, 4, 6)
    torch.testing.assert_close(batch[1, :, 3, 5], torch.tensor([-0.2, 0.8, -0.05]))
    assert torch.equal(pixels, before)


def test_normalize_takes_uint8_only():
    with pytest.raises(DataError, match=r"takes uint8 pixels, not torch\.float32"):
        GRAY.normalize(torch.zeros(1, 1, 4, 6))


def test_fit_leaves_what_is_right_alone():
    pixels = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    assert torch.equal(RGB.fit(pixels), pixels)


def test_fit_crops_what_has_the_size_already():
    from torchvision.transforms import v2

    photo = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    theirs = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(IMAGENET.fit(photo), theirs(photo))


def test_fit_takes_planes_pictures_and_batches():
    plane = torch.randint(0, 256, (4, 6), dtype=torch.uint8)
    assert torch.equal(GRAY.fit(plane), plane[None])
    batch = torch.randint(0, 256, (5, 3, 9, 11), dtype=torch.uint8)
    fitted = RGB.fit(batch)
    assert fitted.shape == (5, 3, 4, 6)
    assert torch.equal(fitted[2], RGB.fit(batch[2]))


def test_fit_matches_torchvision_on_a_photo():
    from torchvision.transforms import v2

    photo = torch.randint(0, 256, (3, 301, 444), dtype=torch.uint8)
    theirs = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(IMAGENET.fit(photo), theirs(photo))
    assert torch.equal(IMAGENET.fit(photo.mT.contiguous()), theirs(photo.mT.contiguous()))


@pytest.mark.parametrize("shape", [(3, 8), (40, 6), (4, 7), (100, 3), (1, 1)])
def test_fit_covers_any_shape_without_stretching_the_centre(shape):
    assert GRAY.fit(torch.full(shape, 77, dtype=torch.uint8)).unique().tolist() == [77]
    assert GRAY.fit(torch.zeros(shape, dtype=torch.uint8)).shape == (1, 4, 6)


def test_fit_crops_the_centre():
    wide = torch.zeros(1, 4, 14, dtype=torch.uint8)
    wide[..., 4:10] = 200
    assert GRAY.fit(wide).unique().tolist() == [200]


def test_fit_refuses_other_tensors():
    with pytest.raises(DataError, match=r"must be uint8 .*not torch\.float32"):
        GRAY.fit(torch.zeros(1, 4, 6))
    with pytest.raises(DataError, match="1 to 4 channels, not 5"):
        GRAY.fit(torch.zeros(5, 4, 6, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"not \(4,\)"):
        GRAY.fit(torch.zeros(4, dtype=torch.uint8))


def test_color_is_weighted_and_repeated():
    red = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 4, 6)
    assert abs(int(GRAY.fit(red)[0, 0, 0]) - 0.299 * 200) <= 1
    gray = torch.randint(0, 256, (1, 4, 6), dtype=torch.uint8)
    assert torch.equal(RGB.fit(gray), gray.expand(3, 4, 6))


# a picture whose left half is dark and whose right half is bright, in every mode that files come in
_PLANE = np.repeat(np.array([[51, 51, 51, 204, 204, 204]], dtype=np.uint8), 4, axis=0)


def _picture(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(_PLANE.astype(np.uint16) * 256)
    if mode == "I":
        return Image.fromarray(_PLANE.astype(np.int32) * 256)
    if mode == "F":
        return Image.fromarray(_PLANE.astype(np.float32))
    if mode == "P with transparency":
        picture = Image.fromarray(_PLANE).convert("P")
        picture.info["transparency"] = bytes(range(256))
        return picture
    if mode == "CMYK":
        return Image.fromarray(_PLANE).convert("RGB").convert("CMYK")
    return Image.fromarray(_PLANE).convert(mode)


@pytest.mark.parametrize("target", [GRAY, RGB], ids=lambda target: target.color)
@pytest.mark.parametrize(
    "mode", ["L", "LA", "P", "P with transparency", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]
)
def test_every_mode_decodes_to_the_same_pixels(mode, target):
    fitted = target.fit(_picture(mode))
    expected = torch.from_numpy(_PLANE).expand(target.channels, 4, 6)
    torch.testing.assert_close(fitted.int(), expected.int(), atol=1, rtol=0)


def test_bilevel_decodes_to_black_and_white():
    fitted = GRAY.fit(Image.fromarray(_PLANE > 100))
    assert fitted[0, 0].tolist() == [0, 0, 0, 255, 255, 255]


def test_a_turned_photo_is_put_upright():
    picture = Image.fromarray(_PLANE)
    picture.getexif()[0x0112] = 3  # upside down
    assert torch.equal(GRAY.fit(picture)[0], torch.from_numpy(_PLANE).flip(0, 1))
    assert picture.getexif()[0x0112] == 3


def test_parse_changes_only_what_is_named():
    assert parse_preprocessing(IMAGENET, size=None, mean=None, std=None, color=None) == IMAGENET
    assert parse_preprocessing(IMAGENET, size="32", mean=None, std=None, color=None).size == (32, 32)
    assert parse_preprocessing(IMAGENET, size="32,48", mean=None, std=None, color=None).size == (32, 48)
    changed = parse_preprocessing(IMAGENET, size="32x48", mean="0.5", std="0.1,0.2,0.3", color=None)
    assert changed == Preprocessing((32, 48), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), crop=0.875)


def test_parse_averages_and_repeats_with_the_color():
    gray = parse_preprocessing(RGB, color="gray")
    assert gray.mean == pytest.approx((0.2,))
    assert gray.std == pytest.approx((3.5 / 3,))
    assert parse_preprocessing(GRAY, color="rgb") == Preprocessing((4, 6), (0.25,) * 3, (0.5,) * 3)
    assert parse_preprocessing(RGB, color="gray", mean="0.4", std="0.6").mean == (0.4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "big"}, "--size takes pixels such as 32, or height,width such as 32,48; got 'big'"),
        ({"size": "1,2,3"}, "got '1,2,3'"),
        ({"size": "-4"}, "got '-4'"),
        ({"mean": "a,b"}, "--mean takes numbers such as 0.5 or 0.5,0.5,0.5; got 'a,b'"),
        ({"mean": "0.1,0.2"}, "--mean takes 1 or 3 numbers here, got 2: '0.1,0.2'"),
        ({"std": "0"}, "std must be above 0"),
        ({"color": "bgr"}, "--color is 'rgb' or 'gray', not 'bgr'"),
        ({"color": "gray", "mean": "0.1,0.2,0.3"}, "--mean takes 1 number here"),
    ],
)
def test_parse_names_the_option_it_cannot_read(options, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_preprocessing(IMAGENET, **options)


def test_a_model_remembers_its_preprocessing():
    model = nn.Linear(1, 1)
    assert preprocessing_of(model) is None
    update_record(model, preprocessing=GRAY.to_dict())
    assert preprocessing_of(model) == GRAY
