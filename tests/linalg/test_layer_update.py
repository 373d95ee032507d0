"""The update by coefficients on components: every route against dense float64 algebra, and the choice of one."""

import itertools

import pytest
import torch

from eigenpeft.linalg.layer_update import (
    CHAIN,
    COMPONENTS_KEPT,
    INPUT_KEPT,
    Route,
    choose_route,
    core_updates,
    low_rank_update,
    low_rank_update_grad,
    low_rank_updates,
)

ROUTES = [Route(*bits) for bits in itertools.product([False, True], repeat=4)]


def problem(core="low_rank", *, tokens=7, n=9, m=11, k=5, r=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    coefficients_in = normal(r, k) if core == "low_rank" else None
    coefficients_out = {"low_rank": normal(k, r), "full": normal(k, k), "diagonal": normal(k)}[core]
    return (
        normal(tokens, m),
        normal(tokens, n),
        {
            "components_in": normal(k, n),
            "coefficients_in": coefficients_in,
            "coefficients_out": coefficients_out,
            "components_out": normal(k, m),
        },
    )


def dense_weight(components_in, coefficients_in, coefficients_out, components_out):
    """ΔW (m, n), formed as the equation is written."""
    left = torch.diag(coefficients_out) if coefficients_out.ndim == 1 else coefficients_out
    in_side = components_in if coefficients_in is None else coefficients_in @ components_in
    return torch.einsum("km,kr,rn->mn", components_out, left, in_side)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_every_route_is_the_dense_update_and_its_gradients(route):
    y, x, matrices = problem()
    leaves = [x, matrices["coefficients_in"], matrices["coefficients_out"]]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = y + x @ dense_weight(**matrices).mT
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    with torch.no_grad():
        output, kept = low_rank_update(y, x=x, **matrices, route=route)
        grads = low_rank_update_grad(
            grad, x=x if route.input_on_factor else None, kept=kept, **matrices, route=route, needs_x=True
        )
    torch.testing.assert_close(output, expected.detach())
    for value, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_cores_without_a_rank(core):
    y, x, matrices = problem(core)
    x.requires_grad_()
    matrices["coefficients_out"].requires_grad_()
    expected = y + x @ dense_weight(**matrices).mT
    expected_grads = torch.autograd.grad(expected, [x, matrices["coefficients_out"]], torch.ones_like(y))
    with torch.no_grad():
        output, kept = low_rank_update(y, x=x, **matrices, route=CHAIN)
        grad_x, no_grad, grad_out = low_rank_update_grad(
            torch.ones_like(y), x=None, kept=kept, **matrices, route=CHAIN, needs_x=True
        )
    assert no_grad is None
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(grad_x, expected_grads[0])
    torch.testing.assert_close(grad_out, expected_grads[1])


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_float32_is_right_to_rounding(route):
    y, x, matrices = problem(tokens=300, n=256, m=200, k=32, r=8)
    exact = y + x @ dense_weight(**matrices).mT
    output, _ = low_rank_update(
        y.float(), x=x.float(), **{name: matrix.float() for name, matrix in matrices.items()}, route=route
    )
    assert float((output - exact).norm() / exact.norm()) < 1e-6


def test_in_place_writes_over_y():
    y, x, matrices = problem()
    expected, _ = low_rank_update(y, x=x, **matrices, route=CHAIN)
    output, _ = low_rank_update(y, x=x, **matrices, route=CHAIN, in_place=True)
    assert output.data_ptr() == y.data_ptr()
    assert torch.equal(output, expected)


def test_nothing_is_computed_for_an_input_that_needs_no_gradient():
    y, x, matrices = problem()
    _, kept = low_rank_update(y, x=x, **matrices, route=COMPONENTS_KEPT)
    assert low_rank_update_grad(y, x=None, kept=kept, **matrices, route=COMPONENTS_KEPT, needs_x=False)[0] is None


def test_what_is_kept_is_as_wide_as_the_components():
    y, x, matrices = problem()
    assert low_rank_update(y, x=x, **matrices, route=COMPONENTS_KEPT)[1].shape == (7, 5)
    assert low_rank_update(y, x=x, **matrices, route=INPUT_KEPT)[1].shape == (7, 3)


@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 4096])
@pytest.mark.parametrize("n_components", [8, 32, 64, 256])
@pytest.mark.parametrize("rank", [1, 8, 16, 32])
def test_the_chosen_route_has_the_fewest_products_of_those_that_keep_as_much(tokens, n_components, rank):
    def cost(route):
        components, factor = tokens * n_components, tokens * max(rank, 16) + n_components * rank
        passes = [(1, 1, 1, 1), (2, 1, 2, 1)]
        # The input on the components is one product forwards; on the factor one forwards and one backwards.
        return sum(on * factor if choice else of * components for of, on, choice in zip(*passes, route, strict=True))

    chosen = choose_route(tokens, n_components=n_components, rank=rank)
    alike = [route for route in ROUTES if route.input_on_factor == chosen.input_on_factor]
    assert cost(chosen) == min(map(cost, alike))
    if n_components <= 4 * max(rank, 16):
        assert not chosen.input_on_factor


def test_cores_without_a_rank_are_chains():
    assert choose_route(4096, n_components=64, rank=None) == CHAIN


@pytest.mark.parametrize("length", [1, 3, 40])  # 1.75 r K / (K - r) = 13.1: on the components, and on factors
@pytest.mark.parametrize("in_place", [False, True])
def test_a_batch_of_many_tasks_is_the_loop(length, in_place):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    y, x = normal(5, length, 11), normal(5, length, 9)
    components_in, components_out, in_side, out_side = normal(5, 9), normal(5, 11), normal(4, 3, 5), normal(4, 5, 3)
    tasks = torch.tensor([2, 0, 2, 3, 1])
    expected = torch.stack(
        [
            y[i] + x[i] @ dense_weight(components_in, in_side[task], out_side[task], components_out).mT
            for i, task in enumerate(tasks)
        ]
    )
    output = low_rank_updates(
        y,
        x=x,
        members=tasks,
        components_in=components_in,
        coefficients_in=in_side,
        coefficients_out=out_side,
        components_out=components_out,
        in_place=in_place,
    )
    torch.testing.assert_close(output, expected)
    assert (output.data_ptr() == y.data_ptr()) == in_place


@pytest.mark.parametrize("in_place", [False, True])
def test_cores_of_several_forms_in_one_batch(in_place):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    y, projected, components_out = normal(5, 3, 11), normal(5, 3, 4), normal(6, 11)
    in_side, out_side, full = normal(2, 2, 4), normal(2, 6, 2), normal(1, 6, 4)
    rows = torch.tensor([3, 0]), torch.tensor([4])
    expected = y.clone()
    for place, row in enumerate(rows[0].tolist()):
        expected[row] += projected[row] @ (components_out.mT @ out_side[place] @ in_side[place]).mT
    expected[4] += projected[4] @ (components_out.mT @ full[0]).mT
    groups = [(rows[0], (in_side, out_side)), (rows[1], (full,))]
    got = core_updates(y.clone(), projected, groups, components_out=components_out, in_place=in_place)
    torch.testing.assert_close(got, expected)
    diagonal, square = normal(5, 4), normal(4, 11)
    got = core_updates(y.clone(), projected, [(None, (diagonal,))], components_out=square, in_place=in_place)
    torch.testing.assert_close(got, y + (projected * diagonal[:, None]) @ square)
