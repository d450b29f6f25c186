"""The ops of a student in the order in which they run, each with what stands in its place in the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convsurgeon.errors import CalibrationError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.surgery import dense_kernel


@dataclass(frozen=True)
class CalibrationSite:
    """One op, and the convolution of the teacher that it stands in for.

    Args:
        fqn: its first name, the same in both networks.
        op: the op in the student.
        partner: the teacher's module of that name, or the kernel of its functional convolution.
        kernel: the dense kernel `(O, I, kh, kw)` that the partner convolves with.
        calls: how often it runs in one forward pass of the student.
    """

    fqn: str
    op: AbstractCheapConv
    partner: nn.Module | Tensor
    kernel: Tensor
    calls: int


def sites_in_order(
    teacher: nn.Module, student: nn.Module, sample: Tensor
) -> tuple[list[CalibrationSite], dict[str, str]]:
    """Return the ops that run on the sample, in order of their first call, and why others cannot be fitted.

    Both networks are in eval mode.

    Raises:
        CalibrationError: if the student has no op, or one that has no place in the teacher.
    """
    ops = {module: fqn for fqn, module in student.named_modules() if isinstance(module, AbstractCheapConv)}
    if not ops:
        raise CalibrationError("the student has no cheap convolution; make one with rewrite() or convert")
    calls: dict[AbstractCheapConv, int] = {}
    unbatched: set[AbstractCheapConv] = set()

    def note(op: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(op, AbstractCheapConv)
        calls[op] = calls.get(op, 0) + 1
        if args[0].dim() != 4:
            unbatched.add(op)

    handles = [op.register_forward_pre_hook(note) for op in ops]
    try:
        _run(student, sample, "student")
    finally:
        for handle in handles:
            handle.remove()
    there = {op for op, fqn in ops.items() if isinstance(_partner(teacher, fqn), AbstractCheapConv)}
    if len(there) == len(ops):
        raise CalibrationError(
            "the teacher has every cheap convolution of the student already; give the network that it was made from"
        )
    found = [_site(teacher, ops[op], op, count) for op, count in calls.items() if op not in unbatched | there]
    _run(teacher, sample, "teacher")
    idle = {fqn: "is a cheap convolution in the teacher already; as it was" for op, fqn in ops.items() if op in there}
    idle |= {fqn: "is not called on these images; as it was" for op, fqn in ops.items() if op not in calls}
    return found, idle | {ops[op]: "takes one image without a batch; as it was" for op in unbatched}


def _run(network: nn.Module, sample: Tensor, who: str) -> None:
    try:
        with torch.no_grad():
            network(sample.clone())  # some prepare their input in place
    except Exception as error:  # whatever somebody's forward raises
        shape = "x".join(map(str, sample.shape[1:]))
        raise CalibrationError(
            f"the {who} cannot take {len(sample)} images of {shape}: {one_line(error)}; give them as it takes them "
            "(on the command line: --size, --color)"
        ) from error


def _site(teacher: nn.Module, fqn: str, op: AbstractCheapConv, calls: int) -> CalibrationSite:
    kernel, partner = dense_kernel(teacher, fqn), _partner(teacher, fqn)
    if kernel is None or not isinstance(partner, nn.Module | Tensor):
        longer = next((name for name, _ in teacher.named_modules() if name.endswith(f".{fqn}")), None)
        hint = f"; it has {longer!r}: give its {longer.removesuffix(f'.{fqn}')}" if longer else ""
        raise CalibrationError(
            f"the teacher has no convolution {fqn!r}{hint}; give the network that the student was made from"
        )
    expected = (op.out_channels, op.in_channels, *op.kernel_size)
    if tuple(kernel.shape) != expected:
        raise CalibrationError(
            f"{fqn} is {_by(tuple(kernel.shape))} in the teacher and stands for {_by(expected)} in the student; "
            "give the network that the student was made from"
        )
    return CalibrationSite(fqn, op, partner, kernel.detach(), calls)


def _partner(teacher: nn.Module, fqn: str) -> object:
    parent_name, _, name = fqn.rpartition(".")
    try:
        return getattr(teacher.get_submodule(parent_name), name) if fqn else teacher
    except AttributeError:
        return None


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
