"""The laws that a cheap convolution must obey, for this package's ops and for anyone else's.

`check_op(MyConv2d)` runs every law on a handful of generated convolutions and raises an
`AssertionError` of one sentence at the first that is broken. With hypothesis, in a test suite::

    @pytest.mark.parametrize("law", laws().values(), ids=laws())
    @given(case=cases(MyConv2d))
    def test_laws(law, case):
        law(MyConv2d, *case)

A law is a function of this module whose name starts with `law_`. It takes the op's class, the
geometry of the convolution to replace (the donor), and options; it draws its weights and images
from a seed of its own and leaves the global random state alone.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
import random
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convsurgeon.errors import ConvSurgeonError, OptionError, UnsupportedConvError, one_line
from convsurgeon.ops import AbstractCheapConv
from convsurgeon.spec import ConvSpec, Pair

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Op = type[AbstractCheapConv]
Case = tuple[ConvSpec, Any]
Law = Callable[[Op, ConvSpec, Any], None]
Choose = Callable[[Sequence[Any]], Any]

EXPENSIVE: set[str] = set()
"""The names of the laws that take seconds: those that export."""

_SEED = 20190913
_GEOMETRY = tuple(field.name for field in dataclasses.fields(ConvSpec) if field.name != "bias")


class _BrokenError(AssertionError):
    """What a law found, before the op and the case are put in front of it."""


def laws(*, expensive: bool | None = None) -> dict[str, Law]:
    """Return the laws by name: all of them, only the expensive, or (False) only the cheap."""
    found = {name: law for name, law in globals().items() if name.startswith("law_")}
    return {name: law for name, law in found.items() if expensive in (None, name in EXPENSIVE)}


def check_op(op: Op, *, cases: Iterable[Case] | None = None, expensive: bool = True) -> None:
    """Run all laws on the given cases, by default on six generated ones; needs no hypothesis.

    Args:
        op: the class to check; it need not be registered.
        cases: pairs of a geometry and options that the op accepts.
        expensive: whether to export, too, which takes seconds; done for the first two cases only.

    Raises:
        AssertionError: naming the op, the law, the case and what was found.
        UnsupportedConvError: if the op refuses one of the given cases.
    """
    tried = sample_cases(op) if cases is None else list(cases)
    if not tried:
        raise AssertionError(f"{op.__name__}: no case was given, so no law was checked")
    for name, law in laws(expensive=None if expensive else False).items():
        for spec, options in tried[:2] if name in EXPENSIVE else tried:
            law(op, spec, options)


def sample_cases(op: Op, *, count: int = 6, seed: int = 0) -> list[Case]:
    """Return generated cases that the op accepts, the same ones for the same seed.

    Raises:
        AssertionError: if the op refuses nearly everything.
    """
    choose = random.Random(seed).choice
    drawn = (_draw_case(op, choose) for _ in range(200 * count))
    found = [case for case, _ in zip(filter(lambda case: accepts(op, *case), drawn), range(count), strict=False)]
    if len(found) < count:
        raise AssertionError(f"{op.__name__} accepts {len(found)} of {200 * count} generated convolutions")
    return found


def accepts(op: Op, spec: ConvSpec, options: Any = None) -> bool:
    """Whether the op can replace such a convolution."""
    return op.why_not(spec, op.fit_options(spec, op.parse_options(options))) is None


def specs() -> SearchStrategy[ConvSpec]:
    """Return a hypothesis strategy for dense convolutions of every kind that `nn.Conv2d` offers."""
    return _strategy(_draw_spec)


def cases(op: Op) -> SearchStrategy[Case]:
    """Return a hypothesis strategy for pairs of a geometry and options that the op accepts."""
    return _strategy(lambda choose: _draw_case(op, choose)).filter(lambda case: accepts(op, *case))


def make_donor(spec: ConvSpec, *, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    """Return a convolution of that geometry with random weights."""
    return nn.Conv2d(**dataclasses.asdict(spec), dtype=dtype)


def input_size(spec: ConvSpec) -> Pair:
    """Return an input size that the padding mode allows and where every tap meets the image somewhere."""
    height, width = (
        d * (k - 1) + 1 + s + max(pad)
        for d, k, s, pad in zip(spec.dilation, spec.kernel_size, spec.stride, spec.pads, strict=True)
    )
    return height, width + 1


def _strategy(draw_one: Callable[[Choose], Any]) -> SearchStrategy[Any]:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ConvSurgeonError(
            "convsurgeon.testing: strategies need hypothesis (pip install hypothesis); check_op needs none"
        ) from error

    @strategies.composite
    def draw_all(draw: Any) -> Any:
        return draw_one(lambda values: draw(strategies.sampled_from(values)))

    return draw_all()


def _draw_spec(choose: Choose) -> ConvSpec:
    # hypothesis shrinks towards the front of each sequence
    padding: Pair | str = choose(("numbers", "numbers", "same", "valid"))
    stride = (1, 1) if padding == "same" else (choose((1, 2, 3)), choose((1, 2, 3)))
    if padding == "numbers":
        padding = (choose((0, 1, 2, 3)), choose((0, 1, 2, 3)))
    return ConvSpec(
        in_channels=choose((4, 8, 6, 1, 2, 3, 5, 7, 9, 10, 11, 12)),
        out_channels=choose((4, 8, 6, 1, 2, 3, 5, 7, 9, 10, 11, 12)),
        kernel_size=(choose((3, 2, 1, 4, 5)), choose((3, 2, 1, 4, 5))),
        stride=stride,
        padding=padding,
        dilation=(choose((1, 2)), choose((1, 2))),
        bias=choose((True, False)),
        padding_mode=choose(("zeros", "reflect", "replicate", "circular")),
    )


def _draw_case(op: Op, choose: Choose) -> Case:
    hints = typing.get_type_hints(op.Options)
    defaults = dataclasses.asdict(op.parse_options())
    chosen = {name: choose(_candidates(op, name, hints[name], default)) for name, default in defaults.items()}
    return _draw_spec(choose), op.parse_options(chosen)


def _candidates(op: Op, name: str, hint: Any, default: Any) -> list[Any]:
    """Return the values to try for an option: all choices, both truths, small integers, or the default."""
    values: Sequence[Any] = (default,)
    if typing.get_origin(hint) is typing.Literal:
        values = typing.get_args(hint)
    elif hint is bool:
        values = (False, True)
    elif hint is int:
        values = (default, 1, 2, 3, 4, 6)
    return [value for value in values if _takes(op, name, value)]


def _takes(op: Op, name: str, value: Any) -> bool:
    try:
        op.parse_options({name: value})
    except OptionError:
        return False
    return True


def _law(check: Law) -> Law:
    """Give a law its seed, and every failure the op, the law and the case in front."""

    @functools.wraps(check)
    def law(op: Op, spec: ConvSpec, options: Any = None) -> None:
        options = op.parse_options(options)
        if not accepts(op, spec, options):
            raise UnsupportedConvError(f"{op.__name__} refuses {spec} with {options}; give a case it accepts")
        where = f"{op.__name__} breaks {check.__name__} for {spec} with {options}"
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # the donor itself says so, on its first call
            warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
            torch.default_generator.manual_seed(_SEED)
            try:
                check(op, spec, options)
            except _BrokenError as error:
                raise AssertionError(f"{where}: {error}") from error
            except Exception as error:  # whatever a foreign op raises
                raise AssertionError(f"{where}: {one_line(error)}") from error

    return law


def _expensive(law: Law) -> Law:
    EXPENSIVE.add(law.__name__)
    return law


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _BrokenError(message)


def _require_close(actual: Tensor, expected: Tensor, what: str) -> None:
    _require(actual.shape == expected.shape, f"{what} has the shape {_by(actual)}, expected {_by(expected)}")
    try:
        torch.testing.assert_close(actual, expected)
    except AssertionError as error:
        if not actual.numel() or actual.dtype != expected.dtype:
            raise
        worst = (actual.double() - expected.double()).abs().max().item()
        raise _BrokenError(f"{what} is off by up to {worst:.3g}, values reach {expected.abs().max():.3g}") from error


def _by(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _image(spec: ConvSpec, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, spec.in_channels, *input_size(spec), dtype=dtype)


def _dense(op: AbstractCheapConv, spec: ConvSpec) -> nn.Conv2d:
    """Return the dense convolution that an op says it equals."""
    kernel, bias = op.as_dense().detach(), op.bias
    conv = make_donor(spec, dtype=kernel.dtype)
    _require(kernel.shape == conv.weight.shape, f"as_dense() is {_by(kernel)}, the donor's {_by(conv.weight)}")
    _require((bias is None) == (conv.bias is None), f"bias is {bias}, the donor has bias={spec.bias}")
    with torch.no_grad():
        conv.weight.copy_(kernel)
        if conv.bias is not None and bias is not None:
            conv.bias.copy_(bias)
    return conv


def _two(op: Op, spec: ConvSpec, options: Any) -> list[AbstractCheapConv]:
    """Return an op as it comes from `build` and one as it comes from `from_conv`."""
    return [op.build(spec, options, dtype=torch.float64), op.from_conv(make_donor(spec), options)]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def _require_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    _require(actual.keys() == expected.keys(), f"{what}: {sorted(actual)} became {sorted(expected)}")
    for key, value in expected.items():
        _require(torch.equal(actual[key], value), f"{what}: {key} changed")


@_law
def law_description(op: Op, spec: ConvSpec, options: Any) -> None:
    """The class has a name, a summary and a reference, each a single line."""
    for constant in ("name", "summary", "reference"):
        value = getattr(op, constant, None)
        _require(isinstance(value, str) and value.strip() == value != "", f"{constant} is {value!r}, not a line")
        _require(len(str(value).splitlines()) == 1, f"{constant} has more than one line: {value!r}")


@_law
def law_output_shape(op: Op, spec: ConvSpec, options: Any) -> None:
    """The output has the donor's shape, for batches of one and of three."""
    donor = make_donor(spec)
    cheap = op.from_conv(donor, options)
    for batch in (1, 3):
        image = _image(spec, batch=batch)
        got, expected = cheap(image), donor(image)
        _require(got.shape == expected.shape, f"the output is {_by(got)}, the donor's {_by(expected)}")


@_law
def law_geometry(op: Op, spec: ConvSpec, options: Any) -> None:
    """The donor's geometry is there as attributes, equal in value and kind: model code reads them."""
    donor = make_donor(spec)
    cheap = op.from_conv(donor, options)
    for name in _GEOMETRY:
        got, expected = getattr(cheap, name), getattr(donor, name)
        _require(type(got) is type(expected) and got == expected, f"{name} is {got!r}, the donor's {expected!r}")
    _require((cheap.bias is None) == (donor.bias is None), f"bias is {cheap.bias}, the donor has {spec.bias}")


@_law
def law_donor_untouched(op: Op, spec: ConvSpec, options: Any) -> None:
    """`from_conv` leaves the donor as it was, and training the op afterwards does so, too."""
    donor = make_donor(spec).eval()
    donor.weight.requires_grad_(False)
    before, attributes = _state(donor), set(donor.__dict__)
    cheap = op.from_conv(donor, options)
    _require_same_state(_state(donor), before, "from_conv changed the donor")
    flags = not donor.weight.requires_grad and (donor.bias is None or donor.bias.requires_grad)
    _require(flags, "from_conv changed the donor's requires_grad flags")
    _require(not donor.training, "from_conv put the donor into training mode")
    _require(set(donor.__dict__) == attributes, "from_conv changed the donor's attributes")
    with torch.no_grad():
        for tensor in [*cheap.parameters(), *cheap.buffers()]:
            tensor.add_(1)
    _require_same_state(_state(donor), before, "the op shares memory with the donor")


@_law
def law_dtype(op: Op, spec: ConvSpec, options: Any) -> None:
    """Weights and output have the donor's dtype: float64, float32, bfloat16."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cheap = op.from_conv(make_donor(spec, dtype=dtype), options)
        for key, value in cheap.state_dict().items():
            _require(
                value.dtype == dtype or not value.is_floating_point(),
                f"{key} is {value.dtype}, the donor {dtype}",
            )
        got = cheap(_image(spec, dtype=dtype)).dtype
        _require(got == dtype, f"the output is {got} for a donor and an input of {dtype}")


@_law
def law_device(op: Op, spec: ConvSpec, options: Any) -> None:
    """A donor on the meta device gives an op that is on the meta device and runs there."""
    donor = make_donor(spec).to("meta")
    cheap = op.from_conv(donor, options)
    for key, value in cheap.state_dict().items():
        _require(value.is_meta, f"{key} is on {value.device}, the donor on meta")
    got, expected = cheap(_image(spec).to("meta")), donor(_image(spec).to("meta"))
    _require(got.is_meta and got.shape == expected.shape, f"the output is on {got.device}, the donor on meta")


@_law
def law_mode(op: Op, spec: ConvSpec, options: Any) -> None:
    """The op and all its parts are in the donor's mode, training or evaluation."""
    for training in (True, False):
        cheap = op.from_conv(make_donor(spec).train(training), options)
        wrong = [name or "the op" for name, part in cheap.named_modules() if part.training != training]
        _require(not wrong, f"{', '.join(wrong)} has training={not training}, the donor training={training}")


@_law
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
            _require(
                parameter.requires_grad == expected,
                f"{name} has requires_grad={not expected}, unlike the donor",
            )


@_law
def law_memory_format(op: Op, spec: ConvSpec, options: Any) -> None:
    """A donor in channels_last gives an op in channels_last, a contiguous one a contiguous."""
    spec = dataclasses.replace(spec, in_channels=12)  # one input channel would be both at once
    if not accepts(op, spec, options):
        return
    for memory_format in (torch.channels_last, torch.contiguous_format):
        donor = make_donor(spec).to(memory_format=memory_format)
        for key, value in op.from_conv(donor, options).state_dict().items():
            kept = value.dim() != 4 or value.is_contiguous(memory_format=memory_format)
            _require(kept, f"{key} is not in {memory_format}, the donor is")


@_law
def law_gradients(op: Op, spec: ConvSpec, options: Any) -> None:
    """Every parameter receives a finite gradient that is not zero throughout."""
    for cheap in _two(op, spec, options):
        out = cheap(_image(spec))
        torch.autograd.backward((out * torch.randn_like(out)).sum())
        for name, parameter in cheap.named_parameters():
            _require_alive(name, parameter.grad, "the output")


@_law
def law_as_dense(op: Op, spec: ConvSpec, options: Any) -> None:
    """The op equals the dense convolution whose kernel is `as_dense()`, with the donor's bias."""
    donor = make_donor(spec)
    cheap = op.from_conv(donor, options)
    if donor.bias is not None and cheap.bias is not None:
        _require_close(cheap.bias, donor.bias, "the bias")
    for made in (cheap, op.build(spec, options, dtype=torch.float64)):
        image = _image(spec)
        _require_close(made(image), _dense(made, spec)(image), "the output, against as_dense(),")


@_law
def law_as_dense_gradients(op: Op, spec: ConvSpec, options: Any) -> None:
    """`as_dense()` is differentiable in every parameter but the bias."""
    for cheap in _two(op, spec, options):
        dense = cheap.as_dense()
        _require(dense.requires_grad, "as_dense() gives a tensor without a gradient")
        torch.autograd.backward((dense * torch.randn_like(dense)).sum())
        for name, parameter in cheap.named_parameters():
            if parameter is not cheap.bias:
                _require_alive(name, parameter.grad, "as_dense()")


def _require_alive(name: str, gradient: Tensor | None, source: str) -> None:
    _require(gradient is not None, f"{name} receives no gradient from {source}")
    assert gradient is not None
    _require(bool(gradient.isfinite().all()), f"{name} receives a gradient from {source} that is not finite")
    _require(bool(gradient.any()), f"{name} receives a gradient of zeros from {source}")


@_law
def law_representable(op: Op, spec: ConvSpec, options: Any) -> None:
    """A kernel that the op can represent is reproduced exactly by `from_conv`."""
    for known in _two(op, spec, options):
        donor = _dense(known, spec)
        got = op.from_conv(donor, options).as_dense()
        _require_close(got, donor.weight, "the kernel that came back")


@_law
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
            _require(
                declared == counted,
                f"declares {declared} MACs at {size[0]}x{size[1]}, a counter saw {counted}",
            )


@_law
def law_rng(op: Op, spec: ConvSpec, options: Any) -> None:
    """`from_conv` draws nothing from the global random states of torch, Python and numpy."""
    donor = make_donor(spec)
    before, python_before = torch.get_rng_state(), random.getstate()
    numpy_before = pickle.dumps(numpy.random.get_state())
    op.from_conv(donor, options)
    _require(torch.equal(torch.get_rng_state(), before), "from_conv draws from torch's global random state")
    _require(random.getstate() == python_before, "from_conv draws from Python's global random state")
    numpy_after = pickle.dumps(numpy.random.get_state())
    _require(numpy_after == numpy_before, "from_conv draws from numpy's global random state")


@_law
def law_refusals(op: Op, spec: ConvSpec, options: Any) -> None:
    """A grouped, depthwise or 1x1 donor is refused with one sentence, or replaced correctly."""
    channels = 2 * spec.in_channels
    for change in (
        {"kernel_size": (1, 1)},
        {"in_channels": channels, "out_channels": channels, "groups": 2},
        {"in_channels": channels, "out_channels": channels, "groups": channels},
    ):
        changed: ConvSpec = dataclasses.replace(spec, **change)
        fitted = op.fit_options(changed, options)
        reason = op.why_not(changed, fitted)
        donor, image = make_donor(changed), _image(changed)
        try:
            cheap = op.from_conv(donor, options)
        except UnsupportedConvError as error:
            _require(reason is not None, f"why_not accepts {changed}, from_conv raises: {error}")
            _require(len(str(reason).splitlines()) == 1, f"refuses {changed} with {reason!r}, not one sentence")
            continue
        _require(reason is None, f"why_not refuses {changed}, from_conv does not")
        _require_close(cheap(image), _dense(cheap, changed)(image), f"the output for {changed}")


@_law
def law_deepcopy(op: Op, spec: ConvSpec, options: Any) -> None:
    """A deep copy gives equal outputs and shares nothing."""
    cheap, image = op.from_conv(make_donor(spec), options), _image(spec)
    before = cheap(image)
    copied = copy.deepcopy(cheap)
    _require(type(copied) is type(cheap), f"the copy is of class {type(copied).__name__}")
    _require_close(copied(image), before, "the copy's output")
    with torch.no_grad():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            tensor.add_(1)
    _require_close(cheap(image), before, "the output after the copy was changed")


@_law
def law_pickle(op: Op, spec: ConvSpec, options: Any) -> None:
    """It comes back from a pickle with equal outputs, mode and options."""
    cheap, image = op.from_conv(make_donor(spec).eval(), options), _image(spec)
    loaded = pickle.loads(pickle.dumps(cheap))
    _require(type(loaded) is type(cheap), f"the pickle gives a {type(loaded).__name__}")
    _require(loaded.options == cheap.options and not loaded.training, "the pickle loses options or mode")
    _require_close(loaded(image), cheap(image), "the output after pickling")


@_law
def law_state_dict(op: Op, spec: ConvSpec, options: Any) -> None:
    """A fresh op of the same spec and `options` takes over the state dict and gives equal outputs."""
    cheap, image = op.from_conv(make_donor(spec), options), _image(spec)
    file = io.BytesIO()
    torch.save(cheap.state_dict(), file)
    file.seek(0)
    fresh = op.build(cheap.spec, cheap.options, dtype=torch.float64)
    differing = fresh.load_state_dict(torch.load(file, weights_only=True), strict=False)
    _require(not differing.missing_keys, f"the state dict lacks {', '.join(differing.missing_keys)}")
    extra = ", ".join(differing.unexpected_keys)
    _require(not extra, f"the state dict has {extra}, which a fresh op does not")
    _require_close(fresh(image), cheap(image), "the output after a state-dict round trip")


class _Leafless(torch.fx.Tracer):
    """A tracer that goes into every module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


@_law
def law_fx(op: Op, spec: ConvSpec, options: Any) -> None:
    """`torch.fx` traces it, also into its parts, and the graph gives equal outputs."""
    cheap, image = op.from_conv(make_donor(spec), options), _image(spec)
    for tracer in (torch.fx.Tracer(), _Leafless()):
        traced = torch.fx.GraphModule(cheap, tracer.trace(cheap))
        for batch in (image, image[:1]):
            _require_close(traced(batch), cheap(batch), "the traced graph's output")


@_expensive
@_law
def law_export(op: Op, spec: ConvSpec, options: Any) -> None:
    """`torch.export` takes it with a free batch size, and the program gives equal outputs."""
    cheap = op.from_conv(make_donor(spec), options).eval()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(cheap, (_image(spec),), dynamic_shapes=shapes).module()
    for batch in (2, 3):
        image = _image(spec, batch=batch)
        _require_close(exported(image), cheap(image), f"the exported program's output for a batch of {batch}")


@_expensive
@_law
def law_onnx(op: Op, spec: ConvSpec, options: Any) -> None:
    """It exports to ONNX, and onnxruntime gives equal outputs on batches of one and of three."""
    from convsurgeon.delivery import export

    cheap = op.from_conv(make_donor(spec, dtype=torch.float32), options)
    with tempfile.TemporaryDirectory() as folder:
        export(cheap, Path(folder) / "op.onnx", example_inputs=_image(spec, dtype=torch.float32))
