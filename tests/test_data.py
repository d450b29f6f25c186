"""Data sets by name, folders and factories: sizes, splits, messages."""

import gzip
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from convsurgeon.data import (
    DataSplits,
    ImageSet,
    _folder,
    _images,
    _named,
    default_preprocessing,
    load_data,
    load_images,
    make_loader,
    names,
)
from convsurgeon.errors import DataError, OptionError, UnknownNameError
from convsurgeon.preprocessing import Preprocessing

GRAY = Preprocessing((4, 4), (0.5,), (0.25,), color="gray")
RGB = Preprocessing((4, 4), (0.5,) * 3, (0.25,) * 3)


def pixels_of(images):
    return images.pixels(range(len(images)))


def fingerprints(images):
    """One hashable value for each image, to compare splits as sets."""
    return [
        (int(label), bytes(row.flatten().tolist())) for row, label in zip(pixels_of(images), images.labels, strict=True)
    ]


# ---- ImageSet and its loader


def some_images(count=7):
    pixels = torch.arange(count * 16, dtype=torch.uint8).view(count, 1, 4, 4)
    return ImageSet(pixels, torch.arange(count) % 3, classes="abc", preprocessing=GRAY)


def test_single_images_and_batches_agree():
    images = some_images()
    batch, labels = images.__getitems__([5, 2])
    assert (batch.dtype, batch.shape, labels.dtype) == (torch.float32, (2, 1, 4, 4), torch.int64)
    assert labels.tolist() == [2, 2]
    one, label = images[5]
    assert torch.equal(one, batch[0])
    assert (label, type(label)) == (2, int)
    torch.testing.assert_close(one, (pixels_of(images)[5] / 255 - 0.5) / 0.25)
    with pytest.raises(IndexError):
        images[7]
    assert len(list(images)) == 7


def test_subsets_keep_order_and_nest():
    images = some_images()
    chosen = images.subset([6, 0, 4]).subset([2, 0])
    assert chosen.labels.tolist() == [1, 0]
    assert torch.equal(pixels_of(chosen), pixels_of(images)[[4, 6]])
    assert (len(images), len(chosen)) == (7, 2)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), [], "at least one image, got none"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), [0], "2 images need as many labels, got shape (1,)"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), [0, 3], "labels run from 0 to 3, but there are 3 classes"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), [0, -1], "labels run from -1 to 0"),
        (torch.zeros(2, 4, 4), [0, 1], "must be uint8"),
    ],
)
def test_an_image_set_refuses_what_does_not_go_together(pixels, labels, message):
    with pytest.raises(DataError, match=re.escape(message)):
        ImageSet(pixels, labels, classes="abc", preprocessing=GRAY)


@pytest.mark.parametrize("memory", [10**9, 0], ids=["kept", "fitted on access"])
def test_images_are_fitted_whether_they_stay_in_memory_or_not(monkeypatch, memory):
    monkeypatch.setattr(_images, "MEMORY", memory)
    raw = torch.randint(0, 256, (9, 6, 9), dtype=torch.uint8)
    images = ImageSet(raw, torch.zeros(9), classes="a", preprocessing=RGB)
    assert torch.equal(pixels_of(images), torch.stack([RGB.fit(each) for each in raw]))
    assert (images._pictures._images.shape == raw[:, None].shape) == (memory == 0)


def test_loader_gives_whole_batches():
    images = some_images()
    loader = make_loader(images, batch_size=3, shuffle=False)
    assert isinstance(loader, DataLoader)
    assert [len(labels) for _, labels in loader] == [3, 3, 1]
    assert torch.equal(torch.cat([batch for batch, _ in loader]), images.preprocessing.normalize(pixels_of(images)))
    assert [len(labels) for _, labels in make_loader(images, batch_size=3, shuffle=False, drop_last=True)] == [3, 3]
    with pytest.raises(OptionError, match="batch_size must be at least 1, not 0"):
        make_loader(images, batch_size=0, shuffle=False)


def test_a_shuffling_loader_has_its_own_generator():
    images = some_images()
    before = torch.random.get_rng_state()
    loader = make_loader(images, batch_size=7, shuffle=True)
    (first, _), (second, _) = next(iter(loader)), next(iter(loader))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loader.generator is not None
    assert not torch.equal(first, second)
    assert torch.equal(first, next(iter(make_loader(images, batch_size=7, shuffle=True)))[0])
    given = torch.Generator().manual_seed(4)
    assert make_loader(images, batch_size=7, shuffle=True, generator=given).generator is given


# ---- named sets


def test_names_and_their_natural_preprocessing():
    assert names() == ["cifar10", "cifar100", "digits", "fashion-mnist"]
    assert str(default_preprocessing("fashion-mnist")) == "28x28, gray, mean 0.286, std 0.353"
    assert default_preprocessing("digits").size == (8, 8)
    assert default_preprocessing("imagefolder:x") is None
    assert default_preprocessing("a.b:c") is None
    with pytest.raises(UnknownNameError, match=r"unknown data set 'digit'\. Did you mean 'digits'\?"):
        default_preprocessing("digit")


def test_unknown_names_list_what_there_is():
    with pytest.raises(UnknownNameError, match=r"Available: cifar10, .*imagefolder:DIR, package.module:factory"):
        load_data("imagenet")


def test_digits_have_their_sizes_and_statistics():
    splits = load_data("digits")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1293, 144, 360]
    assert splits.classes == tuple("0123456789")
    assert not splits.flip
    assert splits.preprocessing == default_preprocessing("digits") == splits.test.preprocessing
    pixels = pixels_of(splits.train)
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)
    batch, _ = splits.train.__getitems__(range(1293))
    assert abs(batch.mean()) < 0.01
    assert abs(batch.std() - 1) < 0.01


def test_digits_are_stratified():
    splits = load_data("digits")
    for part, low, high in ((splits.test, 34, 38), (splits.val, 13, 16)):
        counts = part.labels.bincount(minlength=10)
        assert low <= counts.min() <= counts.max() <= high


def test_only_validation_moves_with_the_seed():
    one, two = load_data("digits", seed=1), load_data("digits", seed=2)
    assert torch.equal(pixels_of(one.test), pixels_of(two.test))
    assert torch.equal(one.test.labels, two.test.labels)
    assert set(fingerprints(one.val)) != set(fingerprints(two.val))
    assert torch.equal(pixels_of(one.val), pixels_of(load_data("digits", seed=1).val))


def test_splits_share_no_image():
    from sklearn.datasets import load_digits

    splits = load_data("digits", seed=3)
    parts = [fingerprints(part) for part in (splits.train, splits.val, splits.test)]
    everything = [print_ for part in parts for print_ in part]
    digits = load_digits()
    scaled = (digits.images * 255 / 16).round().astype(np.uint8)
    expected = [(int(label), image.tobytes()) for image, label in zip(scaled, digits.target, strict=True)]
    assert sorted(everything) == sorted(expected)


def test_validation_fraction():
    assert load_data("digits", val_fraction=0).val is None
    assert len(load_data("digits", val_fraction=0).train) == 1437
    assert len(load_data("digits", val_fraction=0.25).val) == 359
    with pytest.raises(OptionError, match="val_fraction is a share from 0 up to, not including, 1, not 1"):
        load_data("digits", val_fraction=1)
    with pytest.raises(DataError, match=r"validation split of digits: 1437 image\(s\) are too few to hold out 1"):
        load_data("digits", val_fraction=1e-5)


def test_loading_leaves_random_states_alone():
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    load_data("digits", seed=5)
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_preprocessing_is_applied_to_every_split():
    splits = load_data("digits", preprocessing=RGB)
    assert {pixels_of(part).shape[1:] for part in (splits.train, splits.val, splits.test)} == {(3, 4, 4)}
    assert splits.preprocessing == RGB


# ---- fashion-mnist, in torchvision's layout and in Debian's


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder, *, packed):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 10)):
        arrays = {
            "images-idx3": generator.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            "labels-idx1": np.arange(count, dtype=np.uint8) % 10,
        }
        for kind, array in arrays.items():
            name = f"{part}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))


@pytest.fixture
def no_debian_package(monkeypatch, tmp_path):
    monkeypatch.setattr(_named, "DEBIAN_FASHION_MNIST", tmp_path / "no-package")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("no_debian_package")
def test_fashion_mnist_from_torchvisions_folder(tmp_path, packed):
    write_fashion(tmp_path / "FashionMNIST" / "raw", packed=packed)
    splits = load_data("fashion-mnist", root=tmp_path, val_fraction=0.25)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [30, 10, 10]
    assert splits.val.labels.bincount().tolist() == [1] * 10
    assert splits.classes[9] == "Ankle boot"
    assert splits.flip
    assert splits.test.labels.tolist() == list(range(10))


def test_fashion_mnist_from_the_debian_package(tmp_path, monkeypatch):
    write_fashion(tmp_path / "package", packed=True)
    monkeypatch.setattr(_named, "DEBIAN_FASHION_MNIST", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    splits = load_data("fashion-mnist")
    assert len(splits.test) == 10
    assert not (tmp_path / "data").exists()
    with pytest.raises(DataError, match="fashion-mnist is not under elsewhere;"):
        load_data("fashion-mnist", root="elsewhere")
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    found = {fingerprint[1] for part in (splits.train, splits.val) for fingerprint in fingerprints(part)}
    assert found == {image.tobytes() for image in expected}


@pytest.mark.usefixtures("no_debian_package")
def test_missing_fashion_mnist_says_both_ways_to_get_it(tmp_path):
    with pytest.raises(DataError) as caught:
        load_data("fashion-mnist", root=tmp_path)
    message = str(caught.value)
    assert f"torchvision.datasets.FashionMNIST('{tmp_path}', download=True)" in message
    assert "apt-get install dataset-fashion-mnist" in message
    assert "\n" not in message


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.usefixtures("no_debian_package")
def test_damaged_fashion_mnist_is_not_called_missing(tmp_path, packed):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_fashion(raw, packed=packed)
    damaged = raw / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be unpacked" if packed else "is damaged") as caught:
        load_data("fashion-mnist", root=tmp_path)
    assert "\n" not in str(caught.value)


# ---- cifar


@pytest.fixture
def cifar_files(tmp_path, monkeypatch):
    """Two tiny archives in CIFAR's format, for which torchvision's checksums are switched off."""
    from torchvision.datasets import CIFAR10, CIFAR100, cifar

    generator = np.random.default_rng(0)
    for kind, key, count in ((CIFAR10, "labels", 10), (CIFAR100, "fine_labels", 100)):
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        for name, _ in kind.train_list + kind.test_list:
            entry = {
                "data": generator.integers(0, 256, (2 * count, 3072), dtype=np.uint8),
                key: list(range(count)) * 2,
            }
            (folder / name).write_bytes(pickle.dumps(entry))
        meta = {kind.meta["key"]: [f"class {i}" for i in range(count)]}
        (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    return tmp_path


@pytest.mark.parametrize(("name", "classes", "train"), [("cifar10", 10, 100), ("cifar100", 100, 200)])
def test_cifar_from_torchvisions_folder(cifar_files, name, classes, train):
    splits = load_data(name, root=cifar_files, val_fraction=0.5)
    assert [len(part) for part in (splits.train, splits.val)] == [train // 2, train // 2]
    assert len(splits.test) == 2 * classes
    assert (len(splits.classes), splits.classes[3], splits.flip) == (classes, "class 3", True)
    entry = pickle.loads(
        (cifar_files / ("cifar-10-batches-py/test_batch" if classes == 10 else "cifar-100-python/test")).read_bytes()
    )
    assert torch.equal(pixels_of(splits.test), torch.from_numpy(entry["data"]).view(-1, 3, 32, 32))
    assert default_preprocessing(name).size == (32, 32)


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_missing_cifar_says_how_to_get_it(tmp_path, name, kind):
    with pytest.raises(DataError, match=re.escape(f"torchvision.datasets.{kind}('{tmp_path}', download=True)")):
        load_data(name, root=tmp_path)


def test_damaged_cifar_is_named(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=f"cifar10 under {re.escape(str(tmp_path))} is damaged") as caught:
        load_data("cifar10", root=tmp_path)
    assert "\n" not in str(caught.value)


# ---- folders


def write_classes(folder, counts, *, first=0, side=5):
    """Pictures of one flat gray each, all different, so that splits can be compared."""
    value = first
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            Image.fromarray(np.full((side, side), value, np.uint8)).save(folder / name / f"{value:03}.png")
            value += 1


def grays(images):
    return pixels_of(images)[:, 0, 0, 0].tolist()


def load_pictures(folder, **options):
    return load_data(f"imagefolder:{folder}", **{"preprocessing": GRAY, **options})


def test_a_flat_folder_is_divided_80_10_10(tmp_path):
    write_classes(tmp_path, {"cat": 50, "dog": 50})
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "._resource.png").write_bytes(b"no picture either")
    one, two = load_pictures(tmp_path, seed=1), load_pictures(tmp_path, seed=2)
    assert [len(part) for part in (one.train, one.val, one.test)] == [80, 10, 10]
    assert (one.classes, one.flip, one.preprocessing) == (("cat", "dog"), True, GRAY)
    assert one.test.labels.bincount().tolist() == one.val.labels.bincount().tolist() == [5, 5]
    assert grays(one.test) == grays(two.test)
    assert set(grays(one.val)) != set(grays(two.val))
    assert sorted(grays(one.train) + grays(one.val) + grays(one.test)) == list(range(100))
    assert [gray >= 50 for gray in grays(one.train)] == one.train.labels.bool().tolist()
    assert load_pictures(tmp_path, val_fraction=0).val is None
    assert len(load_pictures(tmp_path, val_fraction=0).train) == 90


def test_three_folders_are_taken_as_they_are(tmp_path):
    for first, (split, count) in zip((0, 50, 70), {"train": 4, "val": 2, "test": 3}.items(), strict=True):
        write_classes(tmp_path / split, {"a": count, "b": count}, first=first)
    splits = load_pictures(tmp_path)
    assert sorted(grays(splits.train)) == list(range(8))
    assert sorted(grays(splits.val)) == [50, 51, 52, 53]
    assert sorted(grays(splits.test)) == list(range(70, 76))


@pytest.mark.parametrize("judge", ["test", "val", "valid", "validation"])
def test_with_two_folders_validation_comes_out_of_training(tmp_path, judge):
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    write_classes(tmp_path / judge, {"a": 2, "b": 2}, first=100)
    splits = load_pictures(tmp_path, val_fraction=0.2)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [16, 4, 4]
    assert sorted(grays(splits.test)) == [100, 101, 102, 103]
    assert sorted(grays(splits.train) + grays(splits.val)) == list(range(20))


def test_the_first_images_are_not_all_of_one_class(tmp_path):
    write_classes(tmp_path / "train", {"a": 20, "b": 20})
    write_classes(tmp_path / "test", {"a": 20, "b": 20})
    assert set(load_pictures(tmp_path).test.labels[:10].tolist()) == {0, 1}


def test_train_may_be_a_class(tmp_path):
    write_classes(tmp_path, {"bus": 10, "train": 10})
    assert load_pictures(tmp_path).classes == ("bus", "train")


@pytest.mark.parametrize("load", [load_data, load_images])
def test_a_folder_has_no_preprocessing_of_its_own(tmp_path, load):
    write_classes(tmp_path, {"a": 10, "b": 10})
    with pytest.raises(OptionError, match=r"not known; give preprocessing=Preprocessing\(size, mean, std\)"):
        load(f"imagefolder:{tmp_path}")
    with pytest.raises(OptionError, match=r"not known; give preprocessing=Preprocessing\(size, mean, std\)"):
        load_images(str(tmp_path))


def test_a_class_too_small_to_stratify_falls_back_to_chance(tmp_path):
    write_classes(tmp_path, {"a": 19, "b": 1})
    splits = load_pictures(tmp_path)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [16, 2, 2]


def test_folder_mistakes_are_one_line(tmp_path):
    def message(folder, **options):
        with pytest.raises(DataError) as caught:
            load_pictures(folder, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in message(tmp_path / "file")
    (tmp_path / "bare").mkdir()
    assert "has no class folders" in message(tmp_path / "bare")
    write_classes(tmp_path / "hole", {"a": 3, "b": 0})
    assert "has no pictures of class 'b'" in message(tmp_path / "hole")
    write_classes(tmp_path / "tiny", {"a": 2, "b": 1})
    assert "test split of" in message(tmp_path / "tiny")
    assert "3 image(s) are too few to hold out 1" in message(tmp_path / "tiny")
    write_classes(tmp_path / "half" / "train", {"a": 3})
    assert "has 'train', but neither 'test' nor 'val'" in message(tmp_path / "half")
    write_classes(tmp_path / "odd" / "train", {"a": 3, "b": 3})
    write_classes(tmp_path / "odd" / "test", {"b": 3, "c": 3})
    odd = message(tmp_path / "odd")
    assert "test lacks 'a', and" in odd
    assert "train lacks 'c'" in odd
    with pytest.raises(DataError, match="imagefolder needs a folder: imagefolder:DIR"):
        load_data("imagefolder:")


def test_a_broken_picture_is_named_when_it_is_read(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 10}, side=64)
    broken = tmp_path / "a" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "b" / "text.png").write_text("not a picture")
    splits = load_pictures(tmp_path)
    seen = []
    for part in (splits.train, splits.val, splits.test):
        for i in range(len(part)):
            try:
                part[i]
            except DataError as error:
                seen.append(str(error))
                assert "\n" not in seen[-1]
    assert len(seen) == 2
    assert any(f"{broken} cannot be decoded" in message for message in seen)
    assert any("text.png cannot be decoded" in message for message in seen)


@pytest.mark.parametrize("memory", [10**9, 0], ids=["remembered", "decoded each time"])
def test_pictures_are_decoded_once_where_they_fit(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(_folder, "MEMORY", memory)
    write_classes(tmp_path, {"a": 10, "b": 10})
    train = load_pictures(tmp_path).train
    first = pixels_of(train)
    for picture in tmp_path.rglob("*.png"):
        Image.new("L", (5, 5), 255).save(picture)
    assert torch.equal(pixels_of(train), first) == (memory > 0)


def test_pictures_of_every_mode_are_read_from_files(tmp_path):
    (tmp_path / "a").mkdir()
    plane = Image.new("L", (5, 5), 120)
    for mode, suffix in {
        "CMYK": "jpg",
        "P": "png",
        "LA": "png",
        "RGBA": "webp",
        "L": "bmp",
        "1": "png",
    }.items():
        plane.convert(mode).save(tmp_path / "a" / f"{mode}.{suffix}")
    plane.convert("P").save(tmp_path / "a" / "clear.png", transparency=bytes([255] * 200))
    Image.fromarray(np.full((5, 5), 120 * 257, np.uint16)).save(tmp_path / "a" / "deep.png")
    for i in range(12):
        plane.save(tmp_path / "a" / f"plain{i}.png")
    splits = load_pictures(tmp_path, preprocessing=RGB, val_fraction=0)
    pixels = torch.cat([pixels_of(splits.train), pixels_of(splits.test)])
    assert pixels.shape == (20, 3, 4, 4)
    near = (pixels.int() - 120).abs().flatten(1).amax(1) <= 6
    assert int(near.sum()) == 19  # all but the black and white one


# ---- factories


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the source of a module `own_data` and let it be imported."""

    def write(source):
        (tmp_path / "own_data.py").write_text(
            "import torch\nfrom torch.utils.data import *\nfrom convsurgeon.data import *\n" + source
        )
        return "own_data:make"

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_data", raising=False)
    yield write
    sys.modules.pop("own_data", None)


def test_a_factory_may_return_splits(module):
    splits = load_data(module("made = load_data('digits')\ndef make(): return made\n"))
    assert isinstance(splits, DataSplits)
    assert (splits.name, len(splits.train)) == ("digits", 1293)


def test_a_factory_may_return_datasets_or_loaders(module):
    name = module(
        "pairs = TensorDataset(torch.arange(300.).view(300, 1, 1, 1), torch.zeros(300).long())\n"
        "pairs.classes = ['x', 'y']\n"
        "def make(): return pairs, DataLoader(pairs, batch_size=7), load_data('digits').test\n"
    )
    splits = load_data(name)
    assert (splits.name, splits.classes, splits.preprocessing) == (name, ("x", "y"), None)
    first, second = (torch.cat([images for images, _ in splits.train]).flatten() for _ in range(2))
    assert sorted(first.tolist()) == list(range(300))
    assert not torch.equal(first, second)
    assert splits.val.batch_size == 7
    assert len(splits.test) == 360


def test_two_parts_are_train_and_validation(module):
    name = module("def make(): return load_data('digits').train, load_data('digits').val\n")
    splits = load_data(name)
    assert (len(splits.train), len(splits.val), splits.test) == (1293, 144, None)
    assert splits.classes == tuple("0123456789")
    assert splits.preprocessing == default_preprocessing("digits")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make(): return 3", "returned an object of type int; expected DataSplits, or a tuple"),
        ("def make(): return (1,)", "returned a tuple of 1; expected"),
        ("def make(): return None, None", "returned None in place of the training data"),
        ("def make(): return [1], [2]", "(train) is a list of 1; expected a DataLoader or a Dataset"),
        ("def make(): raise OSError('no\\ndisk')", "the factory failed: OSError: no"),
        ("other = 1", "own_data has no 'make'"),
        ("make = 1", "own_data has no function 'make'"),
        ("import not_there_at_all", "own_data cannot be imported: ModuleNotFoundError"),
        (
            "def make(): return (TensorDataset(torch.zeros(2, 1, 2, 2).byte(), torch.zeros(2)),) * 2",
            "(train) gives a uint8 tensor of shape (1, 2, 2) as an image; expected a float tensor",
        ),
        ("def make(): return (TensorDataset(torch.zeros(2, 1, 2, 2)),) * 2", "no (image, label) for index 0"),
    ],
)
def test_factory_mistakes_are_one_line(module, source, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_data(module(source))
    assert "\n" not in str(caught.value)


def test_a_missing_module_is_named():
    with pytest.raises(DataError, match=r"not_there_at_all cannot be imported: ModuleNotFoundError"):
        load_data("not_there_at_all:make")


def test_unlabelled_pictures_are_found_behind_links(tmp_path: Path) -> None:
    pictures = tmp_path / "elsewhere"
    pictures.mkdir()
    for index in range(3):
        Image.new("L", (8, 8), index).save(pictures / f"{index}.png")
    links = tmp_path / "links"
    links.mkdir()
    (links / "there").symlink_to(pictures)
    (links / "again").symlink_to(pictures)
    (pictures / "round").symlink_to(links)
    images, _ = load_images(str(links), preprocessing=Preprocessing((8, 8), (0.5,), (0.5,), color="gray"))
    assert len(images) == 3
    with pytest.raises(DataError, match=r"\./nowhere is no folder; give a folder of images, or a data set: cifar10"):
        load_images("./nowhere")
