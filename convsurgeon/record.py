"""What a model remembers of how it came to be: plain data, carried by the model itself.

The record is a dict of JSON values in an instance attribute, so that it survives `copy.deepcopy`,
pickling and saving, and so that reading it back never needs a class of ours:

- `source`: `{"name": "torchvision:resnet18", "args": {"num_classes": 10}}`, where it was built from a name,
  or `{"file": "net.pt"}`, where it was unpickled
- `plan`: the plan that made it, as `Plan.to_dict()` gives it
- `preprocessing`: what a picture becomes before the model sees it
- `preprocessing_of`: the library whose own weights that is known of, where these weights are others
- `classes`: its class labels in the order of its outputs
- `input_shape`: a batch shape that it is known to accept, such as `[1, 3, 224, 224]`
"""

from __future__ import annotations

from typing import Any

from torch import nn

_ATTRIBUTE = "convsurgeon_record"


def read_record(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the model's record, empty where it has none.

    What is no dict is none: `dict()` would call its `keys`, which a file may have put there.
    """
    record = model.__dict__.get(_ATTRIBUTE)
    return dict(record) if type(record) is dict else {}


def has_damaged_record(model: nn.Module) -> bool:
    """Whether what stands in the place of the record is none."""
    return type(model.__dict__.get(_ATTRIBUTE, {})) is not dict


def update_record(model: nn.Module, **entries: Any) -> None:
    """Set entries of the model's record; None removes one. Values must be plain JSON data."""
    merged = {**read_record(model), **entries}
    model.__dict__[_ATTRIBUTE] = {key: value for key, value in merged.items() if value is not None}
