"""The canonical polyadic decomposition of a kernel: a sum of outer products of output, input and position vectors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from convsurgeon.factorization._blocks import Blocks, power_of_two, refuse_unless_finite

# a sweep that gains less than this share of the energy is the last
_ENOUGH = 1e-9
# so many sweeps, and then so many steps of a descent, are done at most, each as long as no more multiply-adds than
# these have been done, some seconds, but so many sweeps in any case; on kernels of a trained ResNet-20 ten times as
# many of both kept up to 1.5 % more of the energy
_SWEEPS, _STEPS, _WORK, _FEWEST = 30, 60, 4 * 10**10, 8
# what holds a sweep back from far steps along directions that hardly matter, a share of the mean curvature
_DAMPING = 1e-9
# what is lost by an exact decomposition is less than this share of the energy, or than so many roundings in a row
_EXACT, _ROUNDINGS = 1e-16, 8
# eigenvectors of matrices of a larger condition number are not trusted
_CONDITION = 1e12
# from terms that lose no more than this share of the energy no other start is tried
_NEARLY = 1e-4
# terms of less than this share of the largest one's size keep two factors large, so that they can learn
_FAINT = 1e-6

# Shape letters: O and I output and input channels, K kernel positions, R terms.


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one processor thread.

    A second one gains next to nothing on so many small steps in a row, and where another process holds the second
    processor each step waits for it: a kernel of 64 x 64 x 9 took 34 s then instead of 0.13 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@_one_thread()
def polyadic(kernel_OIK: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate a kernel by ``sum_r out[o, r] * in[i, r] * position[k, r]``.

    Where the kernel itself is of so few terms, at most as many as it has input and as it has output channels, they
    are found by eigenvectors (Leurgans, Ross and Abel, 1993), up to what rounding has left of them. Else one factor is
    solved for the two others as they are, in turns, each time by least squares, so that the error never rises
    (alternating least squares; Harshman, 1970), and then all descend together by L-BFGS (Liu and Nocedal, 1989), which
    is faster where such turns creep. This is cut short on the way to a local optimum; no method is known that always
    finds the global one, and for some kernels there is none (De Silva and Lim, 2008, arXiv:math/0607647). The start is
    made of singular vectors, and of numbers drawn with a fixed seed. With as many terms as the product of the two
    smallest sides, every kernel is met exactly.

    A term's size is split evenly over its three vectors. Arithmetic is float64, block by block, on one processor
    thread.

    Shape:
        - kernel_OIK: `(O, I, K)`
        - out: `(O, rank)`, in: `(I, rank)`, position: `(K, rank)`, in the kernel's dtype

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    kernel = _Kernel(kernel_OIK)
    third, terms = kernel.scale ** (1 / 3), _split(_terms(kernel, rank, _STEPS))
    out, into, position = ((factor * third).to(kernel_OIK.dtype) for factor in astuple(terms))
    return out, into, position


@torch.no_grad()
@_one_thread()
def terms_keeping(kernel_OIK: Tensor, share: float) -> int:
    """Return a number of terms with which `polyadic` keeps a share (0..1) of a kernel's energy.

    It is found by bisection, as if more terms always kept more, and without the descent: fewer may do.

    Shape:
        - kernel_OIK: `(O, I, K)`

    Raises:
        UnsupportedConvError: if a number is NaN or infinite.
    """
    kernel = _Kernel(kernel_OIK)

    def keeps(rank: int) -> bool:
        return kernel.energy - kernel.lost(_terms(kernel, rank, steps=0)) >= share * kernel.energy - kernel.exact

    # few terms are tried first: they take less time
    full = full_rank(*kernel_OIK.shape)
    low, high = 1, max(1, full // 32)
    while high < full and not keeps(high):
        low, high = high + 1, min(2 * high, full)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle + 1, high)
    return high


def full_rank(outputs: int, inputs: int, positions: int) -> int:
    """Return how many terms represent every kernel: the product of the two smallest sides.

    >>> full_rank(64, 32, 9), full_rank(64, 3, 9)
    (288, 27)
    """
    smallest, middle, _ = sorted((outputs, inputs, positions))
    return smallest * middle


@dataclass
class _Terms:
    """The factors: `out` `(O, R)`, `into` `(I, R)`, `position` `(K, R)`."""

    out: Tensor
    into: Tensor
    position: Tensor

    def misses(self, taps: slice, lines: slice, block_KOI: Tensor) -> Tensor:
        """Return what the terms are beside a block of the kernel, less the block."""
        return (self.out[lines] * self.position[taps, None]) @ self.into.T - block_KOI


class _Kernel:
    """A kernel in float64 blocks, and what sweeps and descents ask of it."""

    def __init__(self, kernel_OIK: Tensor) -> None:
        refuse_unless_finite(kernel_OIK)
        # of every dtype: how far a descent comes depends on the size of what it moves
        self.scale = power_of_two(torch.stack(kernel_OIK.aminmax()).double())
        self.kernel_KOI = kernel_OIK.permute(2, 0, 1)
        self.blocks = Blocks(self.kernel_KOI, self.scale)
        self.energy = sum(float(block.square().sum()) for _, _, block in self.blocks)
        self.exact = max(_EXACT, (_ROUNDINGS * torch.finfo(kernel_OIK.dtype).eps) ** 2) * self.energy

    def lost(self, terms: _Terms) -> float:
        """Return the squared distance from the terms."""
        return sum(float(terms.misses(*part).square().sum()) for part in self.blocks)

    def zeros(self, side: int, columns: int) -> Tensor:
        """Return zeros `(K, O or I, columns)` for side 0, 1 or 2."""
        return torch.zeros(self.kernel_KOI.shape[side], columns, dtype=torch.float64, device=self.kernel_KOI.device)

    def mixture(self, weights_K: Tensor) -> Tensor:
        """Return the sum of the positions' matrices with weights, `(O, I)`."""
        mixed_OI = self.zeros(1, self.kernel_KOI.shape[2])
        for taps, lines, block in self.blocks:
            mixed_OI[lines] += torch.einsum("k,koi->oi", weights_K[taps], block)
        return mixed_OI

    def input_gram(self) -> Tensor:
        """Return the products of the input channels with one another, `(I, I)`."""
        gram_II = self.zeros(2, self.kernel_KOI.shape[2])
        for _, _, block in self.blocks:
            rows = block.flatten(0, 1)
            gram_II += rows.T @ rows
        return gram_II

    def through(self, into_IR: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield some positions and their matrices' products with the terms' input vectors, `(K, O, R)`."""
        outputs = self.kernel_KOI.shape[1]
        for taps, lines, block in self.blocks:
            if lines.start == 0:
                through_KOR = block.new_empty(len(block), outputs, into_IR.shape[1])
            through_KOR[:, lines] = block @ into_IR
            if lines.stop == outputs:
                yield taps, through_KOR

    def target_into(self, terms: _Terms) -> Tensor:
        """Return the kernel's products with the terms' vectors of both other sides, `(I, R)`."""
        target_IR = torch.zeros_like(terms.into)
        for taps, lines, block in self.blocks:
            target_IR += torch.einsum("kir,kr->ir", block.mT @ terms.out[lines], terms.position[taps])
        return target_IR


def _terms(kernel: _Kernel, rank: int, steps: int) -> _Terms:
    """Return the terms of a kernel, of which a search ends with so many steps of the descent."""
    if not kernel.energy:
        return _Terms(kernel.zeros(1, rank), kernel.zeros(2, rank), kernel.zeros(0, rank))
    if rank >= full_rank(*kernel.kernel_KOI.shape):
        return _trivial(kernel, rank)
    if found := _by_eigenvectors(kernel, rank):
        lost = kernel.lost(found)
        if lost <= kernel.exact:
            return found
        if lost <= _NEARLY * kernel.energy:
            return _descended(kernel, found, steps)
    return _descended(kernel, _in_turns(kernel, _start(kernel, rank)), steps)


def _drawn(side: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(side, columns, generator=generator, dtype=torch.float64)


def _start(kernel: _Kernel, rank: int) -> _Terms:
    """Return terms with singular vectors of the inputs, then drawn ones, and outputs and positions drawn."""
    taps, outputs, inputs = kernel.kernel_KOI.shape
    into_II = torch.linalg.eigh(kernel.input_gram()).eigenvectors.flip(1)
    generator = torch.Generator().manual_seed(0)
    into = torch.cat([into_II[:, :rank], _drawn(inputs, max(0, rank - inputs), generator).to(into_II)], dim=1)
    out, position = (_drawn(side, rank, generator).to(into_II) for side in (outputs, taps))
    return _Terms(_unit(out), _unit(into), position)


def _trivial(kernel: _Kernel, rank: int) -> _Terms:
    """Return a term for each pair of places along the two smallest sides, and zeros for what is left."""
    sides = list(kernel.kernel_KOI.shape)
    longest = max(range(3), key=sides.__getitem__)
    first, second = (side for side in range(3) if side != longest)
    pairs = torch.arange(sides[first] * sides[second], device=kernel.kernel_KOI.device)
    factors = [kernel.zeros(side, rank) for side in range(3)]
    factors[first][pairs // sides[second], pairs] = 1
    factors[second][pairs % sides[second], pairs] = 1
    factors[longest][:, : len(pairs)] = kernel.kernel_KOI.movedim(longest, 0).flatten(1) / kernel.scale
    position, out, into = factors
    return _Terms(out, into, position)


def _by_eigenvectors(kernel: _Kernel, rank: int) -> _Terms | None:
    """Return the terms of a kernel that may consist of so few or fewer, as far as rounding allows, or None.

    Two mixtures of the positions' matrices have the same output vectors and the same input vectors, with different
    sizes: the output vectors are the eigenvectors of the one times the inverse of the other.
    """
    generator = torch.Generator().manual_seed(0)
    weights_2K = _drawn(2, len(kernel.kernel_KOI), generator).to(kernel.kernel_KOI.device)
    one_OI, other_OI = (kernel.mixture(weights_K) for weights_K in weights_2K)
    left_OR, size_R, right_RI = torch.linalg.svd(one_OI, full_matrices=False)
    beyond_R = size_R.square().flip(0).cumsum(0).flip(0)
    there = int((beyond_R > kernel.exact).sum())
    if not 0 < there <= rank or (there == len(size_R) < rank) or size_R[there - 1] * _CONDITION <= size_R[0]:
        return None
    left_OR, size_R, right_RI = left_OR[:, :there], size_R[:there], right_RI[:there]
    vectors_RR = torch.linalg.eig(left_OR.T @ other_OI @ right_RI.T / size_R).eigenvectors
    if bool(vectors_RR.imag.any()) or not torch.linalg.cond(vectors_RR.real) < _CONDITION:
        return None
    into = torch.linalg.solve(vectors_RR.real, size_R[:, None] * right_RI).T
    terms = _in_turns(kernel, _Terms(_unit(left_OR @ vectors_RR.real), _unit(into), kernel.zeros(0, there)))
    return _Terms(*(nn.functional.pad(factor, (0, rank - there)) for factor in astuple(terms)))


def _in_turns(kernel: _Kernel, terms: _Terms) -> _Terms:
    """Solve for the positions, the outputs and the inputs of all terms in turns."""
    rank = terms.out.shape[1]
    lost = kernel.energy
    sweeps = max(_FEWEST, _WORK // (2 * kernel.kernel_KOI.numel() * rank))
    for _ in range(min(_SWEEPS, sweeps)):
        positions, target_OR = _Solver(terms.out, terms.into), torch.zeros_like(terms.out)
        for taps, through_KOR in kernel.through(terms.into):
            target_KR = torch.einsum("kor,or->kr", through_KOR, terms.out)
            terms.position[taps] = positions.solve(target_KR, terms.position[taps])
            target_OR += torch.einsum("kor,kr->or", through_KOR, terms.position[taps])
        terms.out = _unit(_Solver(terms.into, terms.position).solve(target_OR, terms.out))
        length_R = _length(terms.position)
        terms.position = terms.position / length_R
        target_IR = kernel.target_into(terms)
        terms.into = _Solver(terms.out, terms.position).solve(target_IR, terms.into * length_R)
        # the squared distance, from what is there already
        overlap_RR = (terms.out.T @ terms.out) * (terms.position.T @ terms.position) * (terms.into.T @ terms.into)
        before, lost = lost, kernel.energy - float(2 * (terms.into * target_IR).sum() - overlap_RR.sum())
        if before - lost <= _ENOUGH * kernel.energy:
            break
    return terms


class _Solver:
    """Solves for one factor beside two others by least squares, held back a little towards what it was."""

    def __init__(self, one: Tensor, other: Tensor) -> None:
        curvature_RR = (one.T @ one) * (other.T @ other)
        self._damping = _DAMPING * float(curvature_RR.diagonal().mean()) + torch.finfo(torch.float64).tiny
        damped = curvature_RR + self._damping * torch.eye(len(curvature_RR)).to(curvature_RR)
        self._factored = torch.linalg.lu_factor(damped)

    def solve(self, target: Tensor, factor: Tensor) -> Tensor:
        """Return rows of the factor, for rows of the kernel's products with the others."""
        solved: Tensor = torch.linalg.lu_solve(*self._factored, (target + self._damping * factor).T).T
        return solved


def _descended(kernel: _Kernel, terms: _Terms, steps: int) -> _Terms:
    """Return the terms after at most so many steps of L-BFGS on all of them."""
    steps = min(steps, _WORK // (4 * kernel.kernel_KOI.numel() * terms.out.shape[1]))
    if steps < 1:
        return terms
    moving = _split(terms)
    factors = [moving.out, moving.into, moving.position]
    before = kernel.lost(moving)
    with torch.enable_grad():
        for factor in factors:
            factor.requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            factors,
            max_iter=steps,
            history_size=10,
            tolerance_grad=0,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = factors[0].new_zeros(())
            for part in kernel.blocks:
                missed = moving.misses(*part).square().sum() / kernel.energy
                missed.backward()  # type: ignore[no-untyped-call]
                loss += missed.detach()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        for factor in factors:
            factor.requires_grad_(False)
    return moving if kernel.lost(moving) <= before else terms


def _length(factor: Tensor) -> Tensor:
    """Return the lengths of columns, and 1 for zeros."""
    length_R = factor.norm(dim=0)
    return torch.where(length_R > 0, length_R, 1.0)


def _unit(factor: Tensor) -> Tensor:
    return factor / _length(factor)


def _split(terms: _Terms) -> _Terms:
    """Split each term's size evenly over its vectors; of a faint one the output's is small and the others are not."""
    size_R = terms.out.norm(dim=0) * terms.into.norm(dim=0) * terms.position.norm(dim=0)
    largest = size_R.max() if size_R.any() else size_R.new_ones(())
    third_R = torch.where(size_R > _FAINT * largest, size_R, largest) ** (1 / 3)
    out, into, position = (_unit_or_spare(factor) for factor in (terms.out, terms.into, terms.position))
    return _Terms(out * (size_R / third_R**2), into * third_R, position * third_R)


def _unit_or_spare(factor: Tensor) -> Tensor:
    """Scale columns to length 1; one of zeros becomes a unit vector, a later one with every column."""
    rows, columns = factor.shape
    spare = torch.eye(rows, dtype=factor.dtype, device=factor.device)[:, torch.arange(columns) % rows]
    return torch.where(factor.norm(dim=0) > 0, _unit(factor), spare)
