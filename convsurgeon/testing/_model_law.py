"""What makes a function a law of whole models, and what such laws share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from convsurgeon.errors import ConvSurgeonError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import Decision, Plan, Survey, plan, rewrite, survey
from convsurgeon.testing._checks import BrokenError
from convsurgeon.testing._runs import copy_of, runs_in_training

_SEED = 20190913


class ModelCase:
    """A model, what is done to it, and what came of that: what a law of whole models is tried on.

    Args:
        model: any model; laws leave it as it is.
        to: the op.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        selectors: what else `rewrite` is told: `keep`, `only`, `mapping`, `options`, `filter_fn`.
    """

    def __init__(self, model: nn.Module, to: str = "depthwise", *, example_inputs: Any, **selectors: Any) -> None:
        self.model, self.to = model, to
        self.example_inputs, self.selectors = example_inputs, selectors
        self.refusal: ConvSurgeonError | None = None

    def rewrite(self) -> nn.Module:
        """Return a new student; a refusal is remembered, and raised as it is."""
        with self._remembering():
            return rewrite(self.model, self.to, example_inputs=self.example_inputs, **self.selectors)

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except ConvSurgeonError as error:
            self.refusal = error
            raise

    @cached_property
    def student(self) -> nn.Module:
        """The student; laws leave it as it is."""
        return self.rewrite()

    @cached_property
    def modes(self) -> tuple[bool, ...]:
        """The modes in which the model takes the input: a batch norm does not take every one in training."""
        return (False, True) if runs_in_training(self.model, self.example_inputs) else (False,)

    @cached_property
    def copy(self) -> nn.Module:
        """A plain deep copy, which is what a student is but for the ops: torch makes some things anew in a copy."""
        return copy_of(self.model)

    @cached_property
    def plan(self) -> Plan:
        """The plan that makes the student."""
        with self._remembering():
            return plan(self.model, self.to, example_inputs=self.example_inputs, **self.selectors)

    @cached_property
    def survey(self) -> Survey:
        """The survey of the model."""
        return survey(self.model, example_inputs=self.example_inputs)

    def is_converted(self, fqn: str) -> bool:
        """Whether a name belongs to a convolution that the plan converts, or to something inside it."""
        names = [name for decision in self.plan.converted for name in decision.fqns]
        return any(name == "" or fqn == name or fqn.startswith(f"{name}.") for name in names)

    def untouched(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Yield name, module and the student's module of all that is not converted; skips what the student lacks."""
        theirs = dict(self.student.named_modules(remove_duplicate=False))
        for fqn, module in self.model.named_modules(remove_duplicate=False):
            if not self.is_converted(fqn) and fqn in theirs:
                yield fqn, module, theirs[fqn]

    def converted(self) -> Iterator[tuple[str, Decision, nn.Module, AbstractCheapConv]]:
        """Yield name, decision, the module that owned the kernel, and the op; skips what is no op in the student."""
        theirs = dict(self.student.named_modules(remove_duplicate=False))
        mine = dict(self.model.named_modules(remove_duplicate=False))
        for decision in self.plan.converted:
            for fqn in decision.fqns:
                op = theirs.get(fqn)
                owner = mine.get(fqn, mine.get(fqn.rpartition(".")[0]))
                if isinstance(op, AbstractCheapConv) and owner is not None:
                    yield fqn, decision, owner, op


def owns(fqn: str, owner: nn.Module) -> bool:
    """Whether the name is that of a tensor which the module owns, not of the module."""
    name = fqn.rpartition(".")[2]
    return name in owner._parameters or name in owner._buffers


def donors(fqn: str, owner: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that an op replaced: a kernel, or all of a module."""
    if not owns(fqn, owner):
        return list(owner.parameters())
    kernel = owner._parameters.get(fqn.rpartition(".")[2])
    return [] if kernel is None else [kernel]


def taken_along(fqn: str, owner: nn.Module, op: AbstractCheapConv) -> dict[str, Tensor]:
    """Return the parameters and buffers of a convolution besides weight and bias that its op has now."""
    mine = {} if owns(fqn, owner) else {**dict(owner.named_parameters()), **dict(owner.named_buffers())}
    theirs = {*dict(op.named_parameters()), *dict(op.named_buffers())}
    return {name: tensor for name, tensor in mine.items() if name in theirs and name not in ("weight", "bias")}


ModelLaw = Callable[[ModelCase], None]


def model_law(check: ModelLaw) -> ModelLaw:
    """Make a function a law: give it its seed, and every failure the model, the op and the law in front.

    What `rewrite` itself refuses is raised as it is: to refuse breaks no law.
    """

    @functools.wraps(check)
    def law(case: ModelCase) -> None:
        where = f"{type(case.model).__name__} as {case.to} breaks {check.__name__}"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_SEED)
            try:
                check(case)
            except BrokenError as error:
                raise AssertionError(f"{where}: {error}") from error
            except Exception as error:  # whatever a foreign model raises
                if error is case.refusal:
                    raise
                raise AssertionError(f"{where}: {one_line(error)}") from error

    return law
