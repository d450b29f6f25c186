"""Which names a pickle may use. Everything else is refused unless the user says otherwise.

Under a known prefix a name is admitted if it is a module class and really has that name: a bare
prefix would admit `torchvision.datasets.utils.extract_archive`, and through a re-export in it
`shutil.copyfile`. What else ordinary models need is a short list of exact names. `functools.partial`
may wrap any of them, so nothing is on it that would be harmful when called.

Of a package that the user trusts, enumerations, plain objects and functions are admitted besides, as values.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convsurgeon.errors import ModelError, UntrustedFileError, one_line
from convsurgeon.storage._sources import find_hindrance
from convsurgeon.storage._stand_ins import (
    Held,
    HeldChoice,
    HeldEnum,
    HeldLookup,
    HeldPartial,
    HeldValue,
    StandIns,
)
from convsurgeon.storage._values import Form, form_of, why_no_value

# not all of timm: a timm.task.DistillationTeacher fetches models by name when it is called
PREFIXES = ("torch.nn", "torchvision", "timm.layers", "timm.models", "convsurgeon")
# whatever the user trusts, their functions and plain objects stay out
_NO_VALUES = frozenset(("torch", "torchvision", "timm", "convsurgeon", *sys.stdlib_module_names))

Refused = dict[str, str | None]
"""Names that are not admitted, with the reason why trusting their package would not help, or None if it would."""

_CLASSES = frozenset(
    {
        "argparse.Namespace",
        "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional",
        "torch.ao.quantization.stubs.DeQuantStub",
        "torch.ao.quantization.stubs.QuantStub",
        "torch.optim.swa_utils.AveragedModel",
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
        self._prefixes, self._trusted = (*PREFIXES, *trust_modules), tuple(trust_modules)
        self._lookup = HeldLookup(Held(_TORCH_FUNCTIONS, torch), _ACTIVATIONS)
        self._classes: dict[str, tuple[type, object]] = {}
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
        return self._admit_found(name, self._find(name))

    def admit_nested(self, owner: str, attribute: str) -> object | None:
        """Return the stand-in for what is inside of an admitted class: another class, or a member; or None."""
        outer, outer_stand_in = self._classes.get(owner, (None, None))
        if outer is None or outer_stand_in is None:
            return None
        stand_in: object | None
        if isinstance(outer_stand_in, HeldEnum):
            stand_in = outer_stand_in.member(attribute)
        else:
            found = inspect.getattr_static(outer, attribute, None)
            # no methods: a file has no business with those
            stand_in = self._admit_found(f"{owner}.{attribute}", found) if isinstance(found, type) else None
        if stand_in is not None:
            self._lookup.nested[outer_stand_in, attribute] = stand_in
        return stand_in

    def _admit_found(self, name: str, found: Any) -> Callable[..., object] | None:
        if is_module_class(found, name):
            return self._shell(name, found)
        top = name.partition(".")[0]
        if top in _NO_VALUES or not any(is_under(name, prefix) for prefix in self._trusted):
            return None
        if why_no_value(found, name) is not None:
            return None
        form = form_of(found)
        if form is Form.FUNCTION:
            return HeldValue(name, found)
        stand_in = HeldEnum(name, found) if form is Form.ENUM else self.stand_ins.value_shell(found)
        self._classes[name] = (found, stand_in)
        return stand_in

    def _shell(self, name: str, real: type) -> type:
        shell = self.stand_ins.shell(real)
        self._classes[name] = (real, shell)
        return shell

    def _find(self, name: str) -> Any:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
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


def why_refused(name: str, call: int | None) -> str | None:
    """Return why trusting a package would not admit a name of its, or None if it would; nothing is imported for that.

    Args:
        call: with how many plain arguments the file calls it, -1 for others, None if it does not.
    """
    module, _, attribute = name.rpartition(".")
    top = module.partition(".")[0]
    if "__main__" in module.split("."):  # that of this program is another
        return None
    if any(is_under(module, prefix) for prefix in PREFIXES) or top in sys.stdlib_module_names:
        return ""
    if call not in (None, 0, 1):
        return "the file calls it"
    if module not in sys.modules:
        return find_hindrance(name, called=call is not None or top in _NO_VALUES)
    found = getattr(sys.modules[module], attribute, None)
    form = form_of(found)
    if is_module_class(found, name):
        return None if call is None else "the file calls it"
    if top in _NO_VALUES:
        return ""
    wanted = {Form.ENUM: (1, None), Form.NAMESPACE: (0, None)}.get(form, (None,)) if form is not None else (call,)
    return why_no_value(found, name) if call in wanted else "the file calls it"


def refusal(path: Path, refused: Mapping[str, str | None]) -> UntrustedFileError:
    """Say which names were met, and the narrowest flag that would load the file."""
    names = sorted(refused, key=lambda name: (not refused[name], name))
    shown = ", ".join(f"{name} ({refused[name]})" if refused[name] else name for name in names[:5])
    shown += f" and {len(names) - 5} more" if len(names) > 5 else ""
    scripted = sorted(name.rpartition(".")[2] for name in names if name.startswith("__main__."))
    if scripted:
        return UntrustedFileError(
            f"{path} holds {shown}: a class saved from a script, which no other program can find; save "
            f"model.state_dict() instead and name the script and class: SCRIPT:{scripted[0]} --weights FILE "
            f"(mynet:{scripted[0]} for mynet.py)"
        )
    if any(reason is not None for reason in refused.values()):
        return UntrustedFileError(
            f"{path} would use {shown}, which can run any code; nothing was run. Only if you know who made it: --trust"
        )
    return UntrustedFileError(
        f"{path} holds {shown}, not yet allowed; if you trust that code: {name_flags(refused)}, or --trust"
    )


def name_flags(refused: Mapping[str, str | None]) -> str:
    """Return the narrowest flag that admits all of these names."""
    if any(reason is not None or name.startswith("__main__.") for name, reason in refused.items()):
        return "--trust"
    return " ".join(f"--trust-module {prefix}" for prefix in _common_prefixes(list(refused)))


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
