"""Muon: its steps against torch's own on matrices, and what it makes of kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convsurgeon.distillation._muon import Muon, orthogonalized


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_singular_values_become_alike_and_vectors_stay(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(given, full_matrices=False)
    large = s > 0.05 * s.norm(dim=1, keepdim=True)
    found = u.mT @ orthogonalized(given) @ v.mT / max(1.0, rows / columns) ** 0.5
    values = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(values)).abs().max() < 1e-6
    assert bool(((values[large] > 0.5) & (values[large] < 1.3)).all())


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_it_steps_as_torchs_own_does_on_matrices(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [Muon([ours], lr=0.1, weight_decay=0.2), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2)]
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch's turns in bf16


def test_a_kernel_moves_as_the_matrix_that_it_is() -> None:
    torch.manual_seed(0)
    kernels = [nn.Parameter(torch.randn(6, 4, 3, 3)) for _ in range(2)]
    kernels.append(nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)))
    matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
    for kernel, matrix in zip(kernels, matrices, strict=True):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1).clone()
    Muon(kernels).step()
    Muon(matrices).step()
    for kernel, matrix in zip(kernels, matrices, strict=True):
        torch.testing.assert_close(kernel.flatten(1), matrix)


def test_norms_biases_and_what_has_no_gradient() -> None:
    bias, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    reference = nn.Parameter(torch.ones(3))
    optimizer = Muon([bias, still], lr=0.1, momentum=0.9)
    plain = torch.optim.SGD([reference], lr=0.1, momentum=0.9, nesterov=True)
    for step in range(3):
        bias.grad, reference.grad = torch.full((3,), 0.2 * step), torch.full((3,), 0.2 * step)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(bias, reference)
    assert bool((still == 1).all())


def test_a_closure_gives_the_loss() -> None:
    weight = nn.Parameter(torch.eye(3))
    optimizer = Muon([weight])

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight * torch.arange(9.0).reshape(3, 3)).sum()
        loss.backward()
        return float(loss.detach())

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert first == 12.0
    assert second is not None
    assert second < first


def test_gradients_of_vectors_are_clipped_together_and_those_of_kernels_are_not() -> None:
    shapes = [(3,), (4,), (2, 2)]
    clipped, plain = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    gradients = [torch.full((3,), 2.0), torch.full((4,), -2.0), torch.tensor([[30.0, 0.0], [0.0, 40.0]])]
    norm = (7 * 4.0) ** 0.5
    for parameters, scale in ((clipped, 1.0), (plain, 0.5 / norm)):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * (scale if gradient.dim() == 1 else 1.0)
    Muon(clipped, max_norm=0.5).step()
    Muon(plain, max_norm=9.0).step()
    for a, b in zip(clipped, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(clipped[2].grad, gradients[2])
