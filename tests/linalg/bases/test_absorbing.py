"""Growing bases: what is added, that nothing old is turned, and shares against dense float64 projections."""

import pytest
import torch

from eigenpeft.linalg.bases.absorbing import lacking_directions

M, N = 14, 11


def bases(k, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64))[0].mT.float()


def adapters(ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(M, r, generator=generator), torch.randn(r, N, generator=generator)) for r in ranks]


def held(factors, V_out, V_in):
    """Mean share of the adapters' squared norms, from dense matrices in float64."""
    V_out, V_in = V_out.double(), V_in.double()
    shares = []
    for B, A in factors:
        update = B.double() @ A.double()
        shares.append((torch.linalg.norm(V_out @ update @ V_in.mT) / torch.linalg.norm(update)) ** 2)
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize("k", [(0, 0), (3, 3), (4, 2)])
@pytest.mark.parametrize("ranks", [(2,), (2, 1, 3)])
def test_all_directions_hold_everything_and_the_old_ones_stay(k, ranks):
    V_in, V_out = bases(k[0], N, 1), bases(k[1], M, 2)
    factors = adapters(ranks)
    grown = lacking_directions(factors, components_in=V_in, components_out=V_out)
    for old, new in ((V_in, grown.components_in), (V_out, grown.components_out)):
        both = torch.cat([old, new]).double()
        torch.testing.assert_close(both @ both.mT, torch.eye(len(both), dtype=torch.float64), rtol=0, atol=1e-6)
    after = held(factors, torch.cat([V_out, grown.components_out]), torch.cat([V_in, grown.components_in]))
    assert after == pytest.approx(1.0, abs=1e-6)
    assert grown.share_after == pytest.approx(after, abs=1e-6)
    assert grown.share_before == pytest.approx(held(factors, V_out, V_in), abs=1e-6)
    assert len(grown.components_in) == min(sum(ranks), N - k[0])
    assert len(grown.singular_values_out) == len(grown.components_out) == sum(ranks)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_share_takes_the_fewest_directions_that_reach_it(share):
    V_in, V_out, factors = bases(2, N, 3), bases(2, M, 4), adapters((3, 3))
    everything = lacking_directions(factors, components_in=V_in, components_out=V_out)
    grown = lacking_directions(factors, components_in=V_in, components_out=V_out, held_share=share)
    curve = [
        held(
            factors,
            torch.cat([V_out, everything.components_out[:j]]),
            torch.cat([V_in, everything.components_in[:j]]),
        )
        for j in range(7)
    ]
    expected = next(j for j, value in enumerate(curve) if value >= share - 1e-6)
    assert 0 < expected < 6, "a share that takes none or all would test nothing"
    assert len(grown.components_in) == len(grown.components_out) == expected
    assert grown.share_after == pytest.approx(curve[expected], abs=1e-6)


def test_adapters_inside_the_span_add_nothing():
    V_in, V_out = bases(4, N, 5), bases(4, M, 6)
    inside = [(V_out.mT @ torch.randn(4, 2), torch.randn(2, 4) @ V_in)]
    grown = lacking_directions(inside, components_in=V_in, components_out=V_out)
    assert len(grown.components_in) == len(grown.components_out) == 0
    assert grown.share_before == pytest.approx(1.0, abs=1e-6)


def test_untrained_adapters_add_nothing():
    V_in, V_out = bases(4, N, 5), bases(4, M, 6)
    grown = lacking_directions([(torch.zeros(M, 2), torch.randn(2, N))], components_in=V_in, components_out=V_out)
    assert (len(grown.components_in), grown.share_after) == (0, 1.0)


def test_the_directions_are_of_the_updates_and_not_of_their_factors():
    V_in, V_out, factors = bases(2, N, 3), bases(2, M, 4), adapters((3,))
    turn = torch.randn(3, 3) + 3 * torch.eye(3)
    turned = [(B @ torch.linalg.inv(turn), turn @ A) for B, A in factors]
    one, two = (
        lacking_directions(each, components_in=V_in, components_out=V_out, held_share=0.7) for each in (factors, turned)
    )
    torch.testing.assert_close(one.components_in, two.components_in, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        lacking_directions(
            adapters((1,)), components_in=bases(2, N, 3), components_out=bases(2, M, 4), held_share=share
        )
