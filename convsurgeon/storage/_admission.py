"""Which names a pickle may use. Everything else is refused unless the user says otherwise.

Under a known prefix a name is admitted if it is a module class and really has that name: a bare
prefix would admit `torchvision.datasets.utils.extract_archive`, and through a re-export in it
`shutil.copyfile`. What else ordinary models need is a short list of exact names. `functools.partial`
may wrap any of them, so nothing is on it that would be harmful when called.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from convsurgeon.errors import ModelError, UntrustedFileError, one_line
from convsurgeon.storage._stand_ins import Held, HeldChoice, HeldLookup, HeldPartial, StandIns

# not all of timm: a timm.task.DistillationTeacher fetches models by name when it is called
PREFIXES = ("torch.nn", "torchvision", "timm.layers", "timm.models", "convsurgeon")

_CLASSES = frozenset(
    {
        "argparse.Namespace",
        "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional",
        "torch.ao.quantization.stubs.DeQuantStub",
        "torch.ao.quantization.stubs.QuantStub",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
    }
)
_ACTIVATIONS = frozenset(
    (
        *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_softmax"),
        *("logsigmoid", "mish", "relu", "relu6", "relu_", "selu", "sigmoid", "silu", "softmax", "softplus"),
        *("softsign", "tanh"),
    )
)
_FUNCTIONS = frozenset(
    {
        "timm.layers.activations.gelu",
        "torchvision.models.optical_flow.raft._pass_through_h",
        "torchvision.ops.boxes.box_iou",
    }
    | {f"{owner}.{name}" for owner in ("torch.nn.functional", "torch._C._nn") for name in _ACTIVATIONS}
)
_CHOICES = frozenset({"timm.layers.format.Format"})
_TORCH_FUNCTIONS = "torch._C._VariableFunctionsClass"


class Admission:
    """Decides about the names of one file, and makes the stand-ins for those it admits."""

    def __init__(self, path: Path, trust_modules: Sequence[str]) -> None:
        self.stand_ins = StandIns()
        self._path = path
        self._prefixes = (*PREFIXES, *trust_modules)
        self._lookup = HeldLookup(Held(_TORCH_FUNCTIONS, torch), _ACTIVATIONS)
        self._classes: dict[str, tuple[type, type]] = {}
        """The admitted classes and their stand-ins, by name."""

    def admit(self, name: str) -> Callable[..., object] | None:
        """Return the stand-in for a global's dotted name, or None if it is refused.

        Raises:
            ModelError: if the name may be used and cannot be found here.
        """
        if name == "functools.partial":
            return HeldPartial
        if name == "builtins.getattr":
            return self._lookup
        if name == _TORCH_FUNCTIONS:
            return self._lookup.owner
        if name in _FUNCTIONS:
            return Held(name, self._find(name))
        if name in _CHOICES:
            return HeldChoice(name, self._find(name))
        if name in _CLASSES:
            return self._shell(name, self._find(name))
        module, _, _ = name.rpartition(".")
        if "__main__" in module.split(".") or not any(is_under(module, prefix) for prefix in self._prefixes):
            return None
        found = self._find(name)
        return self._shell(name, found) if is_module_class(found, name) else None

    def admit_nested(self, owner: str, attribute: str) -> type | None:
        """Return the stand-in for a module class that is defined inside of an admitted one, or None."""
        outer, outer_shell = self._classes.get(owner, (None, None))
        if outer is None or outer_shell is None:
            return None
        found, name = inspect.getattr_static(outer, attribute, None), f"{owner}.{attribute}"
        if not isinstance(found, type) or not is_module_class(found, name):
            return None
        shell = self._lookup.nested[outer_shell, attribute] = self._shell(name, found)
        return shell

    def _shell(self, name: str, real: type) -> type:
        shell = self.stand_ins.shell(real)
        self._classes[name] = (real, shell)
        return shell

    def _find(self, name: str) -> type:
        module, _, attribute = name.rpartition(".")
        try:
            found: type = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # importing runs the code of a package that the user trusts
            raise ModelError(f"{self._path} needs {name}, which cannot be found here: {one_line(error)}") from error
        return found


def is_under(module: str, prefix: str) -> bool:
    """Whether a dotted module name is `prefix` or inside it.

    >>> is_under("mynet.blocks", "mynet"), is_under("mynets", "mynet")
    (True, False)
    """
    return module == prefix or module.startswith(f"{prefix}.")


def is_module_class(value: object, name: str) -> bool:
    """Whether `value` is an `nn.Module` subclass whose own name is `name`, and holds no code of its own."""
    return (
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and not issubclass(value, torch.fx.GraphModule | torch.jit.ScriptModule)
        and f"{value.__module__}.{value.__qualname__}" == name
    )


def refusal(path: Path, names: Sequence[str]) -> UntrustedFileError:
    """Say which names were met, and the narrowest flag that would load the file."""
    shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    scripted = sorted(name.rpartition(".")[2] for name in names if name.startswith("__main__."))
    if scripted:
        return UntrustedFileError(
            f"{path} holds {shown}: a class saved from a script, which no other program can find; save "
            f"model.state_dict() instead and name the script and class: SCRIPT:{scripted[0]} --weights FILE "
            f"(mynet:{scripted[0]} for mynet.py)"
        )
    missing = [name for name in names if not _may_be_module_class(name)]
    if missing:
        return UntrustedFileError(
            f"{path} would use {shown}, which can run any code; nothing was run. Only if you know who made it: --trust"
        )
    return UntrustedFileError(
        f"{path} holds {shown}, not yet allowed; if you trust that code: {name_flags(names)}, or --trust"
    )


def name_flags(names: Sequence[str]) -> str:
    """Return the narrowest flag that admits all of these names."""
    if not all(map(_may_be_module_class, names)):
        return "--trust"
    return " ".join(f"--trust-module {prefix}" for prefix in _common_prefixes(names))


def _may_be_module_class(name: str) -> bool:
    """Whether `--trust-module` could help; nothing is imported to find out."""
    module, _, attribute = name.rpartition(".")
    if any(is_under(module, prefix) for prefix in PREFIXES) or module.split(".")[0] in sys.stdlib_module_names:
        return False
    return module not in sys.modules or is_module_class(getattr(sys.modules[module], attribute, None), name)


def _common_prefixes(names: Sequence[str]) -> list[str]:
    """Return, per top-level package, the longest module prefix that covers its names."""
    modules: dict[str, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")[:-1]
        modules.setdefault(parts[0], []).append(parts)
    return [".".join(_common_start(parts)) for _, parts in sorted(modules.items())]


def _common_start(lists: list[list[str]]) -> list[str]:
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*lists, strict=False))
    return [level[0] for level in levels]
