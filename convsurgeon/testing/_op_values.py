"""The laws of an op itself: its shape, state and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from convsurgeon.spec import ConvSpec
from convsurgeon.testing._cases import Op, accepts, input_size, make_donor
from convsurgeon.testing._checks import by, require, require_close, require_same_state, state_of
from convsurgeon.testing._op_law import both, dense_of, make_image, op_law

_GEOMETRY = tuple(field.name for field in dataclasses.fields(ConvSpec) if field.name != "bias")

# the share of the energy that an op may lose of a kernel it can represent but does not find again exactly
_LOST = 0.25


@op_law
def law_description(op: Op, spec: ConvSpec, options: Any) -> None:
    """The class has a name, a summary and a reference, each a single line."""
    for constant in ("name", "summary", "reference"):
        value = getattr(op, constant, None)
        require(isinstance(value, str) and value.strip() == value != "", f"{constant} is {value!r}, not a line")
        require(len(str(value).splitlines()) == 1, f"{constant} has more than one line: {value!r}")


@op_law
def law_output_shape(op: Op, spec: ConvSpec, options: Any) -> None:
    """The output has the donor's shape, for batches of one and of three."""
    donor = make_donor(spec)
    cheap = op.from_conv(donor, options)
    for batch in (1, 3):
        image = make_image(spec, batch=batch)
        got, expected = cheap(image), donor(image)
        require(got.shape == expected.shape, f"the output is {by(got)}, the donor's {by(expected)}")


@op_law
def law_geometry(op: Op, spec: ConvSpec, options: Any) -> None:
    """The donor's geometry is there as attributes, equal in value and kind: model code reads them."""
    donor = make_donor(spec)
    cheap = op.from_conv(donor, options)
    for name in _GEOMETRY:
        got, expected = getattr(cheap, name), getattr(donor, name)
        require(type(got) is type(expected) and got == expected, f"{name} is {got!r}, the donor's {expected!r}")
    require((cheap.bias is None) == (donor.bias is None), f"bias is {cheap.bias}, the donor has {spec.bias}")


@op_law
def law_donor_untouched(op: Op, spec: ConvSpec, options: Any) -> None:
    """`from_conv` leaves the donor as it was, and training the op afterwards does so, too."""
    donor = make_donor(spec).eval()
    donor.weight.requires_grad_(False)
    before, attributes = state_of(donor), set(donor.__dict__)
    cheap = op.from_conv(donor, options)
    require_same_state(state_of(donor), before, "from_conv changed the donor")
    flags = not donor.weight.requires_grad and (donor.bias is None or donor.bias.requires_grad)
    require(flags, "from_conv changed the donor's requires_grad flags")
    require(not donor.training, "from_conv put the donor into training mode")
    require(set(donor.__dict__) == attributes, "from_conv changed the donor's attributes")
    with torch.no_grad():
        for tensor in [*cheap.parameters(), *cheap.buffers()]:
            tensor.add_(1)
    require_same_state(state_of(donor), before, "the op shares memory with the donor")


@op_law
def law_dtype(op: Op, spec: ConvSpec, options: Any) -> None:
    """Weights and output have the donor's dtype: float64, float32, bfloat16."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cheap = op.from_conv(make_donor(spec, dtype=dtype), options)
        for key, value in cheap.state_dict().items():
            require(
                value.dtype == dtype or not value.is_floating_point(),
                f"{key} is {value.dtype}, the donor {dtype}",
            )
        got = cheap(make_image(spec, dtype=dtype)).dtype
        require(got == dtype, f"the output is {got} for a donor and an input of {dtype}")


@op_law
def law_device(op: Op, spec: ConvSpec, options: Any) -> None:
    """A donor on the meta device gives an op that is on the meta device and runs there."""
    donor = make_donor(spec).to("meta")
    cheap = op.from_conv(donor, options)
    for key, value in cheap.state_dict().items():
        require(value.is_meta, f"{key} is on {value.device}, the donor on meta")
    got, expected = cheap(make_image(spec).to("meta")), donor(make_image(spec).to("meta"))
    require(got.is_meta and got.shape == expected.shape, f"the output is on {got.device}, the donor on meta")


@op_law
def law_mode(op: Op, spec: ConvSpec, options: Any) -> None:
    """The op and all its parts are in the donor's mode, training or evaluation."""
    for training in (True, False):
        cheap = op.from_conv(make_donor(spec).train(training), options)
        wrong = [name or "the op" for name, part in cheap.named_modules() if part.training != training]
        require(not wrong, f"{', '.join(wrong)} has training={not training}, the donor training={training}")


@op_law
def law_frozen(op: Op, spec: ConvSpec, options: Any) -> None:
    """Parameters are frozen as the donor's weight is, the bias as the donor's bias is."""
    for weight, bias in ((True, True), (True, False), (False, True), (False, False)):
        donor = make_donor(spec)
        donor.weight.requires_grad_(weight)
        if donor.bias is not None:
            donor.bias.requires_grad_(bias)
        cheap = op.from_conv(donor, options)
        for name, parameter in cheap.named_parameters():
            expected = bias if parameter is cheap.bias else weight
            require(
                parameter.requires_grad == expected,
                f"{name} has requires_grad={not expected}, unlike the donor",
            )


@op_law
def law_memory_format(op: Op, spec: ConvSpec, options: Any) -> None:
    """A donor in channels_last gives an op in channels_last, a contiguous one a contiguous."""
    spec = dataclasses.replace(spec, in_channels=12)  # one input channel would be both at once
    if not accepts(op, spec, options):
        return
    for memory_format in (torch.channels_last, torch.contiguous_format):
        donor = make_donor(spec).to(memory_format=memory_format)
        for key, value in op.from_conv(donor, options).state_dict().items():
            kept = value.dim() != 4 or value.is_contiguous(memory_format=memory_format)
            require(kept, f"{key} is not in {memory_format}, the donor is")


@op_law
def law_gradients(op: Op, spec: ConvSpec, options: Any) -> None:
    """Every parameter receives a finite gradient that is not zero throughout."""
    for cheap in both(op, spec, options):
        out = cheap(make_image(spec))
        torch.autograd.backward((out * torch.randn_like(out)).sum())
        for name, parameter in cheap.named_parameters():
            _require_alive(name, parameter.grad, "the output")


@op_law
def law_as_dense(op: Op, spec: ConvSpec, options: Any) -> None:
    """The op equals the dense convolution whose kernel is `as_dense()`, with the donor's bias."""
    donor = make_donor(spec)
    cheap = op.from_conv(donor, options)
    if donor.bias is not None and cheap.bias is not None:
        require_close(cheap.bias, donor.bias, "the bias")
    for made in (cheap, op.build(spec, options, dtype=torch.float64)):
        image = make_image(spec)
        require_close(made(image), dense_of(made, spec)(image), "the output, against as_dense(),")


@op_law
def law_as_dense_gradients(op: Op, spec: ConvSpec, options: Any) -> None:
    """`as_dense()` is differentiable in every parameter but the bias."""
    for cheap in both(op, spec, options):
        dense = cheap.as_dense()
        require(dense.requires_grad, "as_dense() gives a tensor without a gradient")
        torch.autograd.backward((dense * torch.randn_like(dense)).sum())
        for name, parameter in cheap.named_parameters():
            if parameter is not cheap.bias:
                _require_alive(name, parameter.grad, "as_dense()")


def _require_alive(name: str, gradient: Tensor | None, source: str) -> None:
    require(gradient is not None, f"{name} receives no gradient from {source}")
    assert gradient is not None
    require(bool(gradient.isfinite().all()), f"{name} receives a gradient from {source} that is not finite")
    require(bool(gradient.any()), f"{name} receives a gradient of zeros from {source}")


@op_law
def law_representable(op: Op, spec: ConvSpec, options: Any) -> None:
    """A kernel that the op can represent is reproduced by `from_conv`: exactly, or mostly where `is_exact` says so."""
    for known in both(op, spec, options):
        donor = dense_of(known, spec)
        got = op.from_conv(donor, options).as_dense()
        if op.is_exact(spec, options):
            require_close(got, donor.weight, "the kernel that came back")
        else:
            with torch.no_grad():
                lost = float((got - donor.weight).square().sum() / donor.weight.square().sum())
            require(lost <= _LOST, f"the kernel that came back has lost {lost:.0%} of its energy")


@op_law
def law_macs(op: Op, spec: ConvSpec, options: Any) -> None:
    """The declared `macs` and `one_hot_macs` together are what a counter counts, at two sizes."""
    cheap = op.from_conv(make_donor(spec), options)
    height, width = input_size(spec)
    for size in ((height, width), (height + 3, width + 2)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            cheap(torch.zeros(1, spec.in_channels, *size, dtype=torch.float64))
        counted = counter.get_total_flops() // 2
        for given in (options, cheap.options):
            declared = op.macs(spec, *size, given) + op.one_hot_macs(spec, *size, given)
            require(
                declared == counted,
                f"declares {declared} MACs at {size[0]}x{size[1]}, a counter saw {counted}",
            )
