"""Principal components of centred rows that keep the direction of the mean."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from eigenpeft.linalg.decompose import Decomposition, leading_components, numerical_rank
from eigenpeft.linalg.orthogonal import fix_signs, orthonormal_rows


def centred_components(
    rows: Float[Tensor, "p n"], *, n_components: int, tol: float = 1e-4, generator: Generator | None = None
) -> Decomposition:
    """The mean's direction, then the principal components of the centred rows, made orthogonal to it.

    Subtracting the mean and not keeping it would lose every row's part along it (EigenLoRAx, arXiv 2502.04700,
    algorithm 1, centres its rows). The result spans the mean and the leading K - 1 principal components; where the
    mean already lies in their span, it spans the leading K.

    Args:
        rows: The stack.
        n_components: K, at least 1.
        tol: As for `leading_components`.
        generator: As for `leading_components`.

    Returns:
        `Decomposition` with min(K, numerical rank of the stack) components. The first singular value is √p ‖mean‖, the
        others are those of the centred stack; a mean of zero is left out.

    Raises:
        ValueError: If `n_components` is less than 1.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[2.0, 1.0, 0.0], [2.0, -1.0, 0.0]])
        >>> centred_components(rows, n_components=2).components.abs()  # the mean's direction first
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    mean = rows.mean(dim=0)
    mean_value = torch.linalg.vector_norm(mean) * len(rows) ** 0.5
    found = leading_components(rows - mean, n_components=n_components, tol=tol, generator=generator)
    largest = torch.cat([mean_value[None], found.singular_values]).amax()
    # Rank is judged against the uncentred stack: what centring leaves of equal rows is rounding noise.
    rank = numerical_rank(torch.cat([largest[None], found.singular_values])) - 1
    components, values = found.components[:rank], found.singular_values[:rank]
    if numerical_rank(torch.stack([largest, mean_value])) == 2:
        direction = mean / torch.linalg.vector_norm(mean)
        # If the mean lies in the span of the leading components, one of them adds nothing to it and the others.
        missed = 1.0 - (components.to(torch.float64) @ direction.to(torch.float64)).square().cumsum(0)
        spanned = (missed < 1e-9).nonzero()
        independent = torch.ones(rank, dtype=torch.bool, device=rows.device)
        if len(spanned):
            independent[spanned[0]] = False
        components = torch.cat([direction[None], components[independent]])[:n_components]
        values = torch.cat([mean_value[None], values[independent]])[:n_components]
        components = torch.cat([components[:1], fix_signs(orthonormal_rows(components))[1:]])
    return Decomposition(
        components=fix_signs(components),
        singular_values=values,
        total_squared_norm=found.total_squared_norm + float(mean_value) ** 2,
        n_iterations=found.n_iterations,
        relative_residual=found.relative_residual,
    )
