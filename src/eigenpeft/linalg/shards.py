"""Vectors that are put together from the shards of a pool (MoS, arXiv 2410.00938, section 3)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding


def composed(pool: Float[Tensor, "n w"], index: Int[Tensor, "r l"]) -> Float[Tensor, "r lw"]:
    """Vectors of l shards each: row i is `[pool[index[i, 0]], ..., pool[index[i, l - 1]]]`, end to end.

    Linear in the pool, so that gradients of a shard add up over the places that take it.

    Args:
        pool: n shards of width w.
        index: Shard of each place.

    Examples:
        >>> composed(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1, 0], [1, 1]])).tolist()
        [[3.0, 4.0, 1.0, 2.0], [3.0, 4.0, 3.0, 4.0]]
    """
    return embedding(index, pool).flatten(1)


def shard_index(
    n_vectors: int,
    *,
    n_public: int,
    n_private: int,
    shards_per_vector: int,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "r l"]:
    """Which shards of the pool `[public; private]` make a layer's vectors.

    The last `n_private` vectors have the private shards, each in one place. The others have public shards: with a generator a
    random subset of them in random order, none twice in one layer; without one the first ones in order.

    Args:
        n_vectors: r, vectors of the layer.
        n_public: Public shards of the pool.
        n_private: Vectors of the layer's own.
        shards_per_vector: l.
        generator: Generator of the random subset; None takes the first shards.

    Raises:
        ValueError: If the pool has fewer public shards than the layer needs.

    Examples:
        >>> shard_index(3, n_public=4, n_private=1, shards_per_vector=2).tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    n_drawn, length = n_vectors - n_private, shards_per_vector
    if n_drawn * length > n_public:
        raise ValueError(
            f"{n_drawn} vectors of {length} shards need {n_drawn * length} of {n_public} public shards; take fewer shards, or "
            "more public ones."
        )
    order = torch.arange(n_public) if generator is None else torch.randperm(n_public, generator=generator)
    public = order[: n_drawn * length].view(n_drawn, length)
    private = n_public + torch.arange(n_private * length).view(n_private, length)
    return torch.cat([public, private])
