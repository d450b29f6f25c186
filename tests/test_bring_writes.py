"""Writes to the weight of a converted layer: they reach the op's parameters, or raise with what to do."""

import copy
import io
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.utils import fusion, parameters_to_vector, vector_to_parameters

import convsurgeon as cs
from convsurgeon import ops
from convsurgeon.errors import KernelWriteError
from convsurgeon.ops import AbstractCheapConv

NAMES = ops.names()
each_op = pytest.mark.parametrize("name", NAMES)


def made(name="depthwise", *, dtype=torch.float64, bias=True, **options):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        conv = nn.Conv2d(8, 12, 3, padding=1, bias=bias, dtype=dtype)
    return ops.get(name).from_conv(conv, options or None)


def image(dtype=torch.float64):
    return torch.randn(2, 8, 7, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))


def draw(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5


def require_kernel(op, kernel, bias=None):
    """The op, as it runs, has that kernel."""
    bias = op.bias if bias is None else bias
    torch.testing.assert_close(op(image()), F.conv2d(image(), kernel, bias, padding=1))
    torch.testing.assert_close(op.weight, kernel, check_stride=False)


# ---- writes that every op can hold


def double_data(op):
    op.weight.data.mul_(2)


def double_in_no_grad(op):
    with torch.no_grad():
        op.weight.mul_(2)


def double_in_inference_mode(op):
    with torch.inference_mode():
        op.weight.mul_(2)


def double_with_grad(op):
    op.weight.mul_(2)


def double_detached(op):
    op.weight.detach().mul_(2)


def double_augmented(op):
    with torch.no_grad():
        op.weight *= 2


def double_augmented_with_grad(op):
    op.weight += op.weight


def double_augmented_data(op):
    op.weight.data *= 2


def double_by_out(op):
    with torch.no_grad():
        torch.mul(op.weight, 2, out=op.weight)


def double_by_foreach(op):
    with torch.no_grad():
        torch._foreach_mul_([op.weight], 2)


def double_by_copy(op):
    op.weight.data.copy_(op.weight * 2)


def double_by_set_data(op):
    op.weight.data = op.weight.data * 2


def double_by_set(op):
    with torch.no_grad():
        op.weight.set_(op.weight.detach() * 2)


def double_by_item(op):
    op.weight.data[:] = op.weight.data * 2


def double_by_slices(op):
    for filter_ in op.weight.data:
        filter_.mul_(2)


def double_by_halves(op):
    kernel = op.weight.data
    kernel[:5].mul_(2)
    kernel[5:].add_(kernel[5:].clone())


def double_a_view(op):
    op.weight.data.flatten(1).t().mul_(2)


def double_by_a_parameter(op):
    op.weight = nn.Parameter(op.weight.detach() * 2)


def double_by_a_tensor(op):
    op.weight = op.weight * 2


def double_by_setattr(op):
    setattr(op, "weight", nn.Parameter(2 * op.weight))  # noqa: B010  as libraries do


def double_by_register(op):
    op.register_parameter("weight", nn.Parameter(2 * op.weight))


def double_by_vector(op):
    vector_to_parameters(parameters_to_vector([op.weight]) * 2, [op.weight])


def double_by_lerp(op):
    op.weight.data.lerp_(op.weight.data * 3, 0.5)


DOUBLES = [value for key, value in list(globals().items()) if key.startswith("double_")]


@each_op
@pytest.mark.parametrize("write", DOUBLES, ids=lambda write: write.__name__)
def test_a_write_that_doubles_takes_effect_once(name, write):
    op = made(name)
    kernel, bias = op.as_dense().detach(), op.bias.detach().clone()
    write(op)
    require_kernel(op, 2 * kernel, bias)
    assert all(isinstance(each, nn.Parameter) and each.requires_grad for each in op.parameters())


def scale_outputs(kernel):
    return kernel * draw(12, 1, 1, 1)


def scale_inputs(kernel):
    return kernel * draw(1, 8, 1, 1)


def zero_a_filter(kernel):
    return torch.cat([kernel[:3], 0 * kernel[3:4], kernel[4:]])


def zero_an_input(kernel):
    return torch.cat([kernel[:, :3], 0 * kernel[:, 3:4], kernel[:, 4:]], dim=1)


def zero_all(kernel):
    return 0 * kernel


def negate(kernel):
    return -kernel


def shrink(kernel):
    return kernel * 1e-6


@each_op
@pytest.mark.parametrize(
    "change", [scale_outputs, scale_inputs, zero_a_filter, zero_an_input, zero_all, negate, shrink]
)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-7), (torch.float32, 1e-5)], ids=str)
def test_a_kernel_of_the_ops_form_takes_effect(name, change, dtype, rounding):
    op = made(name, dtype=dtype, bias=False)
    kernel = change(op.as_dense().detach()).to(dtype)
    op.weight.data.copy_(kernel)
    op.requires_grad_(False)
    for held, wanted in ((op.as_dense(), kernel), (op(image(dtype)), F.conv2d(image(dtype), kernel, padding=1))):
        assert float((held - wanted).norm()) <= rounding * float(wanted.norm())


OPTIONS = [
    (name, options)
    for name in NAMES
    for options in ({"rank": 2}, {"rank": 0.5}, {"expansion": 2}, {"assignment": "learned"}, {"stride_on": "pointwise"})
    if set(options) <= set(vars(ops.get(name).parse_options()))
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_options_do_not_matter(name, options):
    op = made(name, **options)
    with torch.no_grad():
        for _, parameter in op.named_parameters():
            parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float64).view_as(parameter)))
    for change in (scale_outputs, scale_inputs, zero_a_filter):
        kernel = op.as_dense().detach()
        op.weight.data.copy_(change(kernel))
        require_kernel(op, change(kernel))


@each_op
def test_the_kernel_of_another_op_of_the_same_form_is_taken(name):
    op, other = made(name), made(name)
    for parameter in other.parameters():
        parameter.data.mul_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
    try:
        op.weight = other.weight
    except KernelWriteError:
        assert not op.is_exact(op.spec, op.parse_options(op.options))
    else:
        require_kernel(op, other.as_dense().detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_op
def test_half_precision(name, dtype):
    op = made(name, dtype=dtype)
    kernel = op.as_dense().detach()
    op.weight.data.mul_(2)
    torch.testing.assert_close(op.as_dense(), 2 * kernel)
    op.weight.data.mul_(torch.linspace(0.5, 2, 12, dtype=dtype).view(-1, 1, 1, 1))
    assert {parameter.dtype for parameter in op.parameters()} == {dtype}


@each_op
def test_data_of_another_dtype_is_taken_with_it(name):
    op = made(name, dtype=torch.float32)
    kernel = op.as_dense().detach()
    op.weight.data = op.weight.data.double()
    op.bias.data = op.bias.data.double()
    assert {tensor.dtype for tensor in op.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(op(image()).float(), F.conv2d(image().float(), kernel, op.bias.float(), padding=1))


# ---- writes that an op cannot hold


def init_normal(op):
    nn.init.normal_(op.weight)


def init_kaiming(op):
    nn.init.kaiming_normal_(op.weight, mode="fan_out", nonlinearity="relu")


def init_orthogonal(op):
    nn.init.orthogonal_(op.weight)


def data_uniform(op):
    op.weight.data.uniform_(-1, 1)


def copy_noise(op):
    with torch.no_grad():
        op.weight.copy_(torch.randn_like(op.weight))


def add_noise(op):
    op.weight.data.add_(1e-3 * torch.randn(12, 8, 3, 3))


def clamp(op):
    op.weight.data.clamp_(-0.01, 0.01)


def set_data(op):
    op.weight.data = torch.randn(12, 8, 3, 3)


def assign_parameter(op):
    op.weight = nn.Parameter(torch.randn(12, 8, 3, 3))


def assign_tensor(op):
    op.weight = torch.randn(12, 8, 3, 3)


def one_weight(op):
    op.weight.data[0, 0, 0, 0] = 7


def masked(op):
    op.weight.data.masked_fill_(torch.rand(12, 8, 3, 3) < 0.5, 3.0)


def renorm(op):
    op.weight.data = torch.renorm(op.weight.data.flatten(0, 1), 2, 0, 0.1).view_as(op.weight) + 0.1


ARBITRARY = [init_normal, init_kaiming, init_orthogonal, data_uniform, copy_noise, set_data]
OTHERS = [add_noise, clamp, one_weight, masked, renorm, assign_parameter, assign_tensor]


@each_op
@pytest.mark.parametrize("write", [*ARBITRARY, *OTHERS], ids=lambda write: write.__name__)
def test_a_write_takes_effect_or_raises_and_changes_nothing(name, write):
    op = made(name, dtype=torch.float32)
    dense = nn.Conv2d(8, 12, 3)
    dense.weight = nn.Parameter(op.as_dense().detach())
    before = {key: value.clone() for key, value in op.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if write in OTHERS[:-1]:
            write(dense)
        torch.default_generator.manual_seed(0)
        try:
            write(op)
        except KernelWriteError as error:
            said = str(error)
            assert len(said.splitlines()) == 1
            assert said.startswith(f"{type(op).__name__}(8→12, 3x3, padding 1) cannot hold the kernel that was written")
            assert f"{op.last}.weight" in said
            assert all(torch.equal(value, before[key]) for key, value in op.state_dict().items())
        else:
            assert name in ("hetconv", "shift")
            assert write not in ARBITRARY
            torch.testing.assert_close(op.as_dense(), dense.weight)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda op: setattr(op, "weight", None), "assign a tensor, not None"),
        (lambda op: setattr(op, "weight", 3.0), "assign a tensor, not float"),
        (lambda op: delattr(op, "weight"), "weight cannot be deleted; assign another tensor to it"),
        (lambda op: delattr(op, "bias"), "bias cannot be deleted; set it to None"),
        (lambda op: setattr(op, "weight", torch.zeros(12, 8, 1, 1)), "is 12x8x1x1, expected 12x8x3x3"),
        (lambda op: setattr(op.weight, "data", torch.zeros(12, 8)), "is 12x8, expected 12x8x3x3"),
        (lambda op: setattr(op, "weight", torch.zeros(12, 8, 3, 3).int()), "is torch.int32, expected floating point"),
        (lambda op: op.weight.data.fill_(float("nan")), "has values that are not finite"),
        (lambda op: op.weight.data[0].div_(0), "has values that are not finite"),
        (lambda op: setattr(op, "bias", nn.Parameter(torch.zeros(8))), "is 8, expected 12"),
    ],
)
def test_what_else_is_refused(write, said):
    op = made()
    before = {key: value.clone() for key, value in op.state_dict().items()}
    with pytest.raises(KernelWriteError) as caught:
        write(op)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(value, before[key]) for key, value in op.state_dict().items())


def test_a_view_that_was_written_in_vain_shows_the_kernel_again():
    op = made()
    kernel = op.weight.data
    with pytest.raises(KernelWriteError):
        kernel.normal_()
    assert torch.equal(kernel, op.as_dense())
    kernel.mul_(2)
    require_kernel(op, kernel)


def test_a_view_read_before_the_parameters_changed_is_not_written_back():
    op = made()
    kernel = op.weight.data
    op.pointwise.weight.data.zero_()
    with torch.no_grad():
        op.pointwise.weight.add_(1)
    with pytest.raises(KernelWriteError, match="changed since this weight was read; read weight again"):
        kernel.mul_(2)
    assert bool((op.pointwise.weight == 1).all())


def test_numpy_cannot_write_unseen():
    op = made()
    for array in (op.weight.detach().numpy(), np.asarray(op.weight.data), op.weight.data[0].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    assert op.weight.detach().clone().numpy().flags.writeable


# ---- what belongs together: bias, batch norm, whole models


@pytest.mark.parametrize("bias", [True, False])
@each_op
def test_the_bias_can_be_set(name, bias):
    op, kernel = made(name, bias=bias), made(name, bias=bias).as_dense().detach()
    wanted = nn.Parameter(torch.arange(12, dtype=torch.float64))
    op.bias = wanted
    assert op.bias is wanted
    require_kernel(op, kernel, wanted)
    op.bias = None
    assert op.bias is None
    torch.testing.assert_close(op(image()), F.conv2d(image(), kernel, None, padding=1))
    op.bias = torch.ones(12, dtype=torch.float64)
    require_kernel(op, kernel, torch.ones(12, dtype=torch.float64))
    op.bias.data.zero_()
    with torch.no_grad():
        op.bias += 0
    op.register_parameter("bias", wanted)
    require_kernel(op, kernel, wanted)


def batch_norm():
    norm = nn.BatchNorm2d(12, dtype=torch.float64).eval()
    for seed, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
        tensor.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(seed))
    return norm


def fold_by_torch(conv, norm):
    return fusion.fuse_conv_bn_eval(conv, norm)


def fold_by_weights(conv, norm):
    conv.weight, conv.bias = fusion.fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return conv


def fold_in_place(conv, norm):
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    conv.weight.data.mul_(scale.view(-1, 1, 1, 1))
    old = 0 if conv.bias is None else conv.bias.data
    conv.bias = nn.Parameter((old - norm.running_mean) * scale + norm.bias.data)
    return conv


@torch.no_grad()
def fold_as_detectors_do(conv, norm):
    conv = conv.requires_grad_(False)
    weight = conv.weight.clone().view(conv.out_channels, -1)
    scale = torch.diag(norm.weight.div(torch.sqrt(norm.eps + norm.running_var)))
    conv.weight.copy_(torch.mm(scale, weight).view(conv.weight.shape))
    bias = torch.zeros(conv.weight.shape[0], dtype=torch.float64) if conv.bias is None else conv.bias
    shift = norm.bias - norm.weight.mul(norm.running_mean).div(torch.sqrt(norm.running_var + norm.eps))
    conv.register_parameter("bias", nn.Parameter(torch.mm(scale, bias.reshape(-1, 1)).reshape(-1) + shift))
    return conv


def fold_filter_by_filter(conv, norm):
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    if conv.bias is None:
        conv.bias = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    for index in range(conv.out_channels):
        conv.weight.data[index] *= scale[index]
        conv.bias.data[index] -= norm.running_mean[index]
        conv.bias.data[index] *= scale[index]
        conv.bias.data[index] += norm.bias.data[index]
    return conv


@each_op
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "fold", [fold_by_torch, fold_by_weights, fold_in_place, fold_as_detectors_do, fold_filter_by_filter]
)
def test_a_batch_norm_is_folded(name, bias, fold):
    op, norm = made(name, bias=bias).eval(), batch_norm()
    expected = norm(op(image())).detach()
    torch.testing.assert_close(fold(op, norm)(image()), expected)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(12, 12, 3, 3) / 10)

    def forward(self, x):
        return F.conv2d(self.body(self.stem(x).relu()).relu(), self.kernel, padding=1)


def student():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return cs.rewrite(Net(), "depthwise", example_inputs=torch.zeros(1, 3, 9, 9))


def test_an_init_function_that_is_applied():
    def by_class(module):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)

    def by_name(module):
        if "Conv" in type(module).__name__ and module.weight is not None:
            nn.init.normal_(module.weight.data, 0, 0.02)

    net = student()
    before = net.body.as_dense().detach()
    net.apply(by_class)
    assert not torch.allclose(net.body.as_dense(), before)
    with pytest.raises(KernelWriteError, match="before rewrite"):
        net.apply(by_name)


def test_kernels_of_functional_convolutions_are_written_to():
    net = student()
    kernel, x = net.kernel.as_dense().detach(), torch.randn(1, 3, 9, 9)
    out = net(x).detach()
    with torch.no_grad():
        net.kernel.mul_(2)
        torch.testing.assert_close(net(x), 2 * out)
        net.kernel.data.mul_(0.5)
        torch.testing.assert_close(net(x), out)
        nn.init.zeros_(net.kernel)
        assert not net(x).any()
        torch.mul(kernel, 3, out=net.kernel)
    torch.testing.assert_close(net(x), 3 * out)
    for write in (nn.init.normal_, lambda it: it.data.normal_(), lambda it: it.copy_(torch.randn(12, 12, 3, 3))):
        with pytest.raises(KernelWriteError), torch.no_grad():
            write(net.kernel)
    torch.testing.assert_close(net(x), 3 * out)


def test_an_average_of_the_parameters_is_that_of_the_kernels_factors():
    net, other = student(), student()
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            theirs.mul_(2)
            mine.data.lerp_(theirs, 0.5)
    torch.testing.assert_close(net.body.weight, student().body.as_dense() * 2.25)


def test_a_dense_weight_in_a_state_dict_is_unexpected():
    net = student()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "body.weight"'):
        net.load_state_dict({**net.state_dict(), "body.weight": torch.zeros(12, 8, 3, 3)})


def test_functional_call_puts_the_weight_back():
    net, x = student(), torch.randn(1, 3, 9, 9)
    out, kernel = net(x).detach(), net.body.as_dense().detach()
    doubled = functional_call(net, {"body.weight": 0 * kernel, "body.bias": 0 * net.body.bias}, (x,))
    assert not doubled.any()
    torch.testing.assert_close(net(x), out)


def test_freezing_the_weight_freezes_what_it_is_made_of():
    op = made()
    op.weight.requires_grad = False
    assert [name for name, each in op.named_parameters() if each.requires_grad] == ["pointwise.bias"]
    assert not op.weight.requires_grad
    op.weight.requires_grad_()
    assert all(each.requires_grad for each in op.parameters())
    op.weight.requires_grad_(False).requires_grad_(True)
    assert op.weight.requires_grad


def test_what_was_written_is_saved_and_exported(tmp_path):
    net, x = student().eval(), torch.randn(2, 3, 9, 9)
    net.body.weight.data.mul_(3)
    net.body.bias.data.mul_(3)
    expected = net(x).detach()
    cs.save(net, tmp_path / "net.pt2", example_inputs=x)
    torch.testing.assert_close(cs.load(tmp_path / "net.pt2")(x).detach(), expected)
    cs.export(net, tmp_path / "net.onnx", example_inputs=x)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-4, rtol=1e-4)


def test_a_written_op_goes_on_training():
    op = made()
    op.weight.data.zero_()
    op.weight.data.copy_(draw(12, 8, 1, 1).expand(12, 8, 3, 3))
    optimizer = torch.optim.SGD(op.parameters(), 0.1)
    before = op.as_dense().detach()
    op(image()).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(op.as_dense(), before)


# ---- reading stays what it was


class Reads(nn.Module):
    """Uses a converted layer's weight for something else than its convolution."""

    def __init__(self, op):
        super().__init__()
        self.conv = op

    def forward(self, x):
        kernel = self.conv.weight
        penalty = kernel.detach()[0].abs().mean() + kernel.pow(2).sum()
        return F.conv2d(x, self.conv.weight, self.conv.bias, padding=1) + penalty


@each_op
def test_reading_is_differentiable(name):
    op = made(name)
    dense = op.as_dense()
    expected = torch.autograd.grad(F.conv2d(image(), dense).square().sum(), [dense, *map(op.get_parameter, kept(op))])
    weight = op.weight
    got = torch.autograd.grad(F.conv2d(image(), weight).square().sum(), [weight, *map(op.get_parameter, kept(op))])
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other)
        assert type(mine) is torch.Tensor


def kept(op):
    return [name for name, parameter in op.named_parameters() if parameter is not op.bias]


@each_op
@pytest.mark.parametrize(
    "traced",
    [
        torch.fx.symbolic_trace,
        lambda net: torch.jit.trace(net, image()),
        lambda net: torch.compile(net, fullgraph=True, backend="eager"),
        lambda net: torch.export.export(net, (image(),)).module(),
        lambda net: torch.export.export(net, (image(),), strict=True).module(),
        lambda net: torch.fx.experimental.proxy_tensor.make_fx(net)(image()),
    ],
    ids=["fx", "jit", "compile", "export", "export-strict", "make_fx"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_reading_traces(name, traced):
    torch._dynamo.reset()
    net = Reads(made(name)).eval()
    torch.testing.assert_close(traced(net)(image()), net(image()))


def test_reading_exports_to_onnx(tmp_path):
    net = Reads(made(dtype=torch.float32)).eval()
    for dynamo in (True, False):
        file = tmp_path / f"{dynamo}.onnx"
        torch.onnx.export(net, (image(torch.float32),), file, dynamo=dynamo, verbose=False)
        session = onnxruntime.InferenceSession(file)
        got = session.run(None, {session.get_inputs()[0].name: image(torch.float32).numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), net(image(torch.float32)).detach(), atol=1e-4, rtol=1e-4)


test_reading_exports_to_onnx = pytest.mark.filterwarnings("ignore::DeprecationWarning")(test_reading_exports_to_onnx)


def test_reading_inside_transforms():
    net = Reads(made())

    def loss(parameters, x):
        return functional_call(net, parameters, (x[None],)).square().mean()

    parameters = {name: each.detach() for name, each in net.named_parameters()}
    per_image = vmap(grad(loss), in_dims=(None, 0))(parameters, image())
    assert {name: len(each) for name, each in per_image.items()} == dict.fromkeys(parameters, 2)


def test_what_is_computed_from_it_is_plain():
    op = made()
    assert isinstance(op.weight, torch.Tensor)
    for computed in (op.weight * 2, op.weight.clone(), op.weight.sum(), op.weight.cpu() + 1, op.weight.data.float()):
        assert type(computed) is torch.Tensor
    values, indices = op.weight.max(dim=0)
    assert type(values) is type(indices) is torch.Tensor
    assert type(op.weight.shape) is torch.Size
    assert op.weight.tolist() == op.as_dense().tolist()
    assert op.weight.dtype is torch.float64


def test_a_parameter_made_of_it_is_ones_own():
    op = made()
    before = op.as_dense().detach()
    for own in (nn.Parameter(op.weight), nn.Parameter(op.weight.data), nn.Parameter(op.weight.detach(), False)):
        assert type(own) is nn.Parameter
        with torch.no_grad():
            own.normal_()
    assert torch.equal(op.as_dense(), before)
    conv = nn.Conv2d(8, 12, 3, dtype=torch.float64)
    conv.weight = nn.Parameter(op.weight)
    assert type(copy.deepcopy(conv).weight) is nn.Parameter
    assert "weight" in conv.state_dict()


@pytest.mark.parametrize("read", [lambda op: op.weight, lambda op: op.weight.data, lambda op: op.weight[0]])
def test_nothing_but_numbers_leaves(read):
    op = made().requires_grad_(False)
    expected = read(op).detach().clone()
    file = io.BytesIO()
    torch.save({"w": read(op)}, file)
    file.seek(0)
    found = [
        torch.load(file, weights_only=True)["w"],
        pickle.loads(pickle.dumps(read(op))),
        copy.deepcopy(read(op)),
        copy.deepcopy({"here": read(op)})["here"],
        torch.from_numpy(read(op).numpy().copy()),
    ]
    for value in found:
        assert type(value) is torch.Tensor
        assert torch.equal(value, expected)
        value.zero_()
    assert torch.equal(read(op), expected)
    assert b"convsurgeon" not in pickle.dumps(read(op))
    assert repr(read(op)) == repr(expected) == f"{read(op)!s}"


def test_a_graph_leaf_is_refused_a_deep_copy_as_torch_does():
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly"):
        copy.deepcopy(made().weight)


def test_repr_says_how_it_was_made():
    assert repr(made().weight).startswith("tensor(")
    assert "grad_fn=" in repr(made().weight)


def test_reading_leaves_the_op_as_it_was():
    op = made()
    before = {key: value.clone() for key, value in op.state_dict().items()}
    versions = [each._version for each in op.parameters()]
    op.weight.norm(), op.weight.data.sum(), op.weight[0].contiguous(), op.weight.numel()
    assert [each._version for each in op.parameters()] == versions
    assert all(torch.equal(value, before[key]) for key, value in op.state_dict().items())


def test_an_op_with_a_weight_of_its_own_keeps_it():
    class Own(AbstractCheapConv):
        name, summary, reference, last = "own", "dense", "this file", "conv"

        def __init__(self, spec, options):
            super().__init__(spec, options)
            self.weight = nn.Parameter(torch.zeros(spec.out_channels, spec.in_channels, *spec.kernel_size))
            self.conv = nn.Conv2d(1, 1, 1, bias=spec.bias)

        @classmethod
        def why_not(cls, spec, options):
            return None

        @classmethod
        def macs(cls, spec, height, width, options=None):
            return spec.macs(height, width)

        def init_from(self, weight, bias):
            self.weight.copy_(weight)

        def as_dense(self):
            return self.weight

        def forward(self, x):
            return F.conv2d(x, self.weight)

    op = Own.from_conv(nn.Conv2d(2, 3, 3))
    wanted = nn.Parameter(torch.randn(3, 2, 3, 3))
    op.weight = wanted
    assert op.weight is wanted
