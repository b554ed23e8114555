"""The training's optimizer of matrices: against singular values in float64, and against torch's own."""

from __future__ import annotations

import pytest
import torch

from finegrain_ops.tiny_llava.training.muon import Muon, orthogonal

SHAPES = [(16, 16), (24, 9), (9, 24), (1, 7), (7, 1)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, int], scale: float) -> None:
    u, _, vh = torch.linalg.svd(normal(*shape).double(), full_matrices=False)
    values = torch.linspace(1.0, 0.1, min(shape), dtype=torch.float64)
    found = orthogonal((scale * (u * values) @ vh).float()).double()
    assert found.shape == shape
    in_its_basis = u.mT @ found @ vh.mT
    assert ((in_its_basis.diagonal() > 0.6) & (in_its_basis.diagonal() < 1.3)).all()
    assert (in_its_basis - torch.diag(in_its_basis.diagonal())).abs().max() < 1e-4
    assert torch.linalg.matrix_norm(found - u @ in_its_basis @ vh) < 1e-4  # and nothing beside


def test_nothing_stays_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_steps_by_the_definition(shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(normal(*shape))
    still = torch.nn.Parameter(normal(2, 2))  # without a gradient
    optimizer = Muon([weight, still], lr=0.1, momentum=0.8, weight_decay=0.3)
    expected, mean = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for step in range(3):
        gradient = normal(*shape, seed=step + 1)
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradient)
        mean = 0.8 * mean + 0.2 * gradient.double()
        direction = orthogonal((0.8 * mean + 0.2 * gradient.double()).float()).double()
        expected = expected * (1 - 0.1 * 0.3) - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * direction
        torch.testing.assert_close(weight.detach().double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(still.detach(), normal(2, 2))


def test_the_loss_of_a_closure_is_given() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))

    def closure() -> torch.Tensor:
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer = Muon([weight], lr=0.1)
    assert optimizer.step(closure).item() == 4.0
    assert optimizer.step(closure).item() < 4.0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own from 2.9 on")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_those_of_torch_up_to_bfloat16(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(normal(*shape)) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.3),
        torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.3),
    ]
    for step in range(4):
        for weight, optimizer in zip((ours, theirs), optimizers):
            weight.grad = normal(*shape, seed=step + 1)
            optimizer.step()
    moved = (theirs - normal(*shape)).norm()
    assert moved > 0.3
    assert (ours - theirs).norm() < 0.04 * moved
