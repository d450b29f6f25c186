"""Architectures by name: where each kind comes from, how it is built, what is known about its input."""

from __future__ import annotations

import importlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, final

from torch import nn

from convsurgeon.errors import (
    ConvSurgeonError,
    ModelError,
    OptionError,
    UnknownNameError,
    did_you_mean,
    one_line,
)
from convsurgeon.storage._input_facts import timm_facts, torchvision_facts

_FACTORY = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")


class Architecture(ABC):
    """Something that has a name and builds a network.

    Args:
        source: the name as it was typed, `torchvision:resnet18`.
    """

    has_default_weights = True

    def __init__(self, source: str) -> None:
        self.source = source

    @abstractmethod
    def builder(self, *, pretrained: bool) -> Callable[..., Any]:
        """Return what takes the model arguments and returns the network.

        Raises:
            UnknownNameError: if there is no such architecture.
        """

    @abstractmethod
    def takes_num_classes(self) -> bool:
        """Whether the number of classes is an argument called `num_classes`."""

    @abstractmethod
    def count_classes(self, model: nn.Module) -> int | None:
        """Return how many classes `model`, built without arguments, tells apart, if that is known."""

    @abstractmethod
    def input_facts(self, model: nn.Module, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record's `preprocessing` and `input_shape`, as far as they are known."""

    def build(self, args: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
        """Build the network, with random weights unless the library's own are asked for.

        Raises:
            UnknownNameError: if there is no such architecture.
            OptionError: for arguments that it does not take.
            ModelError: for whatever else its code raises.
        """
        builder = self.builder(pretrained=pretrained)
        try:
            model = builder(**args)
        except ConvSurgeonError:
            raise
        except SystemExit as error:
            raise ended_the_program(error) from error
        except Exception as error:  # other people's code
            self._explain(error, args, pretrained=pretrained)
        if not isinstance(model, nn.Module):
            raise ModelError(f"{self.source} returned a {type(model).__name__}, not an nn.Module")
        return model

    def _explain(self, error: Exception, args: Mapping[str, Any], *, pretrained: bool) -> NoReturn:
        said = one_line(error)
        guilty = [name for name in args if re.search(rf"\b{re.escape(name)}\b", str(error))]
        if guilty or (args and not pretrained):
            shown = ", ".join(f"{name}={args[name]!r}" for name in guilty or args)
            raise OptionError(f"{self.source} cannot be built with {shown}: {said}") from error
        if pretrained:
            raise ModelError(f"the default weights of {self.source} cannot be had: {said}") from error
        if isinstance(error, TypeError) and "argument" in said:
            raise OptionError(
                f"{self.source} cannot be built without arguments: {said}; give them: --model-arg NAME=VALUE"
            ) from error
        raise ModelError(f"{self.source} cannot be built: {said}") from error


@final
class TorchvisionArchitecture(Architecture):
    """A name of `torchvision.models.list_models()`."""

    def builder(self, *, pretrained: bool) -> Callable[..., Any]:
        """Return torchvision's builder, told to fetch nothing unasked."""
        builder = self._library_builder()

        def build(**args: Any) -> Any:
            if "weights_backbone" in inspect.signature(builder).parameters:
                args["weights_backbone"] = None
            return builder(weights="DEFAULT" if pretrained else None, **args)

        return build

    def takes_num_classes(self) -> bool:
        """All of torchvision's take it."""
        return True

    def count_classes(self, model: nn.Module) -> int | None:
        """Return the number of categories of the library's own weights."""
        from torchvision.models import get_model_weights

        categories = get_model_weights(self._name).DEFAULT.meta.get("categories")
        return len(categories) if categories else None

    def input_facts(self, model: nn.Module, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the library's own weights were trained on; nothing is fetched."""
        return torchvision_facts(self._name, args)

    @property
    def _name(self) -> str:
        return self.source.partition(":")[2].lower()

    def _library_builder(self) -> Callable[..., Any]:
        from torchvision.models import get_model_builder, list_models

        if self._name not in (known := list_models()):
            raise UnknownNameError.among("torchvision model", self._name, known)
        builder: Callable[..., Any] = get_model_builder(self._name)
        return builder


@final
class TimmArchitecture(Architecture):
    """A name of `timm.list_models()`, with or without the tag of its weights."""

    def builder(self, *, pretrained: bool) -> Callable[..., Any]:
        """Return timm's builder; timm is imported here at the earliest."""
        try:
            import timm
        except ImportError as error:
            raise ModelError(f"{self.source} needs timm; pip install 'convsurgeon[zoo]'") from error
        if not timm.is_model(self._name):
            known = timm.list_models()
            raise UnknownNameError(
                f"unknown timm model {self._name!r}.{did_you_mean(self._name, known)} "
                f"timm.list_models() names all {len(known)}."
            )
        return lambda **args: timm.create_model(self._name, pretrained=pretrained, **args)

    def takes_num_classes(self) -> bool:
        """All of timm's take it."""
        return True

    def count_classes(self, model: nn.Module) -> int | None:
        """Return what the model says of itself."""
        count = getattr(model, "num_classes", None)
        return count if isinstance(count, int) else None

    def input_facts(self, model: nn.Module, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the model's own configuration says."""
        return timm_facts(model, args)

    @property
    def _name(self) -> str:
        return self.source.partition(":")[2]


@final
class FactoryArchitecture(Architecture):
    """A class or function of the user's own, `package.module:factory`. Building it runs that code."""

    has_default_weights = False

    @property
    def module(self) -> str:
        """The dotted name of the module that is imported."""
        return self.source.partition(":")[0]

    def builder(self, *, pretrained: bool) -> Callable[..., Any]:
        """Import the module and return what is behind the colon."""
        found: Any = self._import()
        for part in self._factory.split("."):
            if not hasattr(found, part):
                raise UnknownNameError.among(f"name in {self.module}:", self._factory, _callables(found))
            found = getattr(found, part)
        if isinstance(found, nn.Module) or not callable(found):
            raise ModelError(
                f"{self.source} is a {type(found).__name__}; name a class or function that gives an nn.Module"
            )
        factory: Callable[..., Any] = found
        return factory

    def takes_num_classes(self) -> bool:
        """Look at the factory's own signature."""
        return self._num_classes() is not None

    def count_classes(self, model: nn.Module) -> int | None:
        """Return the default of the argument `num_classes`."""
        parameter = self._num_classes()
        return parameter.default if parameter and isinstance(parameter.default, int) else None

    def input_facts(self, model: nn.Module, args: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing is known."""
        return {}

    @property
    def _factory(self) -> str:
        return self.source.partition(":")[2]

    def _num_classes(self) -> inspect.Parameter | None:
        try:
            return inspect.signature(self.builder(pretrained=False)).parameters.get("num_classes")
        except ValueError:  # a callable without a signature
            return None

    def _import(self) -> Any:
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name and (self.module == error.name or self.module.startswith(f"{error.name}.")):
                raise ModelError(
                    f"{self.source}: there is no module {error.name!r}; "
                    "run where it can be imported, such as the folder that holds it"
                ) from error
            raise ModelError(f"{self.source}: importing {self.module} failed: {one_line(error)}") from error
        except SystemExit as error:
            raise ended_the_program(error) from error
        except Exception as error:  # the user's own code
            raise ModelError(f"{self.source}: importing {self.module} failed: {one_line(error)}") from error


def ended_the_program(error: SystemExit) -> ModelError:
    """Return what to say when a user's module runs like a script."""
    return ModelError(
        f"code that was imported ended the program by sys.exit({error.code!r}); "
        "put what a script does under: if __name__ == '__main__'"
    )


def parse_name(source: str) -> Architecture | None:
    """Return the architecture that `source` names, or None if it is not written like one.

    >>> type(parse_name("torchvision:resnet18")).__name__, parse_name("nets/a.pt")
    ('TorchvisionArchitecture', None)
    """
    kind, colon, name = source.partition(":")
    if colon and name and kind == "torchvision":
        return TorchvisionArchitecture(source)
    if colon and name and kind == "timm":
        return TimmArchitecture(source)
    return FactoryArchitecture(source) if _FACTORY.fullmatch(source) else None


def _callables(owner: Any) -> list[str]:
    return [name for name, value in vars(owner).items() if callable(value) and not name.startswith("_")]
