"""Coefficients on a pair of bases, and back."""

import pytest
import torch

from eigenpeft.linalg.coefficients import change_of_bases, project, reconstruct, remainder
from eigenpeft.linalg.factored import projection_residual
from eigenpeft.linalg.orthogonal import orthonormal_rows


@pytest.fixture
def bases():
    generator = torch.Generator().manual_seed(0)
    return {
        "components_out": orthonormal_rows(torch.randn(5, 18, generator=generator)),
        "components_in": orthonormal_rows(torch.randn(7, 25, generator=generator)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_coefficients_are_those_of_the_projection(dtype, bases, random_factors, as_numpy):
    lora_B, lora_A = random_factors(18, 25, 3, dtype=dtype)
    coefficients = project(lora_B, lora_A, **bases)
    assert [tuple(part.shape) for part in coefficients] == [(5, 3), (3, 7)]
    rebuilt_B, rebuilt_A = map(as_numpy, reconstruct(*coefficients, **bases))
    out, into = (as_numpy(bases[side]) for side in ("components_out", "components_in"))
    product = as_numpy(lora_B) @ as_numpy(lora_A)
    expected = out.T @ out @ product @ into.T @ into
    torch.testing.assert_close(
        torch.from_numpy(rebuilt_B @ rebuilt_A), torch.from_numpy(expected), atol=1e-5, rtol=1e-5
    )
    residual = projection_residual(
        lora_B, lora_A, components_out=bases["components_out"], components_in=bases["components_in"]
    )
    assert residual.item() == pytest.approx(((product - rebuilt_B @ rebuilt_A) ** 2).sum() ** 0.5, rel=1e-5)


def test_projecting_twice_changes_nothing(bases, random_factors):
    once = project(*random_factors(18, 25, 3), **bases)
    twice = project(*reconstruct(*once, **bases), **bases)
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grown", [True, False])
def test_a_moved_core_is_the_projection_on_the_new_bases(grown):
    """Against the float64 projection of the whole update; without loss where the new bases contain the old ones."""
    generator = torch.Generator().manual_seed(0)
    n, m = 11, 9
    whole_in, whole_out = (
        torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].mT for width in (n, m)
    )
    old_in, old_out = whole_in[:4], whole_out[:3]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    new_in = turn @ whole_in[:6] if grown else whole_in[2:7]
    new_out = whole_out[:5].flip(0) if grown else whole_out[1:4]
    core = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    left, right = change_of_bases(old_out=old_out, old_in=old_in, new_out=new_out, new_in=new_in)
    update = old_out.mT @ core @ old_in
    moved = new_out.mT @ (left @ core @ right) @ new_in
    torch.testing.assert_close(moved, (new_out.mT @ new_out) @ update @ (new_in.mT @ new_in))
    assert ((moved - update).norm() < 1e-12) == grown


@pytest.mark.parametrize("rank", [1, 3])
def test_the_remainder_is_what_a_core_does_not_hold(rank, bases, random_factors, as_numpy):
    lora_B, lora_A = random_factors(18, 25, 4)
    out_side, in_side = (
        side[..., :rank] if i == 0 else side[:rank] for i, side in enumerate(project(lora_B, lora_A, **bases))
    )
    parts = remainder(lora_B, lora_A, coefficients_out=out_side, coefficients_in=in_side, **bases)
    left, right = map(as_numpy, parts)
    out, into = (as_numpy(bases[side]) for side in ("components_out", "components_in"))
    expected = as_numpy(lora_B) @ as_numpy(lora_A) - out.T @ as_numpy(out_side) @ as_numpy(in_side) @ into
    torch.testing.assert_close(torch.from_numpy(left @ right), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    assert left.shape[1] == torch.linalg.matrix_rank(torch.from_numpy(expected), rtol=1e-6) <= 4 + rank


def test_nothing_remains_of_what_the_components_hold(bases):
    in_side, out_side = torch.randn(2, 7), torch.randn(5, 2)
    lora_B, lora_A = reconstruct(out_side, in_side, **bases)
    left, right = remainder(lora_B, lora_A, coefficients_out=out_side, coefficients_in=in_side, **bases)
    assert (left.shape, right.shape) == ((18, 0), (0, 25))
