"""Gradients kept as tokens: nothing is lost when they are compressed, and the best subspace is the gradient's own."""

import pytest
import torch

from eigenpeft.linalg.scores.token_gradients import append_tokens, split_squared_norm


def test_many_tokens_are_compressed_without_loss():
    generator = torch.Generator().manual_seed(0)
    kept, whole = None, torch.zeros(6, 9, dtype=torch.float64)
    for _ in range(5):
        deltas, inputs = torch.randn(8, 6, generator=generator), torch.randn(8, 9, generator=generator)
        kept = append_tokens(kept, deltas, inputs)
        whole += deltas.double().mT @ inputs.double()
    assert len(kept[0]) == 6
    torch.testing.assert_close(kept[0].mT @ kept[1], whole)


def test_own_directions_are_the_optimum():
    generator = torch.Generator().manual_seed(0)
    deltas, inputs = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (12, 15))
    u, _, vh = torch.linalg.svd(deltas.mT @ inputs)
    split = split_squared_norm(deltas, inputs, components_out=u.mT[:3], components_in=vh[:3])
    torch.testing.assert_close(split.in_subspace, split.best)
    assert split.diagonal == pytest.approx(float(split.best[-1]))
