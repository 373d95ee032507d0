"""Cores weighed for every token, beside NumPy loops in float64; the gradient; the load-balance loss."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.gated import arrow_prototypes, arrow_weights, gated_core, load_balance, weighed_core


def problem(shape=(3, 4), *, n_in=5, n_out=6, n_cores=3):
    generator = torch.Generator().manual_seed(0)
    sizes = ((*shape, n_in), (n_cores, n_in), (n_cores, n_out, n_in))
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("shape", [(3, 4), (2,), (2, 1, 3)])
def test_every_token_has_its_own_sum_of_cores(shape):
    z, gate, cores = problem(shape)
    found, weights = gated_core(z, gate, cores)
    for place in np.ndindex(*shape):
        token, W, M = z.detach().numpy()[place], gate.detach().numpy(), cores.detach().numpy()
        scores = np.exp(W @ token - (W @ token).max())
        g = scores / scores.sum()
        np.testing.assert_allclose(weights.detach().numpy()[place], g, rtol=1e-12)
        expected = sum(g[e] * (M[e] @ token) for e in range(len(g)))
        np.testing.assert_allclose(found.detach().numpy()[place], expected, rtol=1e-12, atol=1e-14)
        assert np.linalg.norm(expected) <= max(np.linalg.norm(m, 2) for m in M) * np.linalg.norm(token) + 1e-12


def test_gradients():
    assert torch.autograd.gradcheck(lambda *parts: gated_core(*parts)[0], problem())
    assert torch.autograd.gradcheck(lambda *parts: load_balance(gated_core(*parts)[1]), problem())


def test_balance_is_one_where_cores_weigh_alike_and_their_number_where_one_has_everything():
    assert float(load_balance(torch.full((5, 4), 0.25))) == pytest.approx(1.0)
    assert float(load_balance(torch.eye(4)[[2, 2, 2]])) == pytest.approx(4.0)
    g = torch.softmax(torch.randn(7, 3, generator=torch.Generator().manual_seed(1)), dim=-1).double()
    mean = g.mean(0).numpy()
    assert float(load_balance(g)) == pytest.approx(1 + mean.var() / mean.mean() ** 2)


@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(3, 4), (2,)])
def test_arrow_weighs_the_cores_that_act_most_on_a_token(shape, top_k):
    z, _, cores = (part.detach() for part in problem(shape))
    cores[1] = 0  # a member that does not adapt the module
    prototypes = arrow_prototypes(cores)
    for core, prototype in zip(cores.numpy(), prototypes.numpy(), strict=True):
        values, vectors = np.linalg.eigh(core.T @ core)
        cosine = abs(vectors[:, -1] @ prototype)
        assert cosine == pytest.approx(1.0 if values[-1] > 0 else 0.0, abs=1e-12)
    weights = arrow_weights(z, prototypes, top_k=top_k)
    found = weighed_core(z, weights, cores)
    for place in np.ndindex(*shape):
        token = z.numpy()[place]
        scores = np.abs(prototypes.numpy() @ token)
        best = np.argsort(-scores)[:top_k]
        g = np.zeros(len(cores))
        g[best] = np.exp(scores[best]) / np.exp(scores[best]).sum()
        np.testing.assert_allclose(weights.numpy()[place], g, rtol=1e-12)
        expected = sum(g[e] * (cores.numpy()[e] @ token) for e in range(len(g)))
        np.testing.assert_allclose(found.numpy()[place], expected, rtol=1e-12, atol=1e-14)
    turned = arrow_weights(z, -prototypes, top_k=top_k)
    assert torch.equal(turned, weights)
