"""Stacked rows stand for the weighted updates, whichever rows they are."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.bases.stacking import FactorStream, share_curve, stack_factors
from eigenpeft.linalg.orthogonal import orthonormal_rows

ROWS = ["balanced", "moments", "raw"]


def weighted(factors, weighting, as_numpy):
    products = [as_numpy(lora_B) @ as_numpy(lora_A) for lora_B, lora_A in factors]
    return [product / np.linalg.norm(product) if weighting == "equal" else product for product in products]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["equal", "none"])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_and_middle_give_the_weighted_updates(rows, weighting, dtype, adapters, as_numpy):
    factors = adapters(5, dtype=dtype)
    stacks = stack_factors(factors, rows=rows, weighting=weighting)
    assert stacks.rows_in.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows_in, rows_out, middle = map(as_numpy, (stacks.rows_in, stacks.rows_out, stacks.middle))
    ends = np.cumsum((0, *stacks.sizes))
    expected = weighted(factors, weighting, as_numpy)
    for product, start, stop in zip(expected, ends, ends[1:], strict=False):
        rebuilt = (rows_out[start:stop].T * middle[start:stop]) @ rows_in[start:stop]
        np.testing.assert_allclose(rebuilt, product, atol=2e-5 * np.linalg.norm(product))
    np.testing.assert_allclose(stacks.squared_norm, sum(np.sum(product**2) for product in expected), rtol=1e-5)


@pytest.mark.parametrize("weighting", ["equal", "none"])
def test_moments_have_the_second_moments_as_gram_matrices(weighting, adapters, as_numpy):
    factors = adapters(5)
    stacks = stack_factors(factors, rows="moments", weighting=weighting)
    products = weighted(factors, weighting, as_numpy)
    for rows, moment in (
        (stacks.rows_in, sum(product.T @ product for product in products)),
        (stacks.rows_out, sum(product @ product.T for product in products)),
    ):
        np.testing.assert_allclose(as_numpy(rows).T @ as_numpy(rows), moment, atol=1e-5 * np.trace(moment))


def test_raw_rows_are_the_factors(adapters):
    factors = adapters(3)
    stacks = stack_factors(factors, rows="raw", weighting="equal")
    assert torch.equal(stacks.rows_in, torch.cat([lora_A for _, lora_A in factors]))
    assert torch.equal(stacks.rows_out, torch.cat([lora_B.mT for lora_B, _ in factors]))


@pytest.mark.parametrize("rows", ROWS)
def test_updates_of_zero_have_no_rows(rows, adapters):
    factors = adapters(3)
    untrained = (torch.zeros_like(factors[0][0]), factors[0][1])
    with_it = stack_factors([untrained, *factors, untrained], rows=rows, weighting="equal")
    without = stack_factors(factors, rows=rows, weighting="equal")
    assert with_it.sizes == without.sizes
    assert torch.equal(with_it.rows_in, without.rows_in)
    assert stack_factors([untrained], rows=rows, weighting="equal").rows_in.shape == (0, 56)


@pytest.mark.parametrize("rows", ROWS)
def test_share_curve_is_that_of_the_projected_updates(rows, adapters, as_numpy):
    factors = adapters(6)
    stacks = stack_factors(factors, rows=rows, weighting="equal")
    generator = torch.Generator().manual_seed(0)
    v_in, v_out = (orthonormal_rows(torch.randn(7, size, generator=generator)) for size in (56, 40))
    products = weighted(factors, "equal", as_numpy)
    expected = [
        sum(np.sum((as_numpy(v_out[:k]) @ product @ as_numpy(v_in[:k]).T) ** 2) for product in products) / len(products)
        for k in range(1, 8)
    ]
    np.testing.assert_allclose(share_curve(stacks, v_in, v_out).numpy(), expected, rtol=1e-4)


def test_what_cannot_be_stacked_is_refused(adapters, unannotated):
    factors = adapters(2)
    with pytest.raises(ValueError, match="weighting='unit' is unknown; pass 'equal' or 'none'"):
        unannotated(stack_factors)(factors, rows="balanced", weighting="unit")
    with pytest.raises(ValueError, match="factors of 0 adapters .* pass at least one adapter"):
        stack_factors([], rows="balanced", weighting="equal")
    other = (torch.ones(9, 2), torch.ones(2, 56))
    with pytest.raises(ValueError, match=r"of 3 adapters of shapes \(out, in\) \[\(9, 56\), \(40, 56\)\]"):
        stack_factors([*factors, other], rows="balanced", weighting="equal")


@pytest.mark.parametrize("rows", ["balanced", "moments", "raw"])
def test_a_stream_is_read_once_and_stacks_the_same(adapters, rows):
    factors, n_reads = adapters(4), []

    def read():
        for pair in factors:
            n_reads.append(1)
            yield pair

    stream = FactorStream(n_rows=sum(len(lora_A) for _, lora_A in factors), read=read)
    streamed, stacked = (stack_factors(given, rows=rows, weighting="equal") for given in (stream, factors))
    assert len(n_reads) == len(factors)
    for name in ("rows_in", "rows_out", "middle"):
        torch.testing.assert_close(getattr(streamed, name), getattr(stacked, name), rtol=0, atol=0)
    assert streamed.norms == stacked.norms
    norms = [float((lora_B.double() @ lora_A.double()).norm()) for lora_B, lora_A in factors]
    assert stacked.norms == pytest.approx(norms, rel=1e-5)


def test_one_float64_adapter_of_a_stream_makes_all_rows_float64(adapters):
    factors = adapters(3)
    factors[1] = tuple(tensor.double() for tensor in factors[1])
    stream = FactorStream(n_rows=sum(len(lora_A) for _, lora_A in factors), read=lambda: iter(factors))
    stacks = stack_factors(stream, rows="raw", weighting="none")
    assert stacks.rows_in.dtype == torch.float64
    torch.testing.assert_close(stacks.rows_in, torch.cat([lora_A.double() for _, lora_A in factors]), rtol=0, atol=0)
