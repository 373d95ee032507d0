"""Sketches within their bound, projections, penalties and starts, against dense float64 computations."""

import pytest
import torch

from eigenpeft.linalg.bases.sequences import (
    frequent_directions,
    grow_memory,
    inflora_start,
    overlap_gradient,
    overlap_penalty,
    project_off,
    span_of,
)


def rows(p, n, seed=0):
    return torch.randn(p, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_frequent_directions_keep_their_bound_over_many_parts(size):
    spectrum = 0.7 ** torch.arange(12, dtype=torch.float64)
    stack = rows(60, 12) * spectrum
    sketch = torch.zeros(0, 12)
    for part in stack.split(7):
        sketch = frequent_directions(sketch, part, size=size)
        assert len(sketch) <= size
    gap = torch.linalg.eigvalsh(stack.mT @ stack - sketch.mT @ sketch)
    assert gap.min() > -1e-9, "a sketch never claims more than was seen"
    squares = torch.linalg.svdvals(stack) ** 2
    bound = min(float(squares[k:].sum()) / (size + 1 - k) for k in range(size + 1))
    assert gap.max() <= bound + 1e-9
    assert gap.max() > 0.05 * bound, "a bound that is never near would test nothing"


def test_a_sketch_that_has_room_loses_nothing():
    stack = rows(5, 9)
    sketch = frequent_directions(torch.zeros(0, 9), stack[:2], size=6)
    sketch = frequent_directions(sketch, stack[2:], size=6)
    torch.testing.assert_close(sketch.mT @ sketch, stack.mT @ stack)


def test_span_and_projection():
    low = rows(8, 3) @ rows(3, 10, 1)
    basis = span_of(low)
    assert basis.shape == (3, 10)
    torch.testing.assert_close(project_off(low, basis), torch.zeros_like(low), rtol=0, atol=1e-12)
    other = rows(4, 10, 2)
    expected = other @ (torch.eye(10, dtype=torch.float64) - torch.linalg.pinv(low) @ low)
    torch.testing.assert_close(project_off(other, basis), expected)
    assert project_off(other.float(), basis).dtype == torch.float32


def test_the_penalty_and_its_gradient():
    A = rows(2, 6).requires_grad_()
    earlier = [rows(3, 6, 1), rows(1, 6, 2)]
    penalty = overlap_penalty(A, earlier)
    expected = sum(abs(float(a @ b)) for each in earlier for a in each for b in A.detach())
    assert penalty.item() == pytest.approx(expected)
    penalty.backward()
    torch.testing.assert_close(overlap_gradient(A.detach(), earlier), A.grad)
    off = project_off(A.detach(), span_of(torch.cat(earlier)))
    assert float(overlap_penalty(off, earlier)) < 1e-12


def test_inflora_leaves_the_memory_alone_and_takes_what_is_largest_outside():
    memory = torch.linalg.qr(rows(10, 3, 1))[0].mT
    inputs = rows(40, 10) * torch.linspace(3, 0.1, 10)
    start = inflora_start(inputs, memory, rank=2)
    torch.testing.assert_close(start @ memory.mT, torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    outside = inputs - inputs @ memory.mT @ memory
    best = torch.linalg.svd(outside)[2][:2]
    torch.testing.assert_close((start @ best.mT).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert len(inflora_start(memory, memory, rank=2)) == 0, "inputs inside the memory leave nothing to train"


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_memory_grows_by_the_fewest_directions(share):
    memory = torch.linalg.qr(rows(10, 2, 1))[0].mT
    inputs = rows(40, 10) * torch.linspace(3, 0.1, 10)
    grown = grow_memory(memory, inputs, held_share=share)
    torch.testing.assert_close(grown @ grown.mT, torch.eye(len(grown), dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(grown[:2], memory, rtol=0, atol=1e-9)

    def held(basis):
        return float((inputs @ basis.mT).square().sum() / inputs.square().sum())

    assert held(grown) >= share - 1e-9
    assert held(grown[:-1]) < share
    assert len(grow_memory(grown, inputs, held_share=share)) == len(grown)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        frequent_directions(rows(1, 3), rows(1, 3), size=0)
    with pytest.raises(ValueError, match=r"held_share=0.0 must be in \(0, 1\]"):
        grow_memory(rows(0, 3), rows(1, 3), held_share=0.0)
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        inflora_start(rows(2, 3), rows(0, 3), rank=0)
