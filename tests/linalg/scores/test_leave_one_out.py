"""Held-out curves against fitting without the adapter."""

import pytest
import torch

from eigenpeft.linalg.bases.stacking import stack_factors
from eigenpeft.linalg.scores.leave_one_out import choose_n_components, cosines, held_out_curves, overlaps
from eigenpeft.linalg.scores.nulls import chance_curve
from tests.linalg.scores.made import factors_of


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
        for curve, one_sided in ((curves.both, False), (curves.input, True)):
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
        in_side, out_side = (0.03 * torch.randn(320, 4, generator=generator) for _ in "io")
        left, right = (torch.randn(10, 4, generator=generator) for _ in "io")
        return shared_out @ left + out_side, (shared_in @ right + in_side).mT

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


@pytest.mark.parametrize("noise", [0.05, 0.5, 3.0])  # from a steep spectrum to a flat one
def test_the_reduced_problem_of_many_adapters_is_close_to_a_refit(adapters, noise):
    factors = adapters(60, m=220, n=260, n_shared=12, noise=noise)
    stacks = stack_factors(factors, rows="balanced", weighting="equal")
    curves = held_out_curves(stacks, n_components=8)
    assert sum(stacks.sizes) > 8 + 24 + 2 * 5  # the reduced branch
    for curve, one_sided in ((curves.both, False), (curves.input, True)):
        expected = refitted(factors, list(range(60)), 8, only=3, one_sided=one_sided)
        torch.testing.assert_close(curve[:3, 7], expected, rtol=0, atol=2e-3)


def test_output_side_is_the_input_side_of_the_transposes():
    factors = factors_of()
    turned = [(lora_A.mT.contiguous(), lora_B.mT.contiguous()) for lora_B, lora_A in factors]
    one, other = (
        held_out_curves(stack_factors(each, rows="balanced", weighting="equal"), n_components=7)
        for each in (factors, turned)
    )
    torch.testing.assert_close(one.output, other.input, rtol=1e-5, atol=1e-6)


def test_hidden_adapters_may_differ_from_the_group(unannotated):
    factors = factors_of()
    stacks = stack_factors(factors, rows="balanced", weighting="equal")
    hidden = torch.eye(5, dtype=torch.bool)
    hidden[0, 1:4] = True  # adapter 0 meets adapter 4 alone
    curve = held_out_curves(stacks, n_components=2, hidden=hidden).both[0, 1]
    expected = refitted([factors[0], factors[4]], [0, 1], 2, only=1)[0]
    torch.testing.assert_close(curve, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="hidden of shape"):
        unannotated(held_out_curves)(stacks, n_components=2, hidden=hidden[:4])


def test_overlap_is_one_with_itself_and_chance_with_others():
    factors = factors_of(n_adapters=4, m=200, n=240, ranks=(4,))
    found = overlaps(stack_factors([*factors, factors[0]], rows="balanced", weighting="equal"))
    assert float(found[0, 4]) == pytest.approx(1.0, abs=1e-5)
    assert float(found[0, 1]) < 0.1


@pytest.mark.parametrize("n_shared", [2, 6, 20, 40])
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_choice_finds_a_planted_number(n_shared, noise):
    generator = torch.Generator().manual_seed(n_shared)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    in_side, out_side = normal(n_shared, 256) / 16, normal(256, n_shared) / 16
    factors = [
        (
            out_side @ normal(n_shared, 8) + noise * normal(256, 8) / 4,
            normal(8, n_shared) @ in_side + noise * normal(8, 256) / 4,
        )
        for _ in range(30)
    ]
    stacks = stack_factors(factors, rows="balanced", weighting="equal")
    share = held_out_curves(stacks, n_components=64).both.mean(dim=0)
    assert choose_n_components(share, chance=chance_curve(64, 256, 256)) == pytest.approx(n_shared, abs=1)


def test_choice_where_nothing_is_gained():
    assert choose_n_components(torch.full((4,), 0.1), chance=torch.full((4,), 0.2)) == 1


def test_groups_are_one_label_per_adapter():
    stacks = stack_factors(factors_of(), rows="balanced", weighting="equal")
    count = len(stacks.sizes)
    with pytest.raises(ValueError, match=rf"groups has 2 labels for {count} adapters; pass one each"):
        held_out_curves(stacks, n_components=2, groups=("a", "b"))
