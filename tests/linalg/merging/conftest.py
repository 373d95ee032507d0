"""Updates to merge: factors of mixed ranks, and the same as whole matrices."""

import numpy as np
import pytest
import torch


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
