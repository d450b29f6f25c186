"""The closed forms of low-rank, separated, heterogeneous and partial kernels are optima, and shares of energy hold."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from convsurgeon import ops
from convsurgeon.errors import OptionError, UnsupportedConvError
from convsurgeon.factorization import (
    _blocks,
    _polyadic,
    _tucker,
    full_rank,
    keep_groups_and_center,
    low_rank_and_center,
    polyadic,
    terms_keeping,
    tucker,
)
from convsurgeon.ops._center import CenterView, at_center
from convsurgeon.spec import ConvSpec
from convsurgeon.testing import input_size, make_donor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def donor_of(spec: ConvSpec, seed: int = 0) -> nn.Conv2d:
    donor = make_donor(spec)
    weight = random(*donor.weight.shape, seed=seed)
    donor.weight = nn.Parameter(weight)
    return donor


def lost(name: str, spec: ConvSpec, **options: object) -> float:
    donor = donor_of(spec)
    dense = ops.get(name).from_conv(donor, options).as_dense()
    return (dense - donor.weight).square().sum().item()


def beyond(matrix: Tensor, rank: int) -> float:
    return torch.linalg.svdvals(matrix)[rank:].square().sum().item()


# --- ranks


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("rank", [1, 2, 5, 30])
def test_lowrank_loses_the_singular_values_beyond_the_rank(kernel: tuple[int, int], rank: int) -> None:
    spec = ConvSpec(4, 7, kernel)
    expected = beyond(donor_of(spec).weight.detach().flatten(1), rank)
    assert lost("lowrank", spec, rank=rank) == pytest.approx(expected, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 4), (5, 2)])
@pytest.mark.parametrize("rank", [1, 3, 8, 40])
def test_spatial_svd_loses_the_singular_values_beyond_the_rank(kernel: tuple[int, int], rank: int) -> None:
    spec = ConvSpec(4, 6, kernel)
    weight = donor_of(spec).weight.detach()
    matrix = torch.stack([weight[:, i, y].reshape(-1) for i in range(4) for y in range(kernel[0])])
    assert lost("spatial_svd", spec, rank=rank) == pytest.approx(beyond(matrix, rank), rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("name", ["cp", "lowrank", "spatial_svd", "tucker"])
@pytest.mark.parametrize("share", [30, 60.5, 90, 100])
def test_a_share_of_energy_is_kept(name: str, share: float) -> None:
    spec, op = ConvSpec(8, 6, (3, 3)), ops.get(name)
    donor = donor_of(spec)
    cheap = op.from_conv(donor, {"rank": f"{share}%"})
    kept = 1 - (cheap.as_dense() - donor.weight).square().sum() / donor.weight.square().sum()
    assert kept >= share / 100 - 1e-9
    assert op.depends_on_weight(op.parse_options({"rank": f"{share}%"}))
    if op.is_closest(op.parse_options()):  # and one component less would keep less
        rank = cheap.options["rank"]
        assert rank == 1 or 1 - lost(name, spec, rank=rank - 1) / donor.weight.square().sum() < share / 100


@pytest.mark.parametrize("name", ["cp", "lowrank", "spatial_svd", "tucker"])
def test_a_share_of_energy_needs_weights(name: str) -> None:
    op, spec = ops.get(name), ConvSpec(8, 6, (3, 3))
    reason = "rank=90% is a share of the trained kernel's energy, and there are no weights; give a number or a ratio"
    assert op.why_not(spec, op.parse_options({"rank": "90%"})) == reason
    with pytest.raises(UnsupportedConvError, match="there are no weights"):
        op.build(spec, {"rank": "90%"})
    with pytest.raises(UnsupportedConvError, match="there are no weights"):
        op.macs(spec, 9, 9, {"rank": "90%"})


@pytest.mark.parametrize("name", ["cp", "lowrank", "spatial_svd", "tucker"])
@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, "0%", "101%", "many"])
def test_what_is_no_rank_is_refused(name: str, rank: object) -> None:
    with pytest.raises(OptionError, match=f"^{name}: option rank must be a number from 1, a share"):
        ops.get(name).parse_options({"rank": rank})


def test_ranks_of_tucker_side_by_side() -> None:
    op, spec = ops.get("tucker"), ConvSpec(8, 20, (3, 3))

    def fitted(**options: object) -> tuple[object, object]:
        found = op.fit_options(spec, op.parse_options(options))
        return found.rank_in, found.rank_out

    assert fitted() == (3, 8)
    assert fitted(rank=0.5) == (4, 10)
    assert fitted(rank=5) == (5, 5)
    assert fitted(rank=5, rank_out=0.25) == (5, 5)
    assert fitted(rank_in="2", rank_out="12") == (2, 12)
    assert fitted(rank_in=1, rank_out=20) == (1, 9)  # nine positions of one channel carry no more
    assert fitted(rank=100) == (8, 20)
    cheap = op.from_conv(donor_of(spec), {"rank_in": "80%", "rank_out": 6})
    assert (cheap.options["rank_out"], cheap.core.out_channels) == (6, 6)
    assert 1 <= cheap.options["rank_in"] < 8


# --- Tucker


def product(out: Tensor, core: Tensor, into: Tensor) -> Tensor:
    return torch.einsum("ob,bak,ai->oik", out, core, into)


@pytest.mark.parametrize(("rank_in", "rank_out"), [(1, 1), (2, 3), (4, 5), (1, 5), (4, 1)])
def test_tucker_meets_a_kernel_of_its_ranks(rank_in: int, rank_out: int) -> None:
    kernel = product(random(5, rank_out), random(rank_out, rank_in, 6, seed=1), random(rank_in, 4, seed=2))
    torch.testing.assert_close(product(*tucker(kernel, rank_in, rank_out)), kernel)


def alternate(kernel: Tensor, rank_in: int, rank_out: int, seed: int) -> float:
    """Return what alternating least squares loses from a random start: each factor in turn, by `lstsq`."""
    out, into = random(kernel.shape[0], rank_out, seed=seed), random(rank_in, kernel.shape[1], seed=seed + 99)
    for _ in range(400):
        both = torch.kron(out, into.T.contiguous())
        core = torch.linalg.lstsq(both, kernel.flatten(0, 1)).solution.view(rank_out, rank_in, -1)
        inner = torch.einsum("bak,ai->bik", core, into).flatten(1)
        out = torch.linalg.lstsq(inner.T, kernel.flatten(1).T).solution.T
        inner = torch.einsum("ob,bak->aok", out, core).flatten(1)
        into = torch.linalg.lstsq(inner.T, kernel.transpose(0, 1).flatten(1).T).solution
    return (kernel - product(out, core, into)).square().sum().item()


def test_tucker_against_alternating_least_squares() -> None:
    ratios = []
    for seed, ranks in itertools.product(range(3), [(1, 1), (2, 2), (3, 2), (2, 4)]):
        kernel = random(6, 5, 4, seed=seed)
        mine = (kernel - product(*tucker(kernel, *ranks))).square().sum().item()
        ratios.append(mine / min(alternate(kernel, *ranks, start) for start in range(3)))
    assert max(ratios) < 1.05
    # noise has several local optima close to one another; the start decides in which one it ends
    assert sorted(ratios)[len(ratios) * 3 // 4] < 1 + 1e-6


def test_tucker_is_no_worse_than_the_truncated_higher_order_svd() -> None:
    for seed in range(10):
        kernel = random(7, 6, 9, seed=seed)
        into = torch.linalg.svd(kernel.transpose(0, 1).flatten(1))[0][:, :2]
        out = torch.linalg.svd(kernel.flatten(1))[0][:, :3]
        truncated = torch.einsum("ob,pb,pjk,ja,ia->oik", out, out, kernel, into, into)
        mine = product(*tucker(kernel, 2, 3))
        assert (kernel - mine).norm() <= (kernel - truncated).norm()


def test_tucker_never_gets_worse_from_sweep_to_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = random(12, 10, 9)
    errors = []
    for sweeps in range(1, 12):
        monkeypatch.setattr(_tucker, "_WORK", sweeps * 2 * kernel.numel() * 9)
        errors.append((kernel - product(*tucker(kernel, 4, 5))).square().sum().item())
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_tucker_splits_evenly_at_every_scale_and_gives_back_the_dtype(dtype: torch.dtype, scale: float) -> None:
    kernel = (random(6, 5, 9) * scale).to(dtype)
    factors = tucker(kernel, 3, 4)
    assert {factor.dtype for factor in factors} == {dtype}
    sizes = [float(factor.double().norm()) for factor in factors]
    assert max(sizes) < 2 * min(sizes)
    expected = product(*tucker(kernel.double(), 3, 4))
    tolerance = 20 * torch.finfo(dtype).eps * expected.norm()
    assert (product(*(factor.double() for factor in factors)) - expected).norm() <= tolerance


def test_tucker_of_zeros_and_of_less_than_its_ranks_can_learn() -> None:
    for kernel in (torch.zeros(4, 5, 3), product(random(4, 1), random(1, 1, 3), random(1, 5))):
        out, core, into = tucker(kernel, 3, 2)
        torch.testing.assert_close(product(out, core, into), kernel)
        assert min(out.norm(dim=0).min(), into.norm(dim=1).min()) > 0.1


# --- sums of outer products


def summed(out: Tensor, into: Tensor, position: Tensor) -> Tensor:
    return torch.einsum("or,ir,kr->oik", out, into, position)


def share_lost(kernel: Tensor, rank: int) -> float:
    return float((kernel - summed(*polyadic(kernel, rank))).square().sum() / kernel.square().sum())


@pytest.mark.parametrize(
    ("sides", "rank"), [((6, 5, 4), 1), ((6, 5, 4), 5), ((8, 9, 9), 8), ((8, 9, 2), 6), ((40, 30, 9), 25)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_polyadic_finds_a_kernel_of_so_few_terms(sides: tuple[int, int, int], rank: int, dtype: torch.dtype) -> None:
    factors = [random(side, rank, seed=seed) for seed, side in enumerate(sides)]
    kernel = summed(*factors).to(dtype)
    found = polyadic(kernel, rank)
    torch.testing.assert_close(summed(*found), kernel)
    # term by term, in another order: the decomposition is unique (Kruskal, 1977)
    expected, mine = (
        torch.einsum("or,ir,kr->roik", *factors).flatten(1),
        torch.einsum("or,ir,kr->roik", *found).flatten(1),
    )
    apart = torch.cdist(mine.double(), expected)
    assert sorted(apart.argmin(dim=1).tolist()) == list(range(rank))
    assert apart.amin(dim=1).max() < max(1e-9, 100 * torch.finfo(dtype).eps) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [64, 60, 70, 200])
def test_polyadic_finds_most_of_a_rounded_kernel_of_as_many_terms_or_fewer(rank: int, dtype: torch.dtype) -> None:
    kernel = summed(*(random(side, 60, seed=seed) for seed, side in enumerate((64, 64, 9)))).to(dtype)
    assert share_lost(kernel, rank) < 1e-9
    assert terms_keeping(kernel, 0.999999) <= 60


@pytest.mark.parametrize("sides", [(6, 5, 4), (2, 5, 9), (9, 2, 4), (8, 8, 3)])
@pytest.mark.parametrize("more", [0, 3])
def test_polyadic_meets_every_kernel_at_full_rank(sides: tuple[int, int, int], more: int) -> None:
    kernel = random(*sides)
    found = polyadic(kernel, full_rank(*sides) + more)
    torch.testing.assert_close(summed(*found), kernel)
    # what is zero in one vector is not in the two others, so that it can learn
    alive = sum((factor.norm(dim=0) > 0.1).int() for factor in found)
    assert alive.min() >= 2


def alternate_terms(kernel: Tensor, rank: int, seed: int) -> float:
    """Return what alternating least squares loses from a random start: each factor in turn, by `lstsq`."""
    factors = [random(side, rank, seed=10 * seed + axis) for axis, side in enumerate(kernel.shape)]
    for _ in range(400):
        for axis in range(3):
            one, other = (factors[i] for i in range(3) if i != axis)
            pairs = torch.einsum("ar,br->abr", one, other).flatten(0, 1)
            factors[axis] = torch.linalg.lstsq(pairs, kernel.movedim(axis, 0).flatten(1).T, driver="gelsd").solution.T
    return float((kernel - summed(*factors)).square().sum() / kernel.square().sum())


def test_polyadic_against_alternating_least_squares() -> None:
    behind = []
    for seed, rank in itertools.product(range(3), [1, 2, 4, 8]):
        kernel = random(6, 5, 4, seed=seed)
        best = min(alternate_terms(kernel, rank, start) for start in range(4))
        behind.append(share_lost(kernel, rank) - best)
    # noise has many local optima; the start decides in which one it ends
    assert max(behind) < 0.05
    assert sorted(behind)[len(behind) // 2] < 0.01


def test_polyadic_never_gets_worse_from_sweep_to_sweep_and_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = random(12, 10, 9)
    lost = []
    for sweeps, steps in [(2, 0), (3, 0), (4, 0), (8, 0), (16, 0), (16, 5), (16, 20), (16, 60)]:
        monkeypatch.setattr(_polyadic, "_SWEEPS", sweeps)
        monkeypatch.setattr(_polyadic, "_STEPS", steps)
        lost.append(share_lost(kernel, 14))
    assert all(after <= before for before, after in itertools.pairwise(lost))
    assert lost[-1] < lost[4] < lost[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_polyadic_splits_evenly_at_every_scale_and_gives_back_the_dtype(dtype: torch.dtype, scale: float) -> None:
    kernel = (random(6, 5, 9) * scale).to(dtype)
    factors = polyadic(kernel, 7)
    assert {factor.dtype for factor in factors} == {dtype}
    out, into, position = (factor.double().norm(dim=0) for factor in factors)
    torch.testing.assert_close(out, into, rtol=0.01, atol=0)
    torch.testing.assert_close(out, position, rtol=0.01, atol=0)
    kept = 1 - (summed(*(factor.double() for factor in factors)) - kernel.double()).square().sum() / (
        kernel.double().square().sum()
    )
    assert float(kept) == pytest.approx(1 - share_lost(random(6, 5, 9), 7), abs=0.02)


def test_polyadic_of_zeros_and_of_less_than_its_rank_can_learn() -> None:
    for kernel in (torch.zeros(4, 5, 3), summed(random(4, 1), random(5, 1), random(3, 1))):
        out, into, position = polyadic(kernel, 3)
        torch.testing.assert_close(summed(out, into, position), kernel)
        assert min(into.norm(dim=0).min(), position.norm(dim=0).min()) > 0.1


def test_polyadic_keeps_two_vectors_of_a_faint_term_large() -> None:
    faint = torch.tensor([1, 1e-7], dtype=torch.float64)
    kernel = summed(random(5, 2) * faint, random(4, 2, seed=1), random(3, 2, seed=2))
    out, into, position = polyadic(kernel, 2)
    torch.testing.assert_close(summed(out, into, position), kernel, rtol=0, atol=1e-9)
    assert 0 < out.norm(dim=0).min() < 1e-4
    assert min(into.norm(dim=0).min(), position.norm(dim=0).min()) > 0.1


@pytest.mark.parametrize("size", [7, 40, 300])
def test_polyadic_does_not_depend_on_the_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, terms = random(8, 7, 9), [random(side, 6, seed=seed) for seed, side in enumerate((8, 7, 9))]
    whole, few = share_lost(kernel, 10), summed(*terms)
    monkeypatch.setattr(_blocks, "BLOCK", size)
    assert share_lost(kernel, 10) == pytest.approx(whole, rel=0.03)
    torch.testing.assert_close(summed(*polyadic(few, 6)), few)


def test_terms_keeping_a_share_keep_it() -> None:
    kernel = random(7, 6, 9)
    for share in (0.1, 0.5, 0.9, 0.99):
        rank = terms_keeping(kernel, share)
        assert share_lost(kernel, rank) <= 1 - share + 1e-9
        assert share_lost(kernel, max(1, rank - 3)) > 1 - share or rank == 1
    assert terms_keeping(kernel, 1.0) == full_rank(7, 6, 9)
    assert terms_keeping(torch.zeros(7, 6, 9), 0.9) == 1


def test_polyadic_draws_from_nobodys_generator() -> None:
    before = torch.get_rng_state()
    first = polyadic(random(8, 7, 9), 12)
    torch.rand(3)
    torch.set_rng_state(before)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, polyadic(random(8, 7, 9), 12)))
    assert torch.equal(torch.get_rng_state(), before)


def test_polyadic_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        polyadic(random(4, 3, 2), 2)
        assert torch.get_num_threads() == 3
        with pytest.raises(UnsupportedConvError, match="NaN"):
            polyadic(random(4, 3, 2) * torch.nan, 2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_shares_of_cp_come_to_multiples_of_four_and_numbers_stay() -> None:
    op, spec = ops.get("cp"), ConvSpec(16, 24, (3, 3))  # of full rank 144
    donor = donor_of(spec)

    def rank(asked: object) -> int:
        return op.from_conv(donor, {"rank": asked}).spatial.out_channels

    assert (rank(0.1), rank(0.05), rank(0.001), rank(1.0)) == (16, 8, 4, 144)
    assert (rank(7), rank(13), rank(900)) == (7, 13, 144)
    share = rank("40%")
    assert share % 4 == 0
    assert share - 4 < terms_keeping(donor.weight.detach().flatten(2), 0.4) <= share
    few = make_donor(ConvSpec(1, 7, (3, 3)))  # of full rank 7, which is no multiple
    assert [op.from_conv(few, {"rank": asked}).spatial.out_channels for asked in (0.5, 0.7, 1.0)] == [4, 7, 7]


# --- kernels of which some weights are kept and some are not


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 3)])
@pytest.mark.parametrize("groups", [2, 3, 6])
def test_hetconv_loses_the_weights_that_have_no_place(kernel: tuple[int, int], groups: int) -> None:
    spec = ConvSpec(6, 12, kernel)
    weight = donor_of(spec).weight.detach()
    row, column = (kernel[0] - 1) // 2, (kernel[1] - 1) // 2
    expected = torch.zeros_like(weight)
    for o, i in itertools.product(range(12), range(6)):
        if o * groups // 12 == i * groups // 6:
            expected[o, i] = weight[o, i]
        else:
            expected[o, i, row, column] = weight[o, i, row, column]
    cheap = ops.get("hetconv").from_conv(donor_of(spec), {"groups": groups})
    assert torch.equal(cheap.as_dense(), expected)
    grouped, point = keep_groups_and_center(weight, groups, (row, column))
    assert grouped.shape == (12, 6 // groups, *kernel)
    assert int((point == 0).sum()) == 12 * 6 // groups


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_partial_loses_singular_values_of_the_first_channels_and_taps_of_the_others(channels: int) -> None:
    spec = ConvSpec(8, 9, (3, 2))
    weight = donor_of(spec).weight.detach()
    others = weight[:, channels:].clone()
    others[:, :, 1, 0] = 0
    expected = beyond(weight[:, :channels].flatten(1), channels) + others.square().sum().item()
    assert lost("partial", spec, share=8 // channels) == pytest.approx(expected, rel=1e-9)
    spatial, point = low_rank_and_center(weight, channels, (1, 0))
    assert spatial.shape == (channels, channels, 3, 2)
    assert torch.equal(point[:, channels:], weight[:, channels:, 1, 0])


@pytest.mark.parametrize("ratio", [2, 3, 6])
def test_ghost_loses_all_but_the_first_singular_value_of_neighbors(ratio: int) -> None:
    spec = ConvSpec(5, 6, (3, 3))
    weight = donor_of(spec).weight.detach()
    expected = sum(beyond(part.transpose(0, 1).flatten(1), 1) for part in weight.split(ratio))
    assert lost("ghost", spec, ratio=ratio) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "channels", "options", "reason"),
    [
        ("hetconv", (8, 9), {}, "no number of groups from 2 to 4 divides 8 input and 9 output channels"),
        ("ghost", (8, 7), {"ratio": 3}, "no ratio from 2 to 3 divides 7 output channels"),
        ("ghost", (8, 1), {}, "no ratio from 2 to 2 divides 1 output channel"),
        ("partial", (1, 8), {}, "needs at least 2 input channels"),
    ],
)
def test_channels_that_cannot_be_parted_are_refused(
    name: str, channels: tuple[int, int], options: dict[str, object], reason: str
) -> None:
    op, spec = ops.get(name), ConvSpec(*channels, (3, 3))
    assert op.why_not(spec, op.fit_options(spec, op.parse_options(options))) == reason


@pytest.mark.parametrize(("name", "option"), [("hetconv", "groups"), ("ghost", "ratio"), ("partial", "share")])
def test_one_part_is_refused(name: str, option: str) -> None:
    with pytest.raises(OptionError, match=f"^{name}: option {option} must be at least 2, got 1$"):
        ops.get(name).parse_options({option: 1})


# --- the center


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (2, 4), (5, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 3), "same"])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_the_center_sees_what_a_kernel_with_nothing_else_sees(
    mode: str, kernel: tuple[int, int], padding: tuple[int, int] | str, dilation: tuple[int, int]
) -> None:
    stride = (1, 1) if padding == "same" else (2, 3)
    spec = ConvSpec(3, 3, kernel, stride=stride, padding=padding, dilation=dilation, bias=False, padding_mode=mode)
    donor, image = make_donor(spec), random(2, 3, *(size + 4 for size in input_size(spec)))
    with torch.no_grad():
        donor.weight.copy_(at_center(torch.eye(3)[:, :, None, None].double(), kernel))
        assert torch.equal(CenterView(spec, strided=True)(image), donor(image))
        view = CenterView(spec, strided=False)(image)
        assert torch.equal(view[..., :: stride[0], :: stride[1]], donor(image))


def test_the_usual_kernel_sees_the_image_itself() -> None:
    image = random(1, 2, 5, 5)
    for spec in (
        ConvSpec(2, 2, (3, 3), padding=(1, 1)),
        ConvSpec(2, 2, (4, 6), padding="same"),
        ConvSpec(2, 2, (1, 1)),
    ):
        assert CenterView(spec, strided=True)(image) is image
