"""Share curves of rectangular cores, against the definition entry by entry."""

import pytest
import torch

from eigenpeft.linalg.shares import added_shares, leading_squared_norms


@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (6, 3), (1, 4)])
def test_the_curve_is_the_norm_of_leading_blocks(shape):
    core = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [core[:k, :k].norm().item() ** 2 for k in range(1, max(shape) + 1)]
    curve = leading_squared_norms(core.square())
    torch.testing.assert_close(curve, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(added_shares(curve).cumsum(0), curve)
    assert (added_shares(curve) >= 0).all()
