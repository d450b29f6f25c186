"""The closed forms are optima: nothing the op can represent is closer to the dense kernel."""

import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from convsurgeon import ops, rewrite
from convsurgeon.errors import OptionError, UnsupportedConvError
from convsurgeon.factorization import (
    _blocks,
    fixed_taps,
    highest_energy_taps,
    low_rank,
    one_hot_kernel,
    rank_keeping,
    rank_one,
)
from convsurgeon.spec import ConvSpec
from convsurgeon.testing import accepts, make_donor, sample_cases

SPECS = [ConvSpec(4, 6, (3, 3)), ConvSpec(8, 3, (2, 3)), ConvSpec(6, 5, (1, 4))]


def optima():
    """Each op, on each spec, with each set of options that makes a kernel of its own."""
    for name, spec in itertools.product(ops.names(), SPECS):
        op, seen = ops.get(name), []
        donor = donor_of(spec)
        for _, options in sample_cases(op, count=40):
            if accepts(op, spec, options):
                dense = op.from_conv(donor, options).as_dense().detach()
                if not any(torch.equal(dense, other) for other in seen):
                    seen.append(dense)
                    yield pytest.param(op, spec, options, id=f"{name}-{spec}-{len(seen)}")


def donor_of(spec):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return make_donor(spec)


def error_of(op, weight):
    return (op.as_dense() - weight).square().sum()


each_optimum = pytest.mark.parametrize(("op", "spec", "options"), list(optima()))


@pytest.mark.parametrize("name", ops.names())
def test_every_op_says_in_which_norm_it_is_closest(name):
    assert "Frobenius" in inspect.getdoc(ops.get(name).init_from)


@each_optimum
def test_no_perturbation_is_closer(op, spec, options):
    weight = donor_of(spec).weight.detach()
    cheap = op.from_conv(donor_of(spec), options).requires_grad_(False)
    best = error_of(cheap, weight)
    start = [parameter.clone() for parameter in cheap.parameters()]
    generator = torch.Generator().manual_seed(0)
    for step in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(40):
            for parameter, value in zip(cheap.parameters(), start, strict=True):
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                parameter.copy_(value + step * value.abs().max() * noise)
            assert error_of(cheap, weight) >= best - (1e-12 if op.is_closest(options) else 1e-3 * best)


@each_optimum
def test_no_descent_from_anywhere_gets_closer(op, spec, options):
    weight = donor_of(spec).weight.detach()
    closed = op.from_conv(donor_of(spec), options)
    best = error_of(closed, weight).item()
    if not op.is_closest(options):
        assert "local optimum" in inspect.getdoc(op.init_from)
        # a search that is cut short leaves a little
        left = 1e-3 * best if op.is_exact(spec, options) else 0.05 * weight.square().sum().item()
        assert descend(closed, weight) >= best - left
        return
    found = [descend(random_op(op, spec, options, weight.dtype, seed), weight) for seed in range(3)]
    assert min(found) >= best * (1 - 1e-9) - 1e-12
    if not list(closed.buffers()):  # the descent can move all that the op has
        assert min(found) <= best * (1 + 1e-4) + 1e-9


def random_op(op, spec, options, dtype, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return op.build(spec, options, dtype=dtype)


def descend(cheap, weight):
    """Return the error that 200 steps of L-BFGS reach from where an op is."""
    parameters = [parameter for parameter in cheap.parameters() if parameter is not cheap.bias]
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        error = error_of(cheap, weight)
        error.backward()
        return error

    optimizer.step(closure)
    return error_of(cheap, weight).item()


@pytest.mark.parametrize("kernel", [(3, 3), (2, 2), (1, 5), (4, 1)])
def test_no_other_shift_is_closer(kernel):
    op, spec = ops.get("shift"), ConvSpec(3, 4, kernel)
    weight = donor_of(spec).weight.detach()
    errors = {}
    for taps in itertools.product(range(spec.taps), repeat=3):
        mask = one_hot_kernel(torch.tensor(taps), *kernel).double().transpose(0, 1)
        errors[taps] = (weight - weight * mask).square().sum().item()
    cheap = op.from_conv(donor_of(spec))
    assert error_of(cheap, weight).item() == pytest.approx(min(errors.values()), rel=1e-12)
    assert tuple(cheap.taps.tolist()) == min(errors, key=errors.get)


@pytest.mark.parametrize("groups", [2, 3, 4, 6])
@pytest.mark.parametrize("out_channels", [2, 5, 30])
def test_group_loses_what_the_singular_values_beyond_the_rank_hold(groups, out_channels):
    spec = ConvSpec(12, out_channels, (3, 2))
    weight = donor_of(spec).weight.detach()
    rank, lost = 12 // groups, 0.0
    for part in weight.split(rank, dim=1):
        lost += torch.linalg.svd(part.flatten(1))[1][rank:].square().sum().item()
    cheap = ops.get("group").from_conv(donor_of(spec), {"groups": groups})
    assert error_of(cheap, weight).item() == pytest.approx(lost, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(("name", "channel_axis"), [("depthwise", 1), ("bsconv", 0)])
def test_rank_one_ops_lose_all_but_the_first_singular_value(name, channel_axis):
    spec = ConvSpec(5, 7, (3, 3))
    weight = donor_of(spec).weight.detach()
    values = torch.linalg.svd(weight.flatten(2).movedim(channel_axis, 0))[1]
    cheap = ops.get(name).from_conv(donor_of(spec))
    assert error_of(cheap, weight).item() == pytest.approx(values[:, 1:].square().sum().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("channels", "asked", "taken"),
    [
        (12, 8, 6),
        (12, 6, 6),
        (12, 5, 4),
        (64, 8, 8),
        (6, 100, 6),
        (9, 8, 3),
        (7, 8, 7),
        (14, 13, 7),
        (2, 8, 2),
    ],
)
def test_group_takes_the_largest_divisor(channels, asked, taken):
    op, spec = ops.get("group"), ConvSpec(channels, 4, (3, 3))
    options = op.fit_options(spec, op.parse_options({"groups": asked}))
    cheap = op.from_conv(make_donor(spec), {"groups": asked})
    assert (options.groups, cheap.options["groups"], cheap.spatial.groups) == (taken, taken, taken)
    assert op.macs(spec, 9, 9, {"groups": asked}) == op.macs(spec, 9, 9, options)


@pytest.mark.parametrize(
    ("channels", "groups", "reason"),
    [
        (7, 6, "no number of groups from 2 to 6 divides 7 input channels"),
        (9, 2, "no number of groups from 2 to 2 divides 9 input channels"),
        (1, 8, "no number of groups from 2 to 8 divides 1 input channel"),
    ],
)
def test_group_refuses_to_be_one_group(channels, groups, reason):
    op, spec = ops.get("group"), ConvSpec(channels, 4, (3, 3))
    assert op.why_not(spec, op.parse_options({"groups": groups})) == reason
    with pytest.raises(UnsupportedConvError, match=f"^group: {reason} \\("):
        op.from_conv(make_donor(spec), {"groups": groups})


@pytest.mark.parametrize("groups", [1, 0, -4, "1"])
def test_group_refuses_less_than_two(groups):
    with pytest.raises(OptionError, match=f"^group: option groups must be at least 2, got {groups}$"):
        ops.get("group").parse_options({"groups": groups})


@pytest.mark.parametrize("name", ["depthwise", "shift"])
def test_a_single_channel_has_a_filter_of_its_own(name):
    assert accepts(ops.get(name), ConvSpec(1, 4, (3, 3)))


def test_fixed_taps_are_the_papers_for_3x3():
    taps = fixed_taps(24, 3, 3)
    for channel in range(18):  # of 24 channels the last 24 mod 9 = 6 are not shifted
        dx, dy = channel % 3 - 1, (channel // 3) % 3 - 1
        assert taps[channel] == (dy + 1) * 3 + dx + 1
    assert taps[18:].tolist() == [4] * 6


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1), (5, 5), (2, 3), (4, 4), (5, 2)])
@pytest.mark.parametrize("channels", [1, 3, 12, 50])
def test_fixed_taps_of_other_kernels(kernel, channels):
    height, width = kernel
    taps = fixed_taps(channels, height, width)
    shifted = channels - channels % (height * width)
    for channel in range(channels):
        dx, dy = channel % width - width // 2, (channel // width) % height - height // 2
        if channel >= shifted:
            dx = dy = 0
        assert taps[channel] == (dy + height // 2) * width + dx + width // 2


def test_assignment_fixed_moves_a_picture_as_the_paper_says():
    spec = ConvSpec(9, 9, (3, 3), padding=(1, 1), bias=False)
    cheap = ops.get("shift").from_conv(make_donor(spec), {"assignment": "fixed"})
    assert cheap.taps.tolist() == list(range(9))
    image = torch.zeros(1, 9, 5, 5, dtype=torch.float64)
    image[:, :, 2, 2] = 1
    moved = cheap.spatial(image)
    for channel in range(9):
        dx, dy = channel % 3 - 1, channel // 3 - 1
        # a convolution reads at the offset, so that what is seen moves the other way
        assert moved[0, channel].nonzero().tolist() == [[2 - dy, 2 - dx]]


def test_assignment_fixed_keeps_the_dense_weights_of_its_taps():
    spec = ConvSpec(11, 4, (3, 3))
    donor = donor_of(spec)
    cheap = ops.get("shift").from_conv(donor, {"assignment": "fixed"})
    taps = fixed_taps(11, 3, 3)
    for channel in range(11):
        expected = donor.weight[:, channel].flatten(1)[:, taps[channel]]
        assert torch.equal(cheap.pointwise.weight[:, channel, 0, 0], expected)


def test_highest_energy_counts_all_filters():
    weight = torch.zeros(3, 2, 1, 3)
    weight[:, 0, 0] = torch.tensor([[5.0, 0, 4], [0, 0, 4], [0, 0, 4]])
    weight[:, 1, 0] = torch.tensor([[0.0, -9, 1], [0, 0, 1], [0, 0, 1]])
    assert highest_energy_taps(weight).tolist() == [2, 1]


def test_one_hot_kernel_is_one_at_the_tap():
    assert one_hot_kernel(torch.tensor([1, 5]), 2, 3).tolist() == [
        [[[0, 1, 0], [0, 0, 0]]],
        [[[0, 0, 0], [0, 0, 1]]],
    ]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    batch=st.sampled_from([(), (1,), (3,), (2, 3)]),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 14),
    seed=st.integers(0, 2**31),
)
def test_low_rank_is_the_truncated_svd(batch, rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(*batch, rows, columns, generator=generator, dtype=torch.float64)
    left, right = low_rank(matrices, rank)
    assert left.shape == (*batch, rows, rank)
    assert right.shape == (*batch, rank, columns)
    u, values, vt = torch.linalg.svd(matrices, full_matrices=False)
    kept = min(rank, rows, columns)
    best = u[..., :kept] @ torch.diag_embed(values[..., :kept]) @ vt[..., :kept, :]
    lost = values[..., kept:].square().sum(-1)
    torch.testing.assert_close((matrices - left @ right).square().sum((-2, -1)), lost, rtol=1e-7, atol=1e-18)
    gaps = values[..., kept - 1] - values[..., kept] if kept < values.shape[-1] else None
    if gaps is None or gaps.min() > 1e-2:  # otherwise the best approximation is hardly unique
        torch.testing.assert_close(left @ right, best)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 5)])
def test_singular_values_are_split_evenly(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = low_rank(matrices, 3)
    values = torch.linalg.svdvals(matrices)[..., :3]
    torch.testing.assert_close(left.norm(dim=-2), values.sqrt())
    torch.testing.assert_close(right.norm(dim=-1), values.sqrt())


@pytest.mark.parametrize("shape", [(2, 5), (5, 2)])
def test_spare_components_add_nothing_and_can_learn(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left, right = low_rank(matrix, 4)
    assert not left[:, 2:].any()
    assert right[2:].norm(dim=-1).min() > 0.1
    torch.testing.assert_close(left @ right, matrix)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 3, 3)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_zero_matrices_give_a_zero_product_that_can_learn(shape, rank):
    left, right = low_rank(torch.zeros(shape), rank)
    assert not (left @ right).any()
    assert_alive(left, right)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("rank", [4, 6, 8, 20])
def test_components_beyond_the_rank_can_learn(shape, rank):
    generator = torch.Generator().manual_seed(6)
    thin = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((shape[0], 2), (2, shape[1]))]
    matrix = thin[0] @ thin[1]
    left, right = low_rank(matrix, rank)
    torch.testing.assert_close(left @ right, matrix)
    assert_alive(left, right)


def assert_alive(left, right):
    """A component whose factors are both next to zero gets next to no gradient, and stays dead."""
    assert torch.maximum(left.norm(dim=-2), right.norm(dim=-1)).min() > 0.5


def test_a_zero_matrix_in_a_batch_spoils_no_other():
    matrices = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrices[0] = 0
    left, right = low_rank(matrices, 3)
    torch.testing.assert_close(left @ right, matrices)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_low_rank_does_not_care_about_scale(scale):
    matrix = torch.randn(5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    left, right = low_rank(matrix * scale, 4)
    torch.testing.assert_close(left @ right / scale, matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_rank_gives_back_the_dtype(dtype):
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(5)).to(dtype)
    left, right = low_rank(matrix, 5)
    assert left.dtype == right.dtype == dtype
    # the factors are rounded once each, so that the product is off by a few units in their last place
    product, unit = left.double() @ right.double(), torch.finfo(dtype).eps
    assert (product - matrix.double()).abs().max() <= 8 * unit * matrix.double().norm()


def test_rank_one_is_an_outer_product():
    left, right = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 0, 1], [2, 2, 2]])
    matrices = left[..., :, None] * right[..., None, :]
    got_left, got_right = rank_one(matrices)
    assert got_left.shape == left.shape
    assert got_right.shape == right.shape
    torch.testing.assert_close(got_left[..., :, None] * got_right[..., None, :], matrices)


def test_a_kernel_of_zeros_gives_an_op_of_zeros_that_can_learn():
    for name in ops.names():
        donor = make_donor(ConvSpec(4, 4, (3, 3), padding=(1, 1), bias=False))
        torch.nn.init.zeros_(donor.weight)
        cheap = ops.get(name).from_conv(donor)
        assert not cheap.as_dense().any()
        cheap(torch.randn(1, 4, 5, 5, dtype=torch.float64)).sum().backward()
        assert any(parameter.grad.any() for parameter in cheap.parameters())


# --- numbers that no kernel is closest to


@pytest.mark.parametrize("name", ops.names())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_that_is_not_finite_is_refused_in_one_line(name, bad, dtype):
    donor = make_donor(ConvSpec(6, 8, (3, 3))).to(dtype)
    with torch.no_grad():
        donor.weight[3, 2, 1, 1] = bad
    with pytest.raises(UnsupportedConvError, match=r"its weight holds NaN or infinite numbers.*keep this") as caught:
        ops.get(name).from_conv(donor)
    assert "\n" not in str(caught.value)


def test_the_convolution_whose_weight_is_not_finite_is_named():
    model = torch.nn.Sequential(*[make_donor(ConvSpec(8, 8, (3, 3))) for _ in range(3)])
    with torch.no_grad():
        model[1].weight[0] = float("nan")
    with pytest.raises(UnsupportedConvError, match=r"^1: .*its weight holds NaN"):
        rewrite(model, "depthwise")
    assert rewrite(model, "depthwise", keep="1")[1].weight.isnan().any()


def test_taps_that_are_not_chosen_by_the_weight_take_what_stands_there():
    donor = make_donor(ConvSpec(4, 4, (3, 3)))
    with torch.no_grad():
        donor.weight[1, 1] = float("nan")
    kept = ops.get("shift").from_conv(donor, {"assignment": "fixed"}).pointwise.weight
    assert kept.isnan().sum() == 1
    assert kept[1, 1].isnan()


# --- how it is computed


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 40, 9), (7, 9, 40), (3, 20, 20), (300, 4)])
@pytest.mark.parametrize("size", [1, 50, 100, 1000])
def test_blocks_of_any_size_give_the_same(shape, dtype, size, monkeypatch):
    matrices = random(*shape, dtype=dtype)
    for tensor in (matrices, matrices.mT.contiguous().mT, matrices.movedim(0, -1).contiguous().movedim(-1, 0)):
        expected = low_rank(tensor, 3)
        with monkeypatch.context() as patched:
            patched.setattr(_blocks, "BLOCK", size)
            torch.testing.assert_close(low_rank(tensor, 3), expected)


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_taps_do_not_depend_on_blocks(size, monkeypatch):
    weight = random(11, 13, 3, 3, dtype=torch.float32)
    expected = weight.double().square().sum(0).flatten(1).argmax(1)
    monkeypatch.setattr(_blocks, "BLOCK", size)
    assert torch.equal(highest_energy_taps(weight), expected)


@pytest.mark.parametrize("shape", [(5, 30, 9), (5, 9, 30), (64, 7)])
def test_signs_are_settled(shape):
    matrices = random(*shape)
    left, right = low_rank(matrices, 4)
    short = left if shape[-2] < shape[-1] else right.mT
    largest = short.gather(-2, short.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    # whatever sign LAPACK happens to give, and whatever else is in the batch
    mirrored = low_rank(-matrices, 4)
    torch.testing.assert_close(mirrored, (left if short is left else -left, -right if short is left else right))
    if matrices.dim() == 3:
        torch.testing.assert_close(low_rank(matrices[2:3], 4), (left[2:3], right[2:3]))


def test_of_equally_large_entries_the_first_is_positive():
    edge = torch.tensor([[-1.0, 0, 1 + 1e-7], [-2, 0, 2], [-1, 0, 1], [0.5, 0, -0.5]])
    assert rank_one(edge)[1][0] > 0


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_float64_kernels_may_be_larger_than_the_square_root_of_what_float64_holds(scale):
    matrix = random(6, 4, seed=4)
    left, right = low_rank(matrix * scale, 4)
    torch.testing.assert_close(left @ right / scale, matrix)
    weight = random(5, 6, 3, 3)
    assert torch.equal(highest_energy_taps(weight * scale), highest_energy_taps(weight))


def test_small_components_of_a_float32_kernel_survive():
    """In float32 the squares of the small ones would drown in the rounding of the largest."""
    u, v = torch.linalg.qr(random(2, 40, 3)).Q, torch.linalg.qr(random(2, 9, 3, seed=1)).Q
    matrices = (u @ torch.diag(torch.tensor([1, 1e-3, 1e-5], dtype=torch.float64)) @ v.mT).float()
    left, right = low_rank(matrices, 3)
    error = (left.double() @ right.double() - matrices.double()).norm(dim=(-2, -1))
    assert error.max() < 3e-7
    gram = torch.linalg.eigh(matrices.mT @ matrices)[1][..., -3:]
    assert (matrices @ gram @ gram.mT - matrices).norm(dim=(-2, -1)).max() > 3e-6


def test_the_rounding_that_the_user_allows_in_his_network_is_not_allowed_here():
    matrices = random(3, 50, 9, dtype=torch.float32)
    expected = low_rank(matrices, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(low_rank(matrices, 2), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_is_not_touched(dtype):
    matrices = random(3, 50, 9, dtype=dtype)
    before = matrices.clone()
    low_rank(matrices, 12)
    low_rank(matrices.mT * 1e200 if dtype == torch.float64 else matrices.mT, 2)
    assert torch.equal(matrices, before)
    assert matrices._version == 0


class LargestDouble(TorchDispatchMode):
    """Sees how many numbers the largest float64 tensor has that something makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("name", ops.names())
def test_no_float64_copy_of_a_large_kernel_is_made(name, monkeypatch):
    monkeypatch.setattr(_blocks, "BLOCK", 2000)
    # one long axis: a kernel separated along its axes is a matrix with `O` times one and `I` times the other
    donor = make_donor(ConvSpec(64, 64, (1, 9))).float()
    with LargestDouble() as seen:
        cheap = ops.get(name).from_conv(donor)
    # a block, or one matrix of squares where that is more, or all weights of an op that descends
    descends = not cheap.is_exact(cheap.spec, cheap.parse_options(cheap.options))
    assert seen.numbers <= (sum(map(torch.numel, cheap.parameters())) if descends else 64 * 64)
    assert donor.weight.numel() > 8 * 64 * 64


def test_a_float64_copy_would_be_seen():
    with LargestDouble() as seen:
        random(3, 4).float().double()
    assert seen.numbers == 12


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_the_rank_that_keeps_a_share_of_energy_is_the_smallest(share: float) -> None:
    torch.manual_seed(3)
    matrices = torch.randn(5, 7, 4) * torch.tensor([4.0, 2.0, 1.0, 0.1])
    energy = torch.linalg.svdvals(matrices.double()).square().sum(dim=0).cumsum(0)
    rank = rank_keeping(matrices, share)
    assert energy[rank - 1] >= share * energy[-1] * (1 - 1e-9)
    assert rank == 1 or energy[rank - 2] < share * energy[-1]
    assert rank_keeping(matrices.mT, share) == rank


def test_the_rank_of_zeros_and_of_huge_numbers() -> None:
    assert rank_keeping(torch.zeros(2, 3, 4), 0.5) == 1
    assert rank_keeping(torch.diag(torch.tensor([1e200, 1e199], dtype=torch.float64)), 0.9) == 1
    with pytest.raises(UnsupportedConvError, match="NaN"):
        rank_keeping(torch.full((2, 2), torch.nan), 0.5)
