"""Everything convsurgeon raises on purpose.

::

    ConvSurgeonError
    ├── OptionError               an option that does not exist, or a value it cannot take
    ├── UnknownNameError          no op, data set, method, objective or architecture of that name
    ├── UnsupportedConvError      an op was asked to replace a convolution that it cannot replace
    ├── KernelWriteError          a dense kernel was written to an op that cannot hold it
    ├── SurveyError               the model or its example input cannot be surveyed or copied
    ├── SelectorError             a selector matched nothing, or selectors contradict each other
    ├── NothingToConvertError     a plan that would convert no convolution
    ├── PlanError                 a plan that cannot be read, or does not fit the model
    ├── GuardError                the student's outputs would not be shaped like the teacher's
    ├── ModelError                a model cannot be loaded or saved
    │   ├── UntrustedFileError    loading it would run code that nobody has allowed
    │   └── WeightsError          weights that do not fit the architecture
    ├── DataError                 missing, malformed or mismatched data
    ├── CalibrationError          a student that cannot be calibrated with these images and this teacher
    ├── DistillationError         a training run that cannot start, continue or resume
    │   └── DivergenceError       one whose loss is no number any more
    ├── ExportError               no ONNX file could be made
    │   └── ParityError           it was made, and disagreed with PyTorch
    └── OutputError               a file cannot be written, or would be overwritten

Every message is one line: what, where, what was found, what was expected, and what to do.
The command line prints it and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 20


class ConvSurgeonError(Exception):
    """The root of all errors that convsurgeon raises on purpose."""


class OptionError(ConvSurgeonError):
    """An option that does not exist, or a value that it cannot take."""


class UnknownNameError(ConvSurgeonError):
    """No op, data set, method, objective or architecture has that name."""

    @classmethod
    def among(cls, kind: str, name: str, available: Iterable[str]) -> UnknownNameError:
        """Name what was asked for, the nearest match, and what there is."""
        known = sorted(available)
        shown = (
            ", ".join(known) if len(known) <= _SHOWN else f"{', '.join(known[:_SHOWN])} and {len(known) - _SHOWN} more"
        )
        return cls(f"unknown {kind} {name!r}.{did_you_mean(name, known)} Available: {shown}.")


class UnsupportedConvError(ConvSurgeonError):
    """An op was asked to replace a convolution that it cannot replace."""


class KernelWriteError(ConvSurgeonError):
    """A dense kernel, or a bias, was written to an op that cannot hold it."""


class SurveyError(ConvSurgeonError):
    """The model or its example input cannot be surveyed or copied."""


class SelectorError(ConvSurgeonError):
    """A selector matched nothing, or selectors contradict each other."""


class NothingToConvertError(ConvSurgeonError):
    """A plan that would convert no convolution at all."""


class PlanError(ConvSurgeonError):
    """A plan that cannot be read, or that does not fit the model."""


class GuardError(ConvSurgeonError):
    """The student's outputs would not be shaped like the teacher's."""


class ModelError(ConvSurgeonError):
    """A model cannot be loaded or saved."""


class UntrustedFileError(ModelError):
    """Loading the file would run code that nobody has allowed."""


class WeightsError(ModelError):
    """Weights that do not fit the architecture."""


class DataError(ConvSurgeonError):
    """Missing, malformed or mismatched data."""


class CalibrationError(ConvSurgeonError):
    """A student cannot be calibrated: it has no op, or does not come from this teacher."""


class DistillationError(ConvSurgeonError):
    """A training run that cannot start, continue or resume."""


class DivergenceError(DistillationError):
    """A training run whose loss is no number any more."""


class ExportError(ConvSurgeonError):
    """No ONNX file could be made."""


class ParityError(ExportError):
    """The ONNX file was made, and disagreed with PyTorch; it was not kept."""


class OutputError(ConvSurgeonError):
    """A file cannot be written, or would be overwritten."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean '...'?`` for the nearest known name, or nothing.

    >>> did_you_mean("shft", ["group", "shift"])
    " Did you mean 'shift'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def one_line(error: BaseException) -> str:
    """Return what an exception says as a single line, its first non-empty one.

    >>> one_line(ValueError("first\\nsecond"))
    'ValueError: first'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
