"""Closed forms of the wider family: ranks, mirrors, subspaces, balanced and learned shifts."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

from convsurgeon import ops, plan, rewrite
from convsurgeon.errors import OptionError, UnsupportedConvError
from convsurgeon.factorization import (
    _blocks,
    balanced_taps,
    blueprint_weights,
    closest_hats,
    hat_kernel,
    hat_weights,
    highest_energy_taps,
    rank_keeping,
    subspace_blueprints,
)
from convsurgeon.spec import ConvSpec
from convsurgeon.testing import accepts, laws, make_donor

# those of one rank; those of two are in test_closed_forms_of_ranks
RANKED = [name for name in ops.names() if {"rank", "rank_in"} & set(vars(ops.get(name).parse_options())) == {"rank"}]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def donor_of(spec, seed=0):
    donor = make_donor(spec)
    with torch.no_grad():
        donor.weight.copy_(random(*donor.weight.shape, seed=seed))
    return donor


def error_of(op, weight):
    return (op.as_dense() - weight).square().sum().item()


def tail(matrices, rank):
    return torch.linalg.svdvals(matrices)[..., rank:].square().sum().item()


# --- groups of outputs


@pytest.mark.parametrize("groups", [2, 3, 4, 12])
@pytest.mark.parametrize("in_channels", [2, 5, 30])
def test_pointwise_group_loses_what_the_singular_values_beyond_the_rank_hold(groups, in_channels):
    spec = ConvSpec(in_channels, 12, (3, 2))
    donor = donor_of(spec)
    lost = sum(
        tail(part.transpose(1, 2).reshape(-1, in_channels), 12 // groups)
        for part in donor.weight.detach().flatten(2).split(12 // groups)
    )
    cheap = ops.get("pointwise_group").from_conv(donor, {"groups": groups})
    assert error_of(cheap, donor.weight) == pytest.approx(lost, rel=1e-9, abs=1e-20)


def test_pointwise_group_is_the_mirror_of_group():
    """Inputs and outputs exchanged, one is the other."""
    donor, mirrored = donor_of(ConvSpec(12, 5, (3, 3))), make_donor(ConvSpec(5, 12, (3, 3)))
    mirrored.weight = torch.nn.Parameter(donor.weight.detach().transpose(0, 1).contiguous())
    one = ops.get("group").from_conv(donor, {"groups": 4}).as_dense()
    other = ops.get("pointwise_group").from_conv(mirrored, {"groups": 4}).as_dense()
    torch.testing.assert_close(other.transpose(0, 1), one)


@pytest.mark.parametrize(("channels", "asked", "taken"), [(12, 8, 6), (64, 8, 8), (6, 100, 6), (9, 8, 3)])
def test_pointwise_group_takes_the_largest_divisor(channels, asked, taken):
    op, spec = ops.get("pointwise_group"), ConvSpec(4, channels, (3, 3))
    cheap = op.from_conv(make_donor(spec), {"groups": asked})
    assert (cheap.options["groups"], cheap.spatial.groups) == (taken, taken)


def test_pointwise_group_refuses_to_be_one_group():
    op, spec = ops.get("pointwise_group"), ConvSpec(8, 7, (3, 3))
    assert not accepts(op, spec, {"groups": 6})
    with pytest.raises(UnsupportedConvError, match="no number of groups from 2 to 6 divides 7 output channels"):
        op.from_conv(make_donor(spec), {"groups": 6})
    with pytest.raises(OptionError, match=r"^pointwise_group: option groups must be at least 2, got 1$"):
        op.parse_options({"groups": 1})


# --- ranks


@pytest.mark.parametrize(("name", "axis"), [("depthwise", 1), ("bsconv", 0)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_rank_loses_the_singular_values_beyond_it(name, axis, rank):
    donor = donor_of(ConvSpec(5, 7, (2, 2)))
    cheap = ops.get(name).from_conv(donor, {"rank": rank})
    lost = tail(donor.weight.detach().flatten(2).movedim(axis, 0), rank)
    assert error_of(cheap, donor.weight) == pytest.approx(lost, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("name", ["depthwise", "bsconv"])
@pytest.mark.parametrize("spec", [ConvSpec(3, 8, (3, 3)), ConvSpec(8, 3, (3, 3)), ConvSpec(8, 9, (1, 2))], ids=str)
def test_full_rank_is_the_dense_kernel(name, spec):
    donor = donor_of(spec)
    cheap = ops.get(name).from_conv(donor, {"rank": 1.0})
    assert cheap.options["rank"] == min(spec.taps, spec.out_channels if name == "depthwise" else spec.in_channels)
    torch.testing.assert_close(cheap.as_dense(), donor.weight)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("depthwise", {"spatial.weight": (4, 1, 3, 3), "pointwise.weight": (6, 4, 1, 1), "pointwise.bias": (6,)}),
        ("bsconv", {"point.weight": (6, 4, 1, 1), "blueprint.weight": (6, 1, 3, 3), "blueprint.bias": (6,)}),
        ("shift", {"spatial.weight": (4, 1, 3, 3), "pointwise.weight": (6, 4, 1, 1), "pointwise.bias": (6,)}),
    ],
)
def test_students_that_were_saved_before_there_were_ranks_still_fit(name, shapes):
    state = ops.get(name).from_conv(make_donor(ConvSpec(4, 6, (3, 3)))).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_share_of_energy_takes_the_smallest_rank_that_keeps_it(name, share):
    op, donor = ops.get(name), donor_of(ConvSpec(8, 9, (3, 3)))
    cheap = op.from_conv(donor, {"rank": f"{100 * share:g}%"})
    rank = cheap.options["rank"]
    total = donor.weight.square().sum().item()
    if not op.is_closest(op.parse_options()):  # of what it keeps at full rank
        total -= error_of(op.from_conv(donor, {"rank": 1.0}), donor.weight)

    def kept(rank):
        return (
            donor.weight.square().sum().item() - error_of(op.from_conv(donor, {"rank": rank}), donor.weight)
        ) / total

    assert kept(rank) >= share - 1e-9
    assert rank == 1 or kept(rank - 1) < share or not op.is_closest(op.parse_options())


@pytest.mark.parametrize("name", RANKED)
def test_a_share_of_energy_needs_the_kernel(name):
    op, spec = ops.get(name), ConvSpec(8, 8, (3, 3))
    with pytest.raises(UnsupportedConvError, match="rank=90% is a share of the trained kernel's energy"):
        op.build(spec, {"rank": "90%"})
    with pytest.raises(UnsupportedConvError, match="there are no weights; give a number or a ratio"):
        op.macs(spec, 9, 9, {"rank": "90%"})
    with pytest.raises(OptionError, match=rf"^{name}: option rank must be a number from 1"):
        op.parse_options({"rank": 0})


@pytest.mark.parametrize("name", RANKED)
def test_a_share_of_energy_becomes_a_number_in_the_plan(name):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 32, 3))
    decided = plan(model, name, options={"rank": "20%"}).converted[0]
    assert isinstance(decided.options["rank"], int)
    assert rewrite(model, name, options={"rank": "20%"})[1].options == decided.options


# --- blueprints in a subspace


def kernel_of(subspace_MI, point_OM, blueprint_OK):
    return torch.einsum("om,mi,ok->oik", point_OM, subspace_MI, blueprint_OK)


@pytest.mark.parametrize("shape", [(6, 4, 9), (3, 8, 6), (12, 12, 4)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_for_given_blueprints_the_subspace_is_optimal(shape, rank):
    weight = random(*shape)
    factors = subspace_blueprints(weight, rank, sweeps=0)
    blueprint = factors[2] / factors[2].norm(dim=1, keepdim=True)
    lost = weight.square().sum() - torch.einsum("oik,ok->oi", weight, blueprint).square().sum()
    expected = lost.item() + tail(torch.einsum("oik,ok->oi", weight, blueprint), rank)
    assert (weight - kernel_of(*factors)).square().sum().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(6, 4, 9), (3, 8, 6), (12, 12, 4), (20, 30, 9)])
@pytest.mark.parametrize("rank", [1, 3])
def test_no_sweep_gets_farther_from_the_kernel(shape, rank):
    weight = random(*shape, seed=1)
    errors = [
        (weight - kernel_of(*subspace_blueprints(weight, rank, sweeps=sweeps))).square().sum().item()
        for sweeps in range(8)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_what_a_subspace_can_hold_is_reproduced():
    weight = kernel_of(random(3, 8), random(6, 3), random(6, 9, seed=2))
    torch.testing.assert_close(kernel_of(*subspace_blueprints(weight, 3)), weight)


def test_the_whole_space_is_bsconv():
    donor = donor_of(ConvSpec(5, 7, (3, 3)))
    expected = ops.get("bsconv").from_conv(donor).as_dense()
    torch.testing.assert_close(ops.get("bsconv_s").from_conv(donor, {"rank": 5}).as_dense(), expected)


def test_factors_of_a_subspace_are_of_like_size():
    weight = 1e6 * random(16, 12, 9)
    subspace, point, blueprint = subspace_blueprints(weight, 4)
    torch.testing.assert_close(blueprint.norm(dim=1), (point @ subspace).norm(dim=1))
    torch.testing.assert_close(subspace.norm(dim=1), point.norm(dim=0))


def test_filters_of_zeros_in_a_subspace_can_learn():
    weight = random(5, 4, 9)
    weight[2] = 0
    subspace, point, blueprint = subspace_blueprints(weight, 2)
    assert not kernel_of(subspace, point, blueprint)[2].any()
    assert blueprint[2].norm() > 0.5


# --- shifts


@pytest.mark.parametrize("copies", [1, 2, 3, 4])
def test_no_other_taps_of_an_expansion_are_closer(copies):
    donor = donor_of(ConvSpec(3, 4, (2, 2)))
    energy = donor.weight.detach().square().sum(0).flatten(1)
    choices = list(itertools.combinations(range(4), copies))
    best = sum(max(row[list(choice)].sum().item() for choice in choices) for row in energy)
    cheap = ops.get("shift").from_conv(donor, {"expansion": copies})
    assert error_of(cheap, donor.weight) == pytest.approx(energy.sum().item() - best, rel=1e-9, abs=1e-18)
    assert highest_energy_taps(donor.weight, copies).view(3, -1)[:, 0].tolist() == energy.argmax(1).tolist()


@pytest.mark.parametrize(
    ("channels", "kernel", "copies"), [(4, (2, 2), 1), (5, (1, 3), 1), (3, (2, 2), 2), (4, (1, 3), 2)]
)
@pytest.mark.parametrize("seed", range(5))
def test_no_other_balanced_taps_are_closer(channels, kernel, copies, seed):
    donor = donor_of(ConvSpec(channels, 4, kernel), seed)
    positions = kernel[0] * kernel[1]
    energy = donor.weight.detach().square().sum(0).flatten(1)
    fewest, most = channels * copies // positions, -(-channels * copies // positions)
    best = 0.0
    for taken in itertools.product(itertools.combinations(range(positions), copies), repeat=channels):
        counts = [sum(tap in choice for choice in taken) for tap in range(positions)]
        if min(counts) >= fewest and max(counts) <= most:
            best = max(best, sum(energy[i, list(choice)].sum().item() for i, choice in enumerate(taken)))
    cheap = ops.get("shift").from_conv(donor, {"assignment": "balanced", "expansion": copies})
    assert error_of(cheap, donor.weight) == pytest.approx(energy.sum().item() - best, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("channels", [9, 36, 90])
def test_balanced_taps_are_those_of_the_hungarian_method(channels):
    weight = random(6, channels, 3, 3, seed=channels)
    energy = weight.square().sum(0).flatten(1)
    seats = energy.repeat_interleave(channels // 9, dim=1)
    rows, columns = linear_sum_assignment(seats.numpy(), maximize=True)
    taps = balanced_taps(weight)
    assert taps.bincount(minlength=9).tolist() == [channels // 9] * 9
    assert energy.gather(1, taps[:, None]).sum().item() == pytest.approx(seats.numpy()[rows, columns].sum(), rel=1e-12)


@pytest.mark.parametrize("copies", [1, 2, 5, 9])
@pytest.mark.parametrize("channels", [1, 4, 20])
@pytest.mark.parametrize("assignment", ["balanced", "fixed", "energy"])
def test_copies_of_a_channel_have_taps_of_their_own(assignment, channels, copies):
    options = {"assignment": assignment, "expansion": copies}
    op, spec = ops.get("shift"), ConvSpec(channels, 3, (3, 3))
    for cheap in (op.build(spec, options), op.from_conv(donor_of(spec), options)):
        taps = cheap.taps.view(channels, copies)
        assert all(len(set(row)) == copies for row in taps.tolist())
        counts = taps.flatten().bincount(minlength=9)
        assert assignment != "balanced" or counts.max() - counts.min() <= 1


def test_an_expansion_is_at_most_the_taps():
    cheap = ops.get("shift").from_conv(donor_of(ConvSpec(4, 6, (1, 3))), {"expansion": 7})
    assert cheap.options["expansion"] == 3
    torch.testing.assert_close(cheap.as_dense(), donor_of(ConvSpec(4, 6, (1, 3))).weight)
    with pytest.raises(OptionError, match=r"^shift: option expansion must be at least 1, got 0$"):
        ops.get("shift").parse_options({"expansion": 0})


# --- learned shifts


def grid_of_hats(height, width, steps=80):
    rows = torch.linspace(0, height - 1, (height - 1) * steps + 1, dtype=torch.float64)
    columns = torch.linspace(0, width - 1, (width - 1) * steps + 1, dtype=torch.float64)
    return hat_kernel(torch.cartesian_prod(rows, columns), height, width).flatten(1)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (4, 1), (2, 2), (4, 5)])
@pytest.mark.parametrize("filters", [1, 2, 20])
def test_no_hat_on_a_fine_grid_is_closer(kernel, filters):
    weight = random(filters, 30, *kernel) + 0.3  # neighbours resemble one another, as in trained kernels
    hats_GK = grid_of_hats(*kernel)
    kept_GI = (weight.flatten(2) @ hats_GK.mT).square().sum(0).mT / hats_GK.square().sum(1, keepdim=True)
    chosen = hat_kernel(closest_hats(weight), *kernel)[:, 0]
    dense = hat_weights(weight, chosen)[:, :, None, None] * chosen
    lost_I = (weight - dense).square().sum((0, 2, 3))
    assert (weight.square().sum((0, 2, 3)) - lost_I >= kept_GI.max(0).values * (1 - 1e-12)).all()


@pytest.mark.parametrize("kernel", [(3, 3), (1, 5), (4, 1), (2, 2), (5, 5)])
def test_a_hat_anywhere_is_found_again(kernel):
    limits = torch.tensor(kernel, dtype=torch.float64) - 1
    position = torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * limits
    weight = random(3, 200, 1, 1) * hat_kernel(position, *kernel)[None, :, 0]
    torch.testing.assert_close(closest_hats(weight), position)


def test_learned_offsets_keep_more_than_the_best_taps():
    donor = donor_of(ConvSpec(16, 8, (3, 3)))
    learned = ops.get("shift").from_conv(donor, {"assignment": "learned"})
    assert error_of(learned, donor.weight) < error_of(ops.get("shift").from_conv(donor), donor.weight)
    assert learned.spatial.offset.abs().max() <= 1


@pytest.mark.parametrize("place", [0.0, 1.0, 2.0, 0.3, 1.9, -0.2, 2.2])
def test_an_offset_is_alive_wherever_it_is(place):
    """At whole taps, at the edge of the window and beyond it, too."""
    op = ops.get("shift").build(ConvSpec(1, 1, (1, 3), bias=False), {"assignment": "learned"}, dtype=torch.float64)
    with torch.no_grad():
        op.spatial.offset[0, 1] = place - 1
    kernel = op.spatial.weight.flatten()
    assert kernel.sum().item() == pytest.approx(1)
    assert (kernel >= 0).all()
    (kernel @ torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)).backward()
    assert op.spatial.offset.grad[0, 1] != 0


def test_an_offset_far_outside_stays_in_the_window():
    op = ops.get("shift").build(ConvSpec(2, 1, (3, 5)), {"assignment": "learned"})
    with torch.no_grad():
        op.spatial.offset.copy_(torch.tensor([[9.0, -50.0], [-7.0, 30.0]]))
    assert op.spatial.position.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert op.spatial.weight.flatten(1).sum(1).tolist() == [1.0, 1.0]


def test_a_learned_offset_finds_the_shift_that_made_the_data():
    generator = torch.Generator().manual_seed(0)
    target = ops.get("shift").build(ConvSpec(1, 1, (3, 3), bias=False), {"assignment": "learned"}, dtype=torch.float64)
    op = ops.get("shift").build(target.spec, target.options, dtype=torch.float64)
    with torch.no_grad():
        target.pointwise.weight.fill_(1)
        op.pointwise.weight.fill_(0.8)
        target.spatial.place(torch.tensor([[0.0, 2.0]]))
        op.spatial.place(torch.tensor([[1.0, 1.0]]))
    optimizer = torch.optim.SGD(op.parameters(), lr=0.1)
    for _ in range(300):
        noise = torch.randn(8, 1, 12, 12, generator=generator, dtype=torch.float64)
        image = 3 * torch.nn.functional.avg_pool2d(noise, 4, stride=1)  # smooth, as pictures are
        optimizer.zero_grad()
        (op(image) - target(image).detach()).square().mean().backward()
        optimizer.step()
    assert op.taps.tolist() == [2]
    moved = op.round_taps()
    assert moved.abs().max() < 0.1
    torch.testing.assert_close(op.spatial.weight, target.spatial.weight)


def test_rounding_goes_to_the_nearest_tap_and_freezes():
    cheap = ops.get("shift").from_conv(donor_of(ConvSpec(9, 4, (3, 3))), {"assignment": "learned"})
    before, point = cheap.spatial.position.detach().clone(), cheap.pointwise.weight.clone()
    moved = cheap.round_taps()
    assert torch.equal(cheap.spatial.position, before.round())
    torch.testing.assert_close(moved, before.round() - before)
    assert torch.equal(cheap.pointwise.weight, point)
    assert not cheap.spatial.offset.requires_grad
    assert set(cheap.spatial.weight.unique().tolist()) == {0.0, 1.0}
    assert not cheap.round_taps().any()


@pytest.mark.parametrize("assignment", ["energy", "fixed", "balanced"])
def test_whole_taps_need_no_rounding(assignment):
    cheap = ops.get("shift").from_conv(donor_of(ConvSpec(4, 4, (3, 3))), {"assignment": assignment, "expansion": 2})
    assert not cheap.round_taps().any()
    assert cheap.freeze_for_export() is None


def test_learned_offsets_of_copies_are_refused():
    op, spec = ops.get("shift"), ConvSpec(4, 4, (3, 3))
    options = op.parse_options({"assignment": "learned", "expansion": 2})
    assert op.why_not(spec, options) == "assignment=learned takes expansion=1, not 2"


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("law", ["law_export", "law_onnx", "law_fx"])
def test_learned_offsets_export(law, mode):
    spec = ConvSpec(4, 3, (3, 4), stride=(1, 2), padding=(2, 1), dilation=(1, 2), padding_mode=mode)
    laws()[law](ops.get("shift"), spec, {"assignment": "learned"})


# --- how it is computed


@pytest.mark.parametrize("size", [1, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_any_size_give_the_same(size, dtype, monkeypatch):
    weight = random(11, 7, 3, 3).to(dtype)

    def everything():
        factors = subspace_blueprints(weight.flatten(2), 3, sweeps=3)
        return kernel_of(*factors), closest_hats(weight), balanced_taps(weight), highest_energy_taps(weight, 2)

    expected = everything()
    monkeypatch.setattr(_blocks, "BLOCK", size)
    torch.testing.assert_close(everything(), expected)


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e20, 1e200])
def test_scale_does_not_matter(scale):
    weight = random(5, 6, 3, 3)
    assert torch.equal(balanced_taps(weight * scale), balanced_taps(weight))
    torch.testing.assert_close(closest_hats(weight * scale), closest_hats(weight))
    expected = kernel_of(*subspace_blueprints(weight.flatten(2), 2))
    torch.testing.assert_close(kernel_of(*subspace_blueprints(weight.flatten(2) * scale, 2)) / scale, expected)


class LargestDouble(TorchDispatchMode):
    """Sees how many numbers the largest float64 tensor has that something makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shift", {"assignment": "learned"}),
        ("shift", {"assignment": "balanced", "expansion": 2}),
        ("depthwise", {"rank": 4}),
        ("bsconv", {"rank": "80%"}),
        ("bsconv_s", {"rank": "50%"}),
    ],
)
def test_no_float64_copy_of_a_large_kernel_is_made(name, options, monkeypatch):
    monkeypatch.setattr(_blocks, "BLOCK", 2000)
    donor = make_donor(ConvSpec(64, 64, (3, 3))).float()
    with LargestDouble() as seen:
        ops.get(name).from_conv(donor, options)
    assert 0 < seen.numbers <= 64 * 64 < donor.weight.numel() / 8


def test_the_weights_of_blueprints_keep_what_bsconv_keeps():
    donor = donor_of(ConvSpec(5, 7, (3, 3)))
    kept = donor.weight.square().sum().item() - error_of(ops.get("bsconv").from_conv(donor), donor.weight)
    weights = blueprint_weights(donor.weight.detach().flatten(2))
    assert weights.square().sum().item() == pytest.approx(kept, rel=1e-9)
    assert rank_keeping(weights, 1.0) == 5
