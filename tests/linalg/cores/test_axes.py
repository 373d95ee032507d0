"""Axes kept as combinations of factors are the axes that are formed; both ways to a core space give the same one."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.cores import axes, core_space
from eigenpeft.linalg.cores.axes import Axes, generic_direction, gram


@pytest.fixture
def blocks():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(r, 2500, generator=generator).to(dtype) for r, dtype in ((30, torch.float32), (5, torch.bfloat16))
    ]


def test_gram_is_that_of_the_rows_in_float64(blocks):
    rows = np.concatenate([block.double().numpy() for block in blocks])  # longer than one chunk
    assert rows.shape[1] > axes._CHUNK
    products, along = gram(blocks)
    np.testing.assert_allclose(products, rows @ rows.T, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(along, rows @ generic_direction(2500).numpy(), rtol=1e-12, atol=1e-10)


def test_gram_takes_views(blocks):
    turned = [block.mT.contiguous().mT for block in blocks]
    torch.testing.assert_close(gram(turned), gram(blocks), rtol=1e-12, atol=1e-10)


def test_combinations_are_those_of_the_rows(blocks):
    turn = torch.randn(4, 35, generator=torch.Generator().manual_seed(1)).double()
    found, rows = Axes(turn, tuple(blocks)), np.concatenate([block.double().numpy() for block in blocks])
    assert (len(found), found.size) == (4, 2500)
    np.testing.assert_allclose(found.rows(), turn.numpy() @ rows, atol=1e-11)
    np.testing.assert_allclose(found.combined(turn.mT[:3]), turn.mT[:3].numpy() @ turn.numpy() @ rows, atol=1e-11)


def test_signed_axes_point_along_the_generic_direction(blocks):
    found, signs = Axes(torch.eye(35).double(), tuple(blocks)).signed(gram(blocks)[1])
    assert (found.rows() @ generic_direction(2500) > 0).all()
    assert set(signs.tolist()) == {-1.0, 1.0}


# Factors that are nearly random, as trained adapters' lora_A, and factors that depend on each other more and more.
@pytest.mark.parametrize(("closeness", "by_grams"), [(0.0, True), (1.0, True), (1e3, False)])
@pytest.mark.parametrize("equal_ranks", [True, False])
def test_gram_matrices_give_the_space_of_the_decompositions(closeness, by_grams, equal_ranks):
    generator = torch.Generator().manual_seed(0)
    common = [torch.randn(80, 4, generator=generator), torch.randn(4, 90, generator=generator)]
    factors = []
    for i in range(5):
        r = 4 if equal_ranks else (4, 2, 3)[i % 3]
        own = torch.randn(80, r, generator=generator), torch.randn(r, 90, generator=generator)
        factors.append((own[0] + closeness * common[0][:, :r], own[1] + closeness * common[1][:r]))
    fast, exact = core_space._by_grams(factors), core_space._by_decompositions(factors)
    assert (fast is not None) == by_grams
    if fast is None:
        fast = core_space.core_space(factors)
    torch.testing.assert_close(fast.components_out, exact.components_out, atol=1e-10, rtol=0)
    torch.testing.assert_close(fast.components_in, exact.components_in, atol=1e-10, rtol=0)
    torch.testing.assert_close(fast.cores, exact.cores, atol=1e-9, rtol=1e-9)
    for basis in (fast.components_out, fast.components_in):
        np.testing.assert_allclose(basis @ basis.mT, np.eye(len(basis)), atol=1e-12)
    for core, (lora_B, lora_A) in zip(fast.cores, factors, strict=True):
        update = lora_B.double() @ lora_A.double()
        error = fast.components_out.mT @ core @ fast.components_in - update
        assert error.norm() < 1e-12 * update.norm()


@pytest.mark.parametrize("what", ["equal", "zero", "rank 0"])
def test_updates_that_depend_on_each_other_are_decomposed(what, random_factors):
    one = random_factors(30, 20, 3, dtype=torch.float64)
    other = {"equal": one, "zero": (0 * one[0], one[1]), "rank 0": (one[0][:, :0], one[1][:0])}[what]
    assert core_space._by_grams([one, other]) is None
    assert core_space.core_space([one, other]).cores.shape == (2, 3, 3)
