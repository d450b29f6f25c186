"""Models and students in and out of files, safely. Nothing else in the package calls `torch.load`.

`load` takes an architecture's name or a file; `save` writes a student so that `load` finds it again:
a pickled module as a pickled module, an architecture with a plan as one safetensors file.
"""

from convsurgeon.storage._checkpoints import load_checkpoint, save_checkpoint
from convsurgeon.storage._load import load
from convsurgeon.storage._model_args import parse_model_args
from convsurgeon.storage._plans import read_plan
from convsurgeon.storage._save import default_output, refuse_to_save, save

__all__ = [
    "default_output",
    "load",
    "load_checkpoint",
    "parse_model_args",
    "read_plan",
    "refuse_to_save",
    "save",
    "save_checkpoint",
]
