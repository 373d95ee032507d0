"""How many adapters' factors of one module fit into a memory limit, and the chunks they are read in."""

from collections.abc import Mapping

from eigenpeft.linalg.bases.chunked import SKETCH_FACTOR

_FLOAT, _HALF, _DOUBLE = 4, 2, 8
# What the iterative solver holds: this many blocks of a few more directions than are wanted (see linalg/krylov.py).
_BLOCKS, _OVERSAMPLING = 9, 9


def bytes_at_once(n_rows: int, shape: tuple[int, int], *, n_components: int) -> int:
    """Largest size of the tensors that fitting a module holds when it stacks all adapters' rows.

    Args:
        n_rows: Σ r over its adapters.
        shape: (out_features, in_features).
        n_components: Components wanted.
    """
    stacks = _FLOAT * n_rows * sum(shape)  # one adapter's factors beside them are little
    return stacks + _solver_bytes(n_rows, max(shape), n_components)


def bytes_of_chunk(n_rows: int, shape: tuple[int, int], *, n_components: int) -> int:
    """The same for one chunk of a single pass.

    Args:
        n_rows: Σ r over the chunk's adapters.
        shape: (out_features, in_features).
        n_components: Components wanted.
    """
    size = SKETCH_FACTOR * n_components
    merged_rows = n_rows + size
    factors = stacks = _FLOAT * n_rows * sum(shape)
    sketches = 2 * _FLOAT * size * sum(shape)  # the old ones and the new ones
    merged = _FLOAT * merged_rows * max(shape)
    return factors + stacks + sketches + merged + _solver_bytes(merged_rows, max(shape), size)


def chunk_adapters(
    ranks: Mapping[str, int], shape: tuple[int, int], *, n_components: int, memory_limit: int
) -> list[list[str]]:
    """Chunks of adapters whose single pass stays within the limit, in order.

    Args:
        ranks: Rank of each adapter that has the module.
        shape: (out_features, in_features).
        n_components: Components wanted.
        memory_limit: Bytes.

    Raises:
        ValueError: If not even one adapter fits.
    """
    least = bytes_of_chunk(max(ranks.values()), shape, n_components=n_components)
    if least > memory_limit:
        raise ValueError(
            f"memory_limit={memory_limit} bytes is too little for {n_components} components of a {shape[0]} x {shape[1]} "
            f"weight and one adapter of rank {max(ranks.values())}; pass at least {least}, or fewer components."
        )
    chunks: list[list[str]] = [[]]
    n_rows = 0
    for name, rank in ranks.items():
        if chunks[-1] and bytes_of_chunk(n_rows + rank, shape, n_components=n_components) > memory_limit:
            chunks.append([])
            n_rows = 0
        chunks[-1].append(name)
        n_rows += rank
    return chunks


def _solver_bytes(n_rows: int, width: int, n_components: int) -> int:
    q = min(n_rows, width)
    dense = 4 * _DOUBLE * min(q, max(512, 8 * (n_components + _OVERSAMPLING))) ** 2
    rounded_copy = _HALF * n_rows * width
    blocks = _FLOAT * _BLOCKS * min(n_components + _OVERSAMPLING, q) * q
    return max(dense, rounded_copy + blocks)
