"""Copies to look at take no memory until someone writes; wherever the weights came from, nobody sees the other's."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import copy, io, sys, tempfile
import numpy as np, torch
from safetensors.torch import load, save
from torch import nn
from convsurgeon.surgery._copies import shadow

def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

def through_file(**arguments):
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(model(), file.name)
        return torch.load(file.name, weights_only=False, **arguments)

def with_state(state):
    made = model()
    made.load_state_dict(state, assign=True)
    return made

def half_of_more(tensor):
    return torch.cat([tensor.flatten()] * 2)[: tensor.numel()].view(tensor.shape)

kinds = {
    "fresh": model,
    "deepcopy": lambda: copy.deepcopy(model()),
    "load": through_file,
    "mmap": lambda: through_file(mmap=True),
    "bytes": lambda: torch.load(io.BytesIO(kept()), weights_only=False),
    "numpy": lambda: with_state({k: torch.from_numpy(np.array(v)) for k, v in model().state_dict().items()}),
    "safetensors": lambda: with_state(load(save(model().state_dict()))),
    "shared memory": lambda: model().share_memory(),
    "views": lambda: with_state({k: half_of_more(v) for k, v in model().state_dict().items()}),
}

def kept():
    file = io.BytesIO()
    torch.save(model(), file)
    return file.getvalue()

made = kinds[sys.argv[1]]()
before = {k: v.clone() for k, v in made.state_dict().items()}
copied = shadow(made).train()
with torch.no_grad():
    copied(torch.randn(2, 3, 8, 8))
    for tensor in copied.state_dict().values():
        tensor.add_(1)
assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
mine = {k: v.clone() for k, v in copied.state_dict().items()}
with torch.no_grad():
    made.train()(torch.randn(2, 3, 8, 8))
    for tensor in made.state_dict().values():
        tensor.mul_(0)
assert all(torch.equal(v, mine[k]) for k, v in copied.state_dict().items())
del copied
again = shadow(made)
del made
assert all((v == 0).all() for v in again.state_dict().values())
print("right")
"""
KINDS = ["fresh", "deepcopy", "load", "mmap", "bytes", "numpy", "safetensors", "shared memory", "views"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_to_either_stays_there(kind: str) -> None:
    # a process of its own: the failure to fear is a segmentation fault
    ended = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "right\n"), ended.stderr[-2000:]
