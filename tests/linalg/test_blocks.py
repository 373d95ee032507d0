"""Products block by block against dense block-diagonal matrices, put together in NumPy float64."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.blocks import (
    block_product,
    input_block_product,
    input_blocks,
    output_block_product,
    output_blocks,
)

# N blocks of p columns and q rows, K components; rows come as one vector, a batch, or sequences of a batch.
SIZES = pytest.mark.parametrize(("n_blocks", "p", "q", "k"), [(1, 4, 3, 2), (2, 3, 2, 5), (4, 2, 1, 3), (3, 1, 2, 1)])
BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 5), (0,)])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal(blocks):
    """A matrix of zeros, and the blocks written along its diagonal."""
    height, width = blocks[0].shape
    dense = np.zeros((len(blocks) * height, len(blocks) * width))
    for i, block in enumerate(blocks):
        dense[i * height : (i + 1) * height, i * width : (i + 1) * width] = block
    return dense


def dense_input(components_in, coefficients_in, n_blocks):
    rows, columns = np.split(coefficients_in.numpy(), n_blocks), np.split(components_in.numpy(), n_blocks, axis=1)
    return diagonal([c @ v for c, v in zip(rows, columns, strict=True)])


def dense_output(components_out, coefficients_out, n_blocks):
    parts = (np.split(each.numpy(), n_blocks, axis=1) for each in (components_out, coefficients_out))
    return diagonal([v.T @ c for v, c in zip(*parts, strict=True)])


@SIZES
@BATCHES
def test_a_product_is_that_of_the_dense_matrix(n_blocks, p, q, k, batch):
    blocks, x = drawn(n_blocks, q, p), drawn(*batch, n_blocks * p, seed=1)
    found = block_product(x, blocks)
    assert found.shape == (*batch, n_blocks * q)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ diagonal(list(blocks.numpy())).T, rtol=1e-12, atol=1e-12)


# Factor to: its blocks, its product, its dense matrix, and how C is drawn from N q and K.
FACTORS = {
    "input": (input_blocks, input_block_product, dense_input, lambda rows, k: (rows, k)),
    "output": (output_blocks, output_block_product, dense_output, lambda rows, k: (k, rows)),
}


@SIZES
@BATCHES
@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_is_the_dense_one(n_blocks, p, q, k, batch, factor):
    form, multiply, densely, shape = FACTORS[factor]
    components, coefficients = drawn(k, n_blocks * p), drawn(*shape(n_blocks * q, k), seed=1)
    dense = densely(components, coefficients, n_blocks)
    formed = torch.block_diag(*form(components, coefficients, n_blocks=n_blocks))
    np.testing.assert_allclose(formed.numpy(), dense, rtol=1e-12, atol=1e-12)
    x = drawn(*batch, dense.shape[1], seed=2)
    found = multiply(x, components, coefficients, n_blocks=n_blocks)
    np.testing.assert_allclose(found.numpy(), x.numpy() @ dense.T, rtol=1e-12, atol=1e-12)


def test_nothing_joins_two_blocks():
    """The first block of the result says nothing of the second of the input, to the last bit."""
    x, components, coefficients = drawn(1, 6), drawn(3, 6, seed=1), drawn(4, 3, seed=2)
    other = x.clone()
    other[:, 3:] += 1.0
    both = (input_block_product(each, components, coefficients, n_blocks=2) for each in (x, other))
    one, two = both
    assert torch.equal(one[:, :2], two[:, :2])
    assert not torch.equal(one[:, 2:], two[:, 2:])


def test_gradients_are_those_of_finite_differences():
    arguments = [drawn(2, 6), drawn(3, 6, seed=1), drawn(4, 3, seed=2), drawn(3, 4, seed=3)]

    def both(x, components, coefficients_in, coefficients_out):
        hidden = input_block_product(x, components, coefficients_in, n_blocks=2)
        return output_block_product(hidden, components, coefficients_out, n_blocks=2)

    assert torch.autograd.gradcheck(both, [argument.requires_grad_() for argument in arguments])
