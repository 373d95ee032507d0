"""Held-out curves against fitting without the adapter; nulls keep singular values and nothing else."""

import pytest
import torch

from eigenpeft.linalg.leave_one_out import cosines, held_out_curves
from eigenpeft.linalg.nulls import effective_rank, matched_null
from eigenpeft.linalg.stacking import stack_factors


def factors_of(*, n_adapters=5, m=14, n=18, ranks=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(m, ranks[i % len(ranks)], generator=generator),
            torch.randn(ranks[i % len(ranks)], n, generator=generator),
        )
        for i in range(n_adapters)
    ]


def refitted(factors, groups, k, *, only=None, one_sided=False):
    """The oracle: fit dense float64 bases to the others' balanced factors, project the dense update."""
    result = []
    for i, (lora_B, lora_A) in enumerate(factors[:only]):
        rows_in, rows_out = [], []
        for j, (other_B, other_A) in enumerate(factors):
            if groups[j] != groups[i]:
                u, s, vh = torch.linalg.svd(other_B.double() @ other_A.double(), full_matrices=False)
                s = s[: len(other_A)] / s.norm()
                rows_in.append(s.sqrt()[:, None] * vh[: len(s)])
                rows_out.append(s.sqrt()[:, None] * u.mT[: len(s)])
        bases = [torch.linalg.svd(torch.cat(rows), full_matrices=False)[2][:k] for rows in (rows_in, rows_out)]
        update = lora_B.double() @ lora_A.double()
        projected = update @ bases[0].mT if one_sided else bases[1] @ update @ bases[0].mT
        result.append(float(projected.square().sum() / update.square().sum()))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("groups", [None, ("a", "a", "b", "c", "c")])
@pytest.mark.parametrize("rows", ["balanced"])
def test_curves_are_those_of_a_refit(groups, rows):
    factors = factors_of()
    stacks = stack_factors(factors, rows=rows, weighting="equal")
    curves = held_out_curves(stacks, n_components=7, groups=groups)
    labels = groups or range(len(factors))
    for k in (1, 4, 7):
        for curve, one_sided in ((curves.both, False), (curves.inside, True)):
            expected = refitted(factors, list(labels), k, one_sided=one_sided)
            torch.testing.assert_close(curve[:, k - 1], expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_never_explains_itself():
    factors = factors_of(n_adapters=3, ranks=(4,), m=40, n=40)
    stacks = stack_factors(factors, rows="balanced", weighting="equal")
    # The other two have 8 directions; further components must not come from the adapter itself.
    curves = held_out_curves(stacks, n_components=12).both
    assert float(curves[:, -1].max()) < 0.3
    torch.testing.assert_close(curves[:, 7], curves[:, 11])


def test_a_group_of_all_leaves_nothing():
    stacks = stack_factors(factors_of(), rows="balanced", weighting="equal")
    assert not held_out_curves(stacks, n_components=3, groups=["all"] * 5).both.any()


def test_truncated_coordinates_are_close():
    generator = torch.Generator().manual_seed(3)
    shared_in, shared_out = (torch.linalg.qr(torch.randn(320, 10, generator=generator))[0] for _ in "io")

    def one():
        inside, outside = (0.03 * torch.randn(320, 4, generator=generator) for _ in "io")
        left, right = (torch.randn(10, 4, generator=generator) for _ in "io")
        return shared_out @ left + outside, (shared_in @ right + inside).mT

    factors = [one() for _ in range(80)]
    stacks = stack_factors(factors, rows="balanced", weighting="equal")
    curves = held_out_curves(stacks, n_components=10).both
    assert sum(stacks.sizes) > 256 + 50
    torch.testing.assert_close(curves[:3, -1], refitted(factors, list(range(80)), 10, only=3), rtol=0, atol=0.01)


def test_cosines_are_those_of_the_updates():
    factors = factors_of()
    found = cosines(stack_factors(factors, rows="balanced", weighting="equal"))
    flat = torch.stack([(B.double() @ A.double()).flatten() for B, A in factors])
    flat = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, flat @ flat.mT, rtol=1e-5, atol=1e-6)


def test_wrong_numbers_of_labels_are_refused():
    stacks = stack_factors(factors_of(), rows="balanced", weighting="equal")
    with pytest.raises(ValueError, match="2 labels for 5 adapters"):
        held_out_curves(stacks, n_components=2, groups=["a", "b"])
    with pytest.raises(ValueError, match="1 labels for 5 adapters"):
        matched_null(factors_of(), generator=torch.Generator(), common_start=["a"])


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
