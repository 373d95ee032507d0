"""Orthonormal rows: making them, completing them, fixing their signs, and the angles between their spans."""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor


def fix_signs(components: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Flip rows so that the entry of largest magnitude of each is positive; singular vectors have no sign of their own.

    Args:
        components: Rows; left unchanged.

    Returns:
        The rows, flipped where needed. A row of zeros stays as it is.

    Example:
        >>> import torch
        >>> fix_signs(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        tensor([[-1.0000,  2.0000],
                [ 0.5000,  0.0000]])
    """
    if components.numel() == 0:
        return components.clone()
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(components.dtype)
    return components * signs + 0.0  # no negative zeros: equal results should also look equal


def unit_rows(rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Each row divided by its Euclidean norm; a row of zeros stays one.

    Args:
        rows: (k, n).

    Examples:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def orthonormal_rows(rows: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Orthonormal rows with the span of `rows`: row j of the result lies in the span of the first j + 1 rows.

    A QR decomposition in float64 with a positive diagonal, so that the result is unique and each row points the way of
    the row it came from.

    Args:
        rows: At most n linearly independent rows. Dependent rows are not refused; they give arbitrary directions.

    Returns:
        Orthonormal rows; float64 if `rows` is, else float32.

    Raises:
        ValueError: If there are more rows than columns.

    Examples:
        >>> import torch
        >>> orthonormal_rows(torch.tensor([[2.0, 0.0], [1.0, 1.0]])).abs().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    k, n = rows.shape
    if k > n:
        raise ValueError(f"{k} rows of length {n} cannot be orthonormal; pass at most {n} rows.")
    q, r = torch.linalg.qr(rows.to(torch.float64).mT)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs).mT.contiguous().to(torch.promote_types(rows.dtype, torch.float32))


def random_complement(
    components: Float[Tensor, "k n"], *, n_pseudo_components: int, generator: Generator
) -> Float[Tensor, "n_pseudo_components n"]:
    """Random orthonormal directions orthogonal to the given ones: `q` of the QR decomposition of `N (I - VᵀV)`, N normal.

    The pseudo-components ("pseudo-PCs") with which EigenLoRAx augments the subspace of its algorithm 1 where adapters are few
    (arXiv 2502.04700, abstract: "augmented with orthogonal basis vectors in low-resource scenarios"), by Gram-Schmidt.

    Args:
        components: Orthonormal rows.
        n_pseudo_components: Number of directions to add; 0 gives an empty matrix.
        generator: Source of the random numbers, on any device.

    Returns:
        Rows uniformly distributed on the complement, in the device and dtype of `components` (float32 at least).

    Raises:
        ValueError: If `n_pseudo_components` is negative or the complement has fewer than `n_pseudo_components` dimensions.

    Examples:
        >>> import torch
        >>> random_complement(torch.eye(3)[:2], n_pseudo_components=1, generator=torch.Generator().manual_seed(0)).abs().tolist()
        [[0.0, 0.0, 1.0]]
    """
    k, n = components.shape
    if not 0 <= n_pseudo_components <= n - k:
        raise ValueError(
            f"n_pseudo_components={n_pseudo_components} directions cannot be added to {k} components of length {n}; "
            f"pass 0 to {n - k}."
        )
    noise = torch.randn(n_pseudo_components, n, generator=generator, device=generator.device, dtype=torch.float64)
    noise = noise.to(components.device)
    exact = orthonormal_rows(components.to(torch.float64))  # components in float32 are orthonormal to 1e-7 only
    extra = orthonormal_rows(noise - (noise @ exact.mT) @ exact)
    return extra.to(torch.promote_types(components.dtype, torch.float32))


def principal_angles(a: Float[Tensor, "k n"], b: Float[Tensor, "l n"]) -> Float[Tensor, " angles"]:
    """Angles between the spans of two sets of rows, smallest first.

    The cosines are the singular values of `Q_a Q_bᵀ`, the sines those of `Q_b - Q_b Q_aᵀ Q_a`. A cosine cannot tell
    angles below 1e-8 from zero, a sine can; each angle is taken from the better of the two (Björck and Golub,
    Mathematics of Computation 27, 1973, section 3).

    Rows that depend on one another are not refused; what they lack is filled with arbitrary directions, and so are the angles.

    Args:
        a: Linearly independent rows, orthonormal or not.
        b: Linearly independent rows, orthonormal or not.

    Returns:
        (min(k, l),) angles in radians, ascending, float64.

    Raises:
        ValueError: If one of them has more rows than columns.

    Example:
        >>> import torch
        >>> angle = principal_angles(torch.eye(3)[:2], torch.tensor([[1.0, 0.0, 1e-9]]))
        >>> f"{angle.item():.3e}"
        '1.000e-09'
    """
    larger, smaller = (a, b) if len(a) >= len(b) else (b, a)
    q_larger = orthonormal_rows(larger.to(torch.float64))
    q_smaller = orthonormal_rows(smaller.to(torch.float64))
    overlap = q_smaller @ q_larger.mT
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(q_smaller - overlap @ q_larger).flip(0).clamp(max=1.0)
    return torch.where(cosines > math.sqrt(0.5), sines.asin(), cosines.acos())
