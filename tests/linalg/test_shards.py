"""Vectors of shards: the gather beside plain loops, its gradient, and what an index is made of."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.shards import composed, shard_index


@pytest.mark.parametrize(("rank", "length", "width"), [(3, 2, 5), (1, 1, 4), (4, 3, 1)])
def test_vectors_are_shards_end_to_end_and_gradients_add_up(rank, length, width):
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(7, width, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(7, (rank, length), generator=generator)
    vectors = composed(pool, index)
    loops = np.stack([np.concatenate([pool.detach().numpy()[j] for j in row]) for row in index.tolist()])
    np.testing.assert_array_equal(vectors.detach().numpy(), loops)
    weights = torch.randn(vectors.shape, generator=generator, dtype=torch.float64)
    (vectors * weights).sum().backward()
    expected = np.zeros(pool.shape)
    for i, row in enumerate(index.tolist()):
        for j, shard in enumerate(row):
            expected[shard] += weights[i, j * width : (j + 1) * width].numpy()
    np.testing.assert_allclose(pool.grad.numpy(), expected, atol=1e-14)


@pytest.mark.parametrize(("rank", "private", "length", "public"), [(5, 2, 3, 20), (4, 4, 2, 0), (3, 0, 1, 3)])
def test_private_shards_lie_in_one_place_and_public_ones_at_most_in_one(rank, private, length, public):
    index = shard_index(
        rank,
        n_public=public,
        n_private=private,
        shards_per_vector=length,
        generator=torch.Generator().manual_seed(1),
    )
    assert index.shape == (rank, length)
    own = sorted(index[rank - private :].flatten().tolist())
    assert own == list(range(public, public + private * length))
    drawn = index[: rank - private].flatten().tolist()
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= shard < public for shard in drawn)


def test_a_seed_fixes_the_draw_and_no_generator_takes_the_first():
    sizes = {"n_public": 30, "n_private": 1, "shards_per_vector": 2}
    draws = [shard_index(6, **sizes, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert shard_index(6, **sizes)[:5].flatten().tolist() == list(range(10))


def test_too_small_a_pool_is_refused():
    with pytest.raises(ValueError, match="4 vectors of 2 shards need 8 of 7 public shards"):
        shard_index(5, n_public=7, n_private=1, shards_per_vector=2)
