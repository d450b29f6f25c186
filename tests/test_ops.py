"""Conformance: every op, found by discovery, against every law, on generated convolutions."""

import pkgutil
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from convsurgeon import ops
from convsurgeon.errors import ConvSurgeonError, UnknownNameError, UnsupportedConvError
from convsurgeon.spec import ConvSpec
from convsurgeon.testing import EXPENSIVE, accepts, cases, check_op, input_size, laws, sample_cases, specs

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
CHEAP = sorted(laws(expensive=False))
NAMES = ops.names()
# what each exporter treats differently: stride, uneven "same", padding modes
FIXED = [
    ConvSpec(8, 6, (3, 3), stride=(2, 2), padding=(1, 1)),
    ConvSpec(6, 8, (2, 3), padding="same", dilation=(1, 2), bias=False, padding_mode="reflect"),
]
MODES = [
    ConvSpec(8, 4, (4, 3), stride=(1, 2), padding=padding, dilation=(1, 2), padding_mode=mode)
    for mode in ("zeros", "reflect", "replicate", "circular")
    for padding in ((2, 1), "valid")
]
each_op = pytest.mark.parametrize("name", NAMES)
by_hypothesis = settings(
    deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much]
)


def test_the_folder_is_the_list():
    files = {module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_")}
    assert files <= set(NAMES)
    assert files == {name for name in NAMES if ops.get(name).__module__ == f"convsurgeon.ops.{name}"}
    assert len(files) >= 4


@each_op
@pytest.mark.parametrize("law", CHEAP)
@by_hypothesis
@given(data=st.data())
def test_law(name, law, data):
    op = ops.get(name)
    spec, options = data.draw(cases(op))
    laws()[law](op, spec, options)


@each_op
@pytest.mark.parametrize("law", sorted(EXPENSIVE))
@pytest.mark.parametrize("spec", FIXED, ids=str)
def test_expensive_law(name, law, spec):
    assert accepts(ops.get(name), spec)
    laws()[law](ops.get(name), spec, None)


# every op in half of the modes, and every mode with half of the ops
OPS_IN_MODES = [(name, spec) for i, name in enumerate(NAMES) for j, spec in enumerate(MODES) if (i + j) % 2 == 0]


@pytest.mark.slow
@pytest.mark.parametrize("law", sorted(EXPENSIVE))
@pytest.mark.parametrize(
    ("name", "spec"), OPS_IN_MODES, ids=[f"{name}-{spec.padding_mode}-{spec.padding}" for name, spec in OPS_IN_MODES]
)
def test_expensive_law_in_every_padding_mode(name, law, spec):
    assert accepts(ops.get(name), spec)
    laws()[law](ops.get(name), spec, None)


@pytest.mark.slow
@each_op
@pytest.mark.parametrize("law", sorted(EXPENSIVE))
def test_expensive_law_on_generated_cases(name, law):
    for spec, options in sample_cases(ops.get(name), count=4, seed=1):
        laws()[law](ops.get(name), spec, options)


@pytest.mark.slow
@each_op
@pytest.mark.parametrize("law", CHEAP)
@settings(by_hypothesis, max_examples=25, derandomize=False)
@given(data=st.data())
def test_law_on_many_cases(name, law, data):
    op = ops.get(name)
    spec, options = data.draw(cases(op))
    laws()[law](op, spec, options)


@each_op
def test_every_choice_of_every_option_is_drawn(name):
    op = ops.get(name)
    drawn = [options for _, options in sample_cases(op, count=60)]
    fields = vars(op.parse_options())
    assert all(len({getattr(options, field) for options in drawn}) > 1 for field in fields)


@settings(by_hypothesis, max_examples=100)
@given(spec=specs())
def test_a_drawn_spec_is_a_convolution_that_runs(spec):
    conv = nn.Conv2d(
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        bias=spec.bias,
        padding_mode=spec.padding_mode,
    )
    image = torch.zeros(2, spec.in_channels, *input_size(spec))
    assert conv(image).shape == (2, spec.out_channels, *spec.output_size(*input_size(spec)))
    assert ConvSpec.from_conv(conv) == spec


@settings(by_hypothesis, max_examples=100)
@given(spec=specs())
def test_every_tap_of_a_drawn_spec_meets_the_image(spec):
    conv = nn.Conv2d(1, 1, spec.kernel_size, spec.stride, spec.padding, spec.dilation)
    conv(torch.ones(1, 1, *input_size(spec))).sum().backward()
    assert conv.weight.grad.all()


def test_drawn_cases_cover_what_a_convolution_can_do():
    drawn = [spec for name in NAMES for spec, _ in sample_cases(ops.get(name), count=60, seed=3)]
    assert {spec.padding_mode for spec in drawn} == {"zeros", "reflect", "replicate", "circular"}
    assert {spec.padding for spec in drawn} > {"same", "valid"}
    assert {spec.bias for spec in drawn} == {True, False}
    assert any(spec.kernel_size[0] != spec.kernel_size[1] for spec in drawn)
    assert any(spec.kernel_size[0] % 2 == 0 and spec.padding == "same" for spec in drawn)
    assert any(spec.stride[0] != spec.stride[1] for spec in drawn)
    assert any(spec.dilation == (2, 1) for spec in drawn)


@each_op
def test_cases_are_reproducible(name):
    assert sample_cases(ops.get(name), seed=5) == sample_cases(ops.get(name), seed=5)
    assert sample_cases(ops.get(name), seed=5) != sample_cases(ops.get(name), seed=6)


@each_op
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 16, 3, groups=8)],
    ids=["1x1", "grouped", "depthwise"],
)
def test_a_refusal_is_one_sentence_that_names_op_and_convolution(name, conv):
    op, spec = ops.get(name), ConvSpec.from_conv(conv)
    reason = op.why_not(spec, op.parse_options())
    if reason is None:
        assert op.from_conv(conv)(torch.zeros(1, 8, 5, 5)).shape == conv(torch.zeros(1, 8, 5, 5)).shape
        return
    with pytest.raises(UnsupportedConvError) as caught:
        op.from_conv(conv)
    assert str(caught.value) == f"{name}: {reason} ({spec})"


@each_op
def test_an_unknown_option_is_refused(name):
    with pytest.raises(ConvSurgeonError, match=rf"{name} has no option 'nonesuch'"):
        ops.get(name).parse_options({"nonesuch": 1})


@each_op
def test_a_lookup_by_class_name_and_a_near_miss(name):
    op = ops.get(name)
    assert getattr(ops, op.__name__) is op
    with pytest.raises(UnknownNameError, match=rf"unknown op '{name}x'\. Did you mean '{name}'\? Available: "):
        ops.get(f"{name}x")


def test_no_attribute_is_made_up():
    with pytest.raises(AttributeError, match="has no attribute 'NonesuchConv2d'"):
        _ = ops.NonesuchConv2d


@each_op
def test_weights_that_follow_need_no_fit(name):
    op, conv = ops.get(name), nn.Conv2d(8, 8, 3, padding=1).double()
    fitted, empty = op.from_conv(conv), op.from_conv(conv, initialize=False)
    empty.load_state_dict(fitted.state_dict())
    image = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(empty(image), fitted(image))


def test_a_law_refuses_a_case_that_the_op_refuses():
    grouped = ConvSpec(8, 8, (3, 3), groups=2)
    refusing = [ops.get(name) for name in NAMES if not accepts(ops.get(name), grouped)]
    assert refusing
    for op in refusing:
        with pytest.raises(UnsupportedConvError, match="give a case it accepts"):
            laws()["law_output_shape"](op, grouped, None)


def test_laws_leave_the_random_state_alone():
    before = torch.get_rng_state()
    op = ops.get(NAMES[0])
    for law in laws(expensive=False).values():
        law(op, FIXED[0], None)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_hypothesis_strategies_say_so_and_check_op_works():
    code = """
        import sys
        sys.modules["hypothesis"] = None
        from convsurgeon import errors, ops, testing
        try:
            testing.specs()
        except errors.ConvSurgeonError as error:
            print(error)
        op = ops.get(ops.names()[0])
        testing.check_op(op, cases=testing.sample_cases(op, count=1), expensive=False)
        print(any(name.split(".")[0] in ("onnx", "onnxruntime") for name in sys.modules))
    """
    assert _run(code) == [
        "convsurgeon.testing: strategies need hypothesis (pip install hypothesis); check_op needs none",
        "False",
    ]


def test_check_op_refuses_to_check_nothing():
    with pytest.raises(AssertionError, match="no case was given"):
        check_op(ops.get(NAMES[0]), cases=[])


THIRD_PARTY = """
from convsurgeon.factorization import rank_one
from convsurgeon.ops import AbstractSpatialPointwise


class ForeignConv2d(AbstractSpatialPointwise):
    name = "foreign"
    summary = "one spatial filter for a channel, then 1x1"
    reference = "nobody, 2020"

    @classmethod
    def spatial_groups(cls, spec, options):
        return spec.in_channels

    def init_from(self, weight, bias):
        point_IO, depth_IK = rank_one(weight.flatten(2).transpose(0, 1))
        self.pointwise.weight.copy_(point_IO.T[:, :, None, None])
        self.spatial.weight.copy_(depth_IK.view_as(self.spatial.weight))
        self.copy_bias(bias)
"""


def test_a_third_party_op_comes_in_through_its_entry_point(tmp_path):
    (tmp_path / "foreign_ops.py").write_text(THIRD_PARTY)
    info = tmp_path / "foreign_ops-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-ops\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[convsurgeon.ops]\nforeign = foreign_ops:ForeignConv2d\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import torch
        import convsurgeon as cs
        from convsurgeon.testing import check_op, sample_cases
        print("foreign" in cs.ops.names(), cs.ops.ForeignConv2d.__module__)
        op = cs.ops.get("foreign")
        check_op(op, cases=sample_cases(op, count=2), expensive=False)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3))
        print(type(cs.rewrite(net, "foreign")[1]).__name__)
    """
    assert _run(code) == ["True foreign_ops", "ForeignConv2d"]


def _run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
