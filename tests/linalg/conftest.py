"""Matrices to test linear algebra on: seeded, with a known spectrum or a known kind of adapters."""

import numpy as np
import pytest
import torch


def to_numpy(tensor):
    return tensor.detach().to(torch.float64).numpy()


@pytest.fixture
def as_numpy():
    """Float64 array of a tensor."""
    return to_numpy


@pytest.fixture
def unannotated():
    """A function without the checks of its annotations, which would catch a wrong literal before it does."""
    return lambda function: getattr(function, "__wrapped__", function)


@pytest.fixture
def with_spectrum():
    """A (p, n) tensor with the given singular values and random singular vectors."""

    def make(p, n, spectrum, *, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
        left = torch.linalg.qr(torch.randn(p, len(spectrum), generator=generator, dtype=torch.float64)).Q
        right = torch.linalg.qr(torch.randn(n, len(spectrum), generator=generator, dtype=torch.float64)).Q
        return ((left * spectrum) @ right.mT).to(dtype)

    return make


@pytest.fixture
def random_factors():
    """`(lora_B (m, r), lora_A (r, n))` of full or of smaller rank."""

    def make(m, n, r, *, rank=None, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lora_B = torch.randn(m, r, generator=generator, dtype=torch.float64)
        lora_A = torch.randn(r, n, generator=generator, dtype=torch.float64)
        if rank is not None:
            lora_A = torch.randn(r, rank, generator=generator, dtype=torch.float64) @ lora_A[:rank]
        return lora_B.to(dtype), lora_A.to(dtype)

    return make


@pytest.fixture
def adapters():
    """Factors of adapters that share a low-dimensional subspace, with noise, different ranks and scales."""

    def make(n_adapters=8, *, m=40, n=56, n_shared=6, noise=0.2, scale_spread=10.0, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shared_in, shared_out = normal(n_shared, n) / n**0.5, normal(n_shared, m) / m**0.5
        pairs = []
        for i in range(n_adapters):
            r = (2, 3, 5)[i % 3]
            lora_A = normal(r, n_shared) @ shared_in + noise * normal(r, n) / n**0.5
            lora_B = (normal(r, n_shared) @ shared_out + noise * normal(r, m) / m**0.5).mT
            scale = scale_spread ** (i / max(n_adapters - 1, 1))
            pairs.append(((scale * lora_B).to(dtype), lora_A.to(dtype)))
        return pairs

    return make


@pytest.fixture
def regauge():
    """The same updates split otherwise: `(B G⁻¹, G A)` with a random G of the given condition number."""

    def make(factors, *, condition=30.0, seed=1):
        generator = torch.Generator().manual_seed(seed)
        turned = []
        for lora_B, lora_A in factors:
            r = len(lora_A)
            left, right = (
                torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q for _ in range(2)
            )
            stretch = torch.logspace(0, float(np.log10(condition)), r, dtype=torch.float64)
            gauge = (left * stretch) @ right
            inverse = (right.mT / stretch) @ left.mT
            turned.append(((lora_B.double() @ inverse).to(lora_B.dtype), (gauge @ lora_A.double()).to(lora_A.dtype)))
        return turned

    return make


@pytest.fixture
def dense():
    """Whole (m, n) matrices of factors, NumPy float64."""
    return lambda factors: [(lora_B.double() @ lora_A.double()).numpy() for lora_B, lora_A in factors]


@pytest.fixture
def close():
    """Assert that two updates agree, relative to the norm of the second."""

    def check(found, expected, tol):
        found = found.numpy() if isinstance(found, torch.Tensor) else found
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < tol, f"relative error {error:.2e}"

    return check
