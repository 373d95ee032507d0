"""The table of cores against a float64 oracle that is written out here, with unequal numbers of components."""

import warnings

import pytest
import torch

from eigenpeft.errors import SubspaceError
from eigenpeft.subspace import CORES, Coefficients, Core, core_kind
from eigenpeft.subspace.cores import FROM_ZERO

RANK = 3
SIZES = [(7, 5), (5, 7), (6, 6)]
DEFINED = [(name, sizes) for name in CORES for sizes in SIZES if name != "diagonal" or sizes[0] == sizes[1]]


def random_parts(name, n_components_in, n_components_out, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = CORES[name].shapes(n_components_in=n_components_in, n_components_out=n_components_out, rank=RANK)
    return {part: torch.randn(shape, generator=generator, dtype=dtype) for part, shape in shapes.items()}


def oracle(name, parts):
    """M entry by entry in float64."""
    parts = {part: tensor.double() for part, tensor in parts.items()}
    if name == "low_rank":
        return sum(
            torch.outer(*pair) for pair in zip(parts["coefficients_out"].T, parts["coefficients_in"], strict=True)
        )
    if name == "diagonal":
        return torch.stack([d * row for d, row in zip(parts["coefficients_out"], torch.eye(6).double(), strict=True)])
    if name == "mixture":
        return sum(weight * core for weight, core in zip(parts["weights"], parts["cores"], strict=True))
    return parts["coefficients_out"]


@pytest.mark.parametrize(("name", "sizes"), DEFINED)
def test_dense_and_factors_are_the_matrix(name, sizes):
    parts = random_parts(name, *sizes)
    expected = oracle(name, parts)
    assert expected.shape == (sizes[1], sizes[0])
    core = Core(name, parts, scaling=0.3)
    left, right = core.factors()
    assert left.shape[1] == len(right) <= max(RANK, min(sizes))
    torch.testing.assert_close(core.dense().double(), 0.3 * expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((left @ right).double(), 0.3 * expected, rtol=1e-5, atol=1e-6)
    assert (core.n_components_in, core.n_components_out) == sizes
    torch.testing.assert_close(core.coefficients_out @ core.coefficients_in, core.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "sizes"), DEFINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_come_out_bit_for_bit(name, sizes, dtype):
    parts = random_parts(name, *sizes, dtype=dtype)
    core = Core(name, parts, scaling=1 / 3)
    assert set(core.parts) == set(parts)
    assert all(core.parts[part] is tensor for part, tensor in parts.items())
    row = CORES[name]
    n_components_in, n_components_out, rank = row.sizes(parts)
    found = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    assert found == row.shapes(n_components_in=n_components_in, n_components_out=n_components_out, rank=rank)


@pytest.mark.parametrize(("name", "sizes"), DEFINED)
def test_number_of_parameters_counts_what_is_trained(name, sizes):
    parts = random_parts(name, *sizes)
    counted = sum(parts[part].numel() for part in CORES[name].trained)
    n_components_in, n_components_out = sizes
    formula = {
        "low_rank": RANK * (n_components_in + n_components_out),
        "full": n_components_in * n_components_out,
        "diagonal": n_components_in,
        "mixture": RANK,
    }[name]
    assert (
        CORES[name].n_parameters(n_components_in=n_components_in, n_components_out=n_components_out, rank=RANK)
        == counted
        == formula
    )


@pytest.mark.parametrize(("name", "sizes"), DEFINED)
def test_factors_become_the_nearest_core_of_a_kind(name, sizes):
    n_components_in, n_components_out = sizes
    dense = oracle("full", random_parts("full", n_components_in, n_components_out, torch.float64))
    left, right = Core("full", {"coefficients_out": dense}).factors()
    nearest = CORES[name].from_factors(left, right, rank=RANK)
    got = CORES[name].to_dense(nearest)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    expected = {
        "low_rank": (u[:, :RANK] * s[:RANK]) @ vh[:RANK],
        "full": dense,
        "diagonal": dense * torch.eye(n_components_out, n_components_in),
        "mixture": dense,
    }[name]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    Core(name, nearest)  # the parts are those of the kind


def test_a_smaller_rank_than_asked_for_is_filled_with_zeros():
    nearest = CORES["low_rank"].from_factors(torch.ones(4, 1), torch.ones(1, 5), rank=3)
    assert nearest["coefficients_in"].shape == (3, 5)
    assert not nearest["coefficients_in"][1:].any()
    kept = CORES["low_rank"].from_factors(torch.ones(4, 1), torch.ones(1, 5))
    assert kept["coefficients_in"].shape == (1, 5)


@pytest.mark.parametrize("name", FROM_ZERO)
@pytest.mark.parametrize("zero_side", ["in", "out"])
def test_starts_at_zero_and_not_on_a_saddle(name, zero_side):
    parts = CORES[name].start(n_components_in=6, n_components_out=6, rank=RANK, zero_side=zero_side)
    Core(name, parts)
    for tensor in parts.values():
        tensor.requires_grad_(True)
    dense = CORES[name].to_dense(parts)
    assert not dense.any()
    (dense * torch.randn(6, 6)).sum().backward()
    assert any(tensor.grad is not None and tensor.grad.any() for tensor in parts.values())
    assert CORES[name].to_dense(CORES[name].start(n_components_in=6, n_components_out=6, rank=RANK, init=False)).any()


@pytest.mark.parametrize(("name", "sizes"), DEFINED)
def test_a_moved_core_is_the_product(name, sizes):
    n_components_in, n_components_out = sizes
    parts = random_parts(name, n_components_in, n_components_out, torch.float64)
    left, right = (
        torch.randn(4, n_components_out, dtype=torch.float64),
        torch.randn(n_components_in, 9, dtype=torch.float64),
    )
    moved = CORES[name].moved(parts, left=left, right=right)
    if name == "diagonal":
        assert moved is None  # L diag(d) R is not diagonal
        left, right = (
            torch.eye(8, n_components_out, dtype=torch.float64),
            torch.eye(n_components_in, 8, dtype=torch.float64),
        )
        moved = CORES[name].moved(parts, left=left, right=right)
        assert CORES[name].moved(parts, left=left, right=right[:, :7]) is None  # as many components on both sides
    Core(name, moved)
    torch.testing.assert_close(CORES[name].to_dense(moved), left @ oracle(name, parts) @ right)


def test_a_core_of_another_kind():
    core = Coefficients(torch.randn(6, 2), torch.randn(2, 6))
    assert core.kind == "low_rank"
    torch.testing.assert_close(core.to("full").dense(), core.dense())
    torch.testing.assert_close(core.to("diagonal").dense().diag(), core.dense().diag())
    torch.testing.assert_close(core.to("full").to("low_rank", rank=2).dense(), core.dense(), rtol=1e-4, atol=1e-5)


def test_the_old_name_is_read_and_warns_users_alone():
    with pytest.warns(DeprecationWarning, match="core='mixer' is deprecated .* use core='full'") as caught:
        assert core_kind("mixer").name == "full"
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert core_kind("mixer", from_file=True).name == "full"
        assert Core("mixer", {"coefficients_out": torch.ones(2, 2)}).kind == "full"


def test_what_does_not_fit_is_refused():
    with pytest.raises(SubspaceError, match="core='other' must be one of 'low_rank', 'full', 'diagonal', 'mixture'"):
        core_kind("other")
    with pytest.raises(SubspaceError, match="core='diagonal' pairs .* there are 7 and 5; use core='full'"):
        CORES["diagonal"].shapes(n_components_in=7, n_components_out=5, rank=1)
    with pytest.raises(SubspaceError, match="core='diagonal' pairs"):
        CORES["diagonal"].from_factors(torch.ones(5, 1), torch.ones(1, 7))
    with pytest.raises(SubspaceError, match="'mixture' has no start of its own"):
        CORES["mixture"].start(n_components_in=4, n_components_out=4, rank=2)
    for parts in (
        {"coefficients_out": torch.ones(3, 2)},
        {"coefficients_out": torch.ones(3, 2), "coefficients_in": torch.ones(3, 4)},
        {"coefficients_out": torch.ones(3, 2), "coefficients_in": torch.ones(2, 4), "more": torch.ones(1)},
    ):
        with pytest.raises(SubspaceError, match="kind 'low_rank' has the parts coefficients_in, coefficients_out"):
            Core("low_rank", parts)
