"""The refinement climbs, and its result is a fixed point of exact alternation."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.bases.alternating import refine
from eigenpeft.linalg.bases.stacking import share_curve, stack_factors
from eigenpeft.linalg.orthogonal import orthonormal_rows, principal_angles


@pytest.mark.parametrize("rows", ["balanced", "moments", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4])
def test_refinement_from_anywhere_ends_where_exact_alternation_stays(rows, dtype, k, adapters, as_numpy):
    factors = adapters(8, dtype=dtype)
    stacks = stack_factors(factors, rows=rows, weighting="equal")
    generator = torch.Generator().manual_seed(0)
    start = [orthonormal_rows(torch.randn(k, size, generator=generator).to(dtype)) for size in (56, 40)]
    found_in, found_out = refine(stacks, *start, tol=1e-8)
    before, after = (share_curve(stacks, *pair)[-1] for pair in (start, (found_in.components, found_out.components)))
    assert after > before
    products = [as_numpy(lora_B) @ as_numpy(lora_A) for lora_B, lora_A in factors]
    products = [product / np.linalg.norm(product) for product in products]
    projected = [product @ as_numpy(found_in.components).T for product in products]
    exact = np.linalg.eigh(sum(image @ image.T for image in projected))[1][:, -k:].T
    assert principal_angles(found_out.components, torch.from_numpy(exact.copy())).amax() < 2e-2
    captured = sum(np.sum((as_numpy(found_out.components) @ image) ** 2) for image in projected)
    best = sum(np.sum((exact @ image) ** 2) for image in projected)
    assert best * (1 - 1e-5) <= captured <= best * (1 + 1e-6)
    np.testing.assert_allclose(np.sum(as_numpy(found_in.singular_values) ** 2), captured, rtol=1e-5)


def test_leading_components_explain_most(adapters):
    stacks = stack_factors(adapters(8), rows="moments", weighting="equal")
    generator = torch.Generator().manual_seed(0)
    start = [orthonormal_rows(torch.randn(5, size, generator=generator)) for size in (56, 40)]
    for found in refine(stacks, *start, tol=1e-4):
        assert bool((found.singular_values.diff() <= 0).all())
        torch.testing.assert_close(found.components @ found.components.mT, torch.eye(5), atol=1e-6, rtol=0.0)
