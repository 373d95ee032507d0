"""Top-K components of a stack of rows, dense for small stacks and by block Krylov iteration for large ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from eigenpeft.linalg.krylov import block_krylov
from eigenpeft.linalg.orthogonal import fix_signs, orthonormal_rows

# Up to this length of the smaller side all its eigenvectors, to the last digit, cost too little to look for less.
_DENSE_LIMIT = 512
# Directions the iteration carries beyond the wanted ones: the first unwanted ones then decide how fast it converges.
_OVERSAMPLING = 8
# Squares of singular values ratios below this drown in float32 Rayleigh-Ritz values; float64 takes over.
_SINGLE_PRECISION_RATIO = 1e-4
# Rounding of bfloat16 passes ends their convergence here.
_BFLOAT16_TOL, _BFLOAT16_PASSES = 1e-4, 8
# Bytes of float64 copies of parts of the stack.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Leading right singular vectors of a stack of rows.

    Attributes:
        components: Orthonormal rows, leading first, signs fixed.
        singular_values: Singular values of the stack, descending.
        total_squared_norm: ‖rows‖_F², so that `singular_values**2 / total_squared_norm` is each component's share.
        n_iterations: Passes over the rows; 1 for the dense method.
        relative_residual: Estimated relative gain of each component's squared norm by one more pass, their mean; 0 for
            the dense method.
    """

    components: Float[Tensor, "k n"]
    singular_values: Float[Tensor, " k"]
    total_squared_norm: float
    n_iterations: int
    relative_residual: float


def numerical_rank(singular_values: Float[Tensor, " k"]) -> int:
    """How many singular values are not rounding noise: those above 1e-5 of the largest in float32, 1e-7 in float64.

    float32 rounding leaves about 1e-7 √n of the largest value in every direction, which 1e-5 clears up to
    n = 10,000. In float64 the limit is what the eigenvalues of a Gram matrix, the squares, can tell from
    rounding: √(2⁻⁵²) = 1.5e-8.

    Args:
        singular_values: Descending; their dtype decides the limit.

    Returns:
        The rank, 0 if all values are zero.

    Examples:
        >>> import torch
        >>> numerical_rank(torch.tensor([1.0, 0.1, 1e-7]))
        2
    """
    if len(singular_values) == 0:
        return 0
    limit = 1e-7 if singular_values.dtype == torch.float64 else 1e-5
    return int((singular_values > limit * singular_values[0]).sum())


def full_spectrum(rows: Float[Tensor, "p n"]) -> Float[Tensor, " q"]:
    """All q = min(p, n) singular values of a stack, from the eigenvalues of the smaller Gram matrix in float64.

    Costs one product of the stack with itself and q³ operations; values below 1e-8 of the largest are rounding noise.

    Args:
        rows: The stack.

    Returns:
        Singular values, descending; float64 if `rows` is, else float32.

    Examples:
        >>> import torch
        >>> full_spectrum(torch.tensor([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]])).tolist()
        [5.0, 1.0]
    """
    eigenvalues = torch.linalg.eigvalsh(_small_gram(rows)).flip(0)
    return eigenvalues.clamp(min=0.0).sqrt().to(torch.promote_types(rows.dtype, torch.float32))


def leading_components(
    rows: Float[Tensor, "p n"],
    *,
    n_components: int,
    tol: float = 1e-4,
    generator: Generator | None = None,
    method: Literal["auto", "dense", "krylov"] = "auto",
    allow_fewer: bool = True,
) -> Decomposition:
    """The K leading right singular vectors of a stack of rows, not centred; fewer where the numerical rank is smaller.

    With q = min(p, n): up to q = 512 the eigenvectors of the smaller Gram matrix, in float64; above, adaptive block
    Krylov iteration (Musco and Musco, arXiv 1504.05477, algorithm 2) with a stop on the estimated gain. Neither forms
    an n x n matrix when n is the larger side.

    Args:
        rows: The stack; bfloat16 and float16 are computed in float32.
        n_components: K, at least 1.
        tol: The iteration stops when one more pass promises to raise each component's squared norm by less than
            `tol / 100` of it, on average; so 1e-4 misses about 1e-6 of the squared norm. Ignored by the dense method.
        generator: Source of the iteration's random start; None always takes the same start. Ignored by the dense
            method.
        method: "dense", "krylov", or "auto" to choose by size.
        allow_fewer: Whether a numerical rank below K gives that many components; else it is refused.

    Returns:
        `Decomposition` with min(K, numerical rank) components; float64 if `rows` is, else float32.

    Raises:
        ValueError: If `n_components` is less than 1, or above the numerical rank without `allow_fewer`, or `method` is
            unknown.

    Examples:
        >>> import torch
        >>> found = leading_components(torch.tensor([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]]), n_components=1)
        >>> found.components, found.singular_values
        (tensor([[1., 0.]]), tensor([5.]))
        >>> leading_components(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), n_components=2).singular_values.tolist()
        [5.0]
    """
    if n_components < 1:
        raise ValueError(f"n_components={n_components} is not a number of components; pass at least 1.")
    if method not in ("auto", "dense", "krylov"):
        raise ValueError(f"method={method!r} is unknown; pass 'auto', 'dense' or 'krylov'.")
    q = min(rows.shape)
    most = min(n_components, q)
    if method == "auto":
        # A block that fills an eighth of the space is no cheaper than all of it where the spectrum is nearly flat.
        dense = q <= _DENSE_LIMIT or 8 * (n_components + _OVERSAMPLING) >= q
        method = "dense" if dense else "krylov"
    found = _dense(rows, most) if method == "dense" else _krylov(rows, most, tol=tol, generator=generator)
    rank = len(found.singular_values)
    if rank < n_components and not allow_fewer:
        raise ValueError(
            f"n_components={n_components} exceeds the numerical rank {rank} of the {rows.shape[0]} x {rows.shape[1]} "
            + (f"stack; pass at most {rank}." if rank else "stack of zeros, which has no components.")
        )
    return found


def _dense(rows: Float[Tensor, "p n"], n_components: int) -> Decomposition:
    gram = _small_gram(rows)
    total_squared_norm = float(gram.trace())
    eigenvalues, vectors = torch.linalg.eigh(gram)
    leading, vectors = eigenvalues.flip(0)[:n_components], vectors.mT.flip(0)[:n_components]
    return _finish(rows, leading, vectors, total_squared_norm=total_squared_norm, n_iterations=1, relative_residual=0.0)


def _krylov(rows: Float[Tensor, "p n"], n_components: int, *, tol: float, generator: Generator | None) -> Decomposition:
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    block_size = min(n_components + _OVERSAMPLING, *rows.shape)
    noise = torch.randn(block_size, max(rows.shape), generator=generator, device=generator.device)
    noise, n_rough = noise.to(rows.device, dtype), 0
    if rows.dtype != torch.float64 and _multiplies_bfloat16(rows.device):
        # Passes in bfloat16 cost a third and find a decaying spectrum's subspace to 1e-4 of its squared norm (a nearly flat
        # one's to 1e-2); passes in float32 finish it. The rounded copy is half as large as float32 rows.
        rounded = rows.to(torch.bfloat16)
        start = _half_pass(rounded, noise.to(torch.bfloat16), to_short_side=True).to(dtype)
        rough = block_krylov(
            lambda block: _apply_gram_bfloat16(rounded, block),
            start,
            n_components=n_components,
            tol=_BFLOAT16_TOL,
            rounding=torch.finfo(torch.bfloat16).eps,
            max_passes=_BFLOAT16_PASSES,
        )
        n_rough = rough.n_passes
        if len(rough.vectors) == block_size:  # else bfloat16 saw a smaller rank than there may be
            start = rough.vectors
        del rounded
    else:
        start = _half_pass(rows, noise, to_short_side=True)
    found = block_krylov(
        lambda block: _apply_gram(rows, block),
        start,
        n_components=n_components,
        tol=tol / 100,
        rounding=torch.finfo(dtype).eps,
    )
    values, vectors, n_iterations = found.values, found.vectors, n_rough + found.n_passes
    if len(values) and values[min(n_components, len(values)) - 1] < _SINGLE_PRECISION_RATIO * values[0]:
        basis = orthonormal_rows(found.basis.to(torch.float64))
        image = _apply_gram(rows, basis)
        projected = basis @ image.mT
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        values, rotation = values.flip(0)[:block_size], rotation.flip(1)[:, :block_size]
        # The images, not the Ritz vectors: one more power step, in the precision that small values need.
        vectors, n_iterations = rotation.mT @ image, n_iterations + 1
    return _finish(
        rows,
        values[:n_components],
        vectors[:n_components],
        total_squared_norm=_squared_norm(rows),
        n_iterations=n_iterations,
        relative_residual=found.promised_gain,
    )


def _finish(
    rows: Float[Tensor, "p n"],
    eigenvalues: Float[Tensor, " k"],
    vectors: Float[Tensor, "k q"],
    *,
    total_squared_norm: float,
    n_iterations: int,
    relative_residual: float,
) -> Decomposition:
    """From eigenpairs of the smaller Gram matrix to right singular vectors, without those of rounding noise."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    singular_values = eigenvalues.clamp(min=0.0).sqrt().to(dtype)
    rank = numerical_rank(singular_values)
    components = vectors[:rank]
    if rows.shape[0] < rows.shape[1]:
        components = _half_pass(rows, components, to_short_side=False)
    return Decomposition(
        components=fix_signs(orthonormal_rows(components).to(dtype)),
        singular_values=singular_values[:rank],
        total_squared_norm=total_squared_norm,
        n_iterations=n_iterations,
        relative_residual=relative_residual,
    )


def _chunks(rows: Float[Tensor, "p n"], dtype: torch.dtype) -> Iterator[Tensor]:
    """Consecutive parts of the stack in another precision, without a copy of the whole."""
    if rows.dtype == dtype:
        yield rows
        return
    for part in rows.split(max(1, _CHUNK_BYTES // (8 * max(1, rows.shape[1])))):
        yield part.to(dtype)


def _squared_norm(rows: Float[Tensor, "p n"]) -> float:
    """‖rows‖_F², added up in float64 over rows whose own norms are float32's."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return float(torch.linalg.vector_norm(rows, dim=1, dtype=dtype).to(torch.float64).square().sum())


def _small_gram(rows: Float[Tensor, "p n"]) -> Float[Tensor, "q q"]:
    """`X Xᵀ` or `Xᵀ X`, whichever is smaller, in float64."""
    tall = rows if rows.shape[0] >= rows.shape[1] else rows.mT
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=rows.device)
    for part in _chunks(tall, torch.float64):
        gram += part.mT @ part
    return gram


def _half_pass(rows: Float[Tensor, "p n"], block: Float[Tensor, "b long_or_short"], *, to_short_side: bool) -> Tensor:
    """`block @ X` or `block @ Xᵀ`, in the block's precision, to the short or the long side of X."""
    p, n = rows.shape
    if (p >= n) == to_short_side:
        image, start = block.new_zeros(len(block), n), 0
        for part in _chunks(rows, block.dtype):
            image += block[:, start : start + len(part)] @ part
            start += len(part)
        return image
    return torch.cat([block @ part.mT for part in _chunks(rows, block.dtype)], dim=1)


def _apply_gram(rows: Float[Tensor, "p n"], block: Float[Tensor, "b q"]) -> Float[Tensor, "b q"]:
    """`block @ G` for the smaller Gram matrix G of the stack, in the block's precision."""
    return _half_pass(rows, _half_pass(rows, block, to_short_side=False), to_short_side=True)


def _apply_gram_bfloat16(rows: Float[Tensor, "p n"], block: Float[Tensor, "b q"]) -> Float[Tensor, "b q"]:
    """`_apply_gram` of bfloat16 rows with bfloat16 products, which add up in float32."""
    tall = rows if rows.shape[0] >= rows.shape[1] else rows.mT
    return ((block.to(torch.bfloat16) @ tall.mT) @ tall).to(block.dtype)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there; elsewhere they are emulated, and slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # no public question exists (torch 2.13)
    return device.type == "cpu" and supported is not None and supported()
