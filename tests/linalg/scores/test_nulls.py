"""Nulls keep singular values and nothing else; chance is their mean."""

import pytest
import torch

from eigenpeft.linalg.bases.stacking import stack_factors
from eigenpeft.linalg.scores.leave_one_out import held_out_curves
from eigenpeft.linalg.scores.nulls import chance_curve, effective_rank, matched_null
from tests.linalg.scores.made import factors_of


@pytest.mark.parametrize("common", [None, ("a", "a", "b", "b", "b")])
def test_a_null_keeps_the_singular_values_alone(common):
    factors = factors_of()
    null = matched_null(factors, generator=torch.Generator().manual_seed(1), common_start=common)
    for (B, A), (null_B, null_A) in zip(factors, null, strict=True):
        k = len(A)
        torch.testing.assert_close(
            torch.linalg.svdvals(null_B @ null_A)[:k], torch.linalg.svdvals(B @ A)[:k], rtol=1e-4, atol=1e-5
        )
    overlap = torch.linalg.svdvals(_unit(null[0][1]) @ _unit(null[1][1]).mT).amax()
    assert (overlap > 0.999) == (common is not None)
    again = matched_null(factors, generator=torch.Generator().manual_seed(1), common_start=common)
    assert all(
        torch.equal(a, b) for one, other in zip(null, again, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_effective_rank():
    assert effective_rank(torch.tensor([3.0])) == pytest.approx(1.0)
    assert effective_rank(torch.ones(7)) == pytest.approx(7.0)
    assert 1.0 < effective_rank(torch.tensor([1.0, 0.1])) < 1.1


def _unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def test_chance_is_the_mean_of_held_out_random_adapters(adapters):
    factors, generator = adapters(8, m=20, n=24), torch.Generator().manual_seed(0)
    drawn = [
        held_out_curves(
            stack_factors(matched_null(factors, generator=generator), rows="balanced", weighting="equal"),
            n_components=6,
        )
        for _ in range(80)
    ]
    for part, widths in (("both", (20, 24)), ("input", (24,)), ("output", (20,))):
        values = torch.stack([getattr(shares, part).mean(0) for shares in drawn])
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - chance_curve(6, *widths)).abs() < 4 * error).all()


def test_wrong_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match="1 labels for 5 adapters"):
        matched_null(factors_of(), generator=torch.Generator(), common_start=["a"])


def test_common_starts_are_one_label_per_adapter():
    factors = factors_of()
    with pytest.raises(ValueError, match=rf"common_start has 1 labels for {len(factors)} adapters; pass one each"):
        matched_null(factors, generator=torch.Generator().manual_seed(1), common_start=("a",))
