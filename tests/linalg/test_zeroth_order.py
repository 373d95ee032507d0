"""The estimate against exact gradients: its slope, its mean, its seed."""

import pytest
import torch

from eigenpeft.linalg.zeroth_order import direction, directions, projected_gradient, replay, slope_along


def quadratic(values):
    return float((values[0].square().sum() + (values[1] ** 3).sum() + values[0][0] * values[1][1]).double())


def start():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, generator=generator).double(), torch.randn(2, generator=generator).double()]


def exact(values):
    first, second = 2 * values[0], 3 * values[1] ** 2
    first[0] += values[1][1]
    second[1] += values[0][0]
    return first, second


def test_the_slope_is_that_along_the_direction():
    values = start()
    slope, mean = projected_gradient(quadratic, values, epsilon=1e-4, seed=5)
    along = sum((g * z).sum() for g, z in zip(exact(values), direction(values, seed=5), strict=True))
    assert slope == pytest.approx(float(along), rel=1e-6)
    assert mean == pytest.approx(quadratic(values), abs=1e-6)
    assert all(torch.equal(value, other) for value, other in zip(values, start(), strict=True))


def test_the_mean_over_directions_is_the_gradient():
    values, n = start(), 4000
    total = [torch.zeros_like(value) for value in values]
    for seed in range(n):
        slope, _ = projected_gradient(quadratic, values, epsilon=1e-3, seed=seed)
        for sum_, z in zip(total, direction(values, seed=seed), strict=True):
            sum_ += slope * z / n
    found, expected = torch.cat(total), torch.cat(exact(values))
    assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.99
    assert float(found.norm() / expected.norm()) == pytest.approx(1.0, abs=0.1)


def mean_over(values, moved, epsilon=1e-4):
    slopes = [slope_along(quadratic, values, z, epsilon=epsilon)[0] for z in moved]
    return torch.cat([sum(g * z[i] for g, z in zip(slopes, moved, strict=True)) / len(moved) for i in range(2)])


def test_as_many_right_angles_as_values_give_the_gradient_itself():
    values = start()
    for n in (5, 10):
        found = mean_over(values, directions(values, seed=2, n=n))
        assert torch.allclose(found, torch.cat(exact(values)), rtol=1e-5, atol=1e-6)


def test_fewer_right_angles_vary_less_than_independent_directions():
    values, expected = start(), torch.cat(exact(start()))
    errors = {"right angles": 0.0, "independent": 0.0}
    for seed in range(200):
        errors["right angles"] += float(
            (mean_over(values, directions(values, seed=seed, n=3)) - expected).square().sum()
        )
        moved = [direction(values, seed=1000 + 3 * seed + i) for i in range(3)]
        errors["independent"] += float((mean_over(values, moved) - expected).square().sum())
    assert errors["right angles"] < 0.5 * errors["independent"]  # (d - n) / n against (d + 1) / n: 2/3 and 2


def test_right_angles_are_their_seeds_and_of_every_direction_alike():
    values = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.float64)]
    one, again, other = (directions(values, seed=seed, n=4) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for x, y in zip(one, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(one[0][0], other[0][0])
    assert [part.dtype for part in one[0]] == [torch.float32, torch.float64]
    drawn = [directions(values, seed=seed, n=1)[0] for seed in range(4000)]
    rows = torch.stack([torch.cat([part.double().flatten() for part in z]) for z in drawn])
    assert torch.allclose(rows.T @ rows / len(rows), torch.eye(7, dtype=torch.float64), atol=0.08)
    assert float(rows.mean(dim=0).abs().max()) < 0.08


def test_a_direction_is_its_seeds_and_standard_normal():
    values = [torch.zeros(20_000), torch.zeros(3, dtype=torch.bfloat16)]
    one, again, other = (direction(values, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert one[1].dtype == torch.bfloat16
    assert float(one[0].mean()) == pytest.approx(0.0, abs=0.03)
    assert float(one[0].std()) == pytest.approx(1.0, abs=0.03)


def test_a_list_of_seeds_and_steps_leads_to_the_same_bits():
    values = start()
    seeds, steps = [3, 8, 3], [0.5, -0.25, 1e-3]
    moved = replay(values, seeds, steps)
    assert all(torch.equal(one, other) for one, other in zip(moved, replay(values, seeds, steps), strict=True))
    first = replay(values, seeds[:2], steps[:2])
    assert all(torch.equal(one, other) for one, other in zip(moved, replay(first, [3], [1e-3]), strict=True))
    for number, value in enumerate(values):
        total = sum(a * direction(values, seed=seed)[number] for seed, a in zip(seeds, steps, strict=True))
        torch.testing.assert_close(moved[number], value - total)
    assert all(torch.equal(value, other) for value, other in zip(values, start(), strict=True))
    with pytest.raises(ValueError, match="shorter|longer"):
        replay(values, [1, 2], [0.1])
