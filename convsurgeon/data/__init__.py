"""Data sets by name, folders of pictures, and their division into splits."""

from convsurgeon.data._catalog import default_preprocessing, expect_source, load_data, names
from convsurgeon.data._images import ImageSet, make_loader
from convsurgeon.data._splits import DataSplits
from convsurgeon.data._unlabelled import expect_images, is_folder, load_images

__all__ = [
    "DataSplits",
    "ImageSet",
    "default_preprocessing",
    "expect_images",
    "expect_source",
    "is_folder",
    "load_data",
    "load_images",
    "make_loader",
    "names",
]
