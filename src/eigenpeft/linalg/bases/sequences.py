"""Directions of earlier tasks: kept in a sketch, penalised, projected off, or left out of a start."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.bases.absorbing import directions_outside
from eigenpeft.linalg.orthogonal import orthonormal_rows


def frequent_directions(sketch: Float[Tensor, "l n"], rows: Float[Tensor, "p n"], *, size: int) -> Float[Tensor, "k n"]:
    """A sketch of at most `size` rows of everything seen: Frequent Directions.

    `S² := max(S² - S²_{size+1}, 0)` of the singular values of the sketch and the new rows together. With X all rows ever seen and B
    the sketch, `0 ≤ ‖Xv‖² - ‖Bv‖² ≤ ‖X - X_k‖² / (size + 1 - k)` for every unit vector v and every k ≤ size, X_k being the best
    approximation of rank k (Ghashami et al., arXiv 1501.01711, abstract: the bound for a sketch of l = size + 1 rows, of which the
    last is zero after each step); nothing else of the rows is kept. CoSO (arXiv 2505.11816) consolidates the
    gradients of a task by this sketch.

    Args:
        sketch: Sketch of the rows before; (0, n) for none.
        rows: New rows.
        size: Rows to keep, at least 1.

    Returns:
        The new sketch, with orthogonal rows, longest first, float64.

    Raises:
        ValueError: If `size` is less than 1.

    Example:
        >>> import torch
        >>> frequent_directions(torch.zeros(0, 2), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), size=1).abs().round(decimals=3)
        tensor([[2.8280, 0.0000]], dtype=torch.float64)
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1: the number of rows that the sketch may keep.")
    _, values, right = torch.linalg.svd(
        torch.cat([sketch.to(torch.float64), rows.to(torch.float64)]), full_matrices=False
    )
    squares = values.square()
    shrunk = (squares - squares[size] if len(squares) > size else squares).clamp(min=0.0)
    kept = shrunk[:size] > 1e-14 * squares[:1].clamp(min=torch.finfo(torch.float64).tiny)
    return shrunk[:size][kept].sqrt()[:, None] * right[:size][kept]


def span_of(rows: Float[Tensor, "p n"], *, tol: float = 1e-5) -> Float[Tensor, "k n"]:
    """Orthonormal rows of the span of rows, those below `tol` of the largest singular value left out.

    Args:
        rows: Any rows.
        tol: Relative size of what counts as rounding.

    Example:
        >>> import torch
        >>> len(span_of(torch.tensor([[1.0, 2.0], [2.0, 4.0]])))  # the second row adds nothing
        1
    """
    _, values, right = torch.linalg.svd(rows.to(torch.float64), full_matrices=False)
    return right[values > tol * values[:1].clamp(min=torch.finfo(torch.float64).tiny)]


def project_off(rows: Float[Tensor, "r n"], components: Float[Tensor, "k n"]) -> Float[Tensor, "r n"]:
    """`X (I - VᵀV)`: rows without what they have in the span of orthonormal rows V.

    Args:
        rows: X, such as a LoRA's A or its gradient.
        components: V, orthonormal rows.

    Returns:
        In the rows' dtype.

    Example:
        >>> import torch
        >>> project_off(torch.tensor([[3.0, 4.0]]), torch.eye(2)[:1])
        tensor([[0., 4.]])
    """
    exact, directions = rows.to(torch.float64), components.to(torch.float64)
    return (exact - (exact @ directions.mT) @ directions).to(rows.dtype)


def overlap_penalty(lora_A: Float[Tensor, "r n"], earlier: Sequence[Float[Tensor, "_r n"]]) -> Float[Tensor, ""]:
    """`Σ_s Σ_ij |(A_s Aᵀ)_ij|`: how far a task's A is from orthogonal to those of earlier tasks (O-LoRA, arXiv 2310.14152, eq. 7).

    Args:
        lora_A: A of the task in training.
        earlier: A_s of the tasks before.

    Example:
        >>> import torch
        >>> overlap_penalty(torch.tensor([[1.0, 2.0]]), [torch.tensor([[0.0, 1.0]])]).item()
        2.0
    """
    return torch.stack([(rows.to(lora_A.dtype) @ lora_A.mT).abs().sum() for rows in earlier]).sum()


def overlap_gradient(lora_A: Float[Tensor, "r n"], earlier: Sequence[Float[Tensor, "_r n"]]) -> Float[Tensor, "r n"]:
    """The gradient of `overlap_penalty`: `Σ_s sign(A A_sᵀ) A_s`.

    Args:
        lora_A: A of the task in training.
        earlier: A_s of the tasks before.

    Example:
        >>> import torch
        >>> overlap_gradient(torch.tensor([[1.0, 2.0]]), [torch.tensor([[0.0, 1.0]])])
        tensor([[0., 1.]])
    """
    gradient = torch.zeros_like(lora_A)
    for rows in earlier:
        own = rows.to(lora_A.dtype)
        gradient = gradient + (lora_A @ own.mT).sign() @ own
    return gradient


def inflora_start(inputs: Float[Tensor, "p n"], memory: Float[Tensor, "k n"], *, rank: int) -> Float[Tensor, "r n"]:
    """A of a task that cannot disturb earlier ones: the leading directions of its inputs outside their memory.

    `A = top_r(X (I - MᵀM))`, which stays frozen while B is trained (InfLoRA, arXiv 2404.00228, section 3.3): `ΔW x = 0` for every
    x in the memory.

    Args:
        inputs: Rows x of the new task at the module.
        memory: M, orthonormal rows; (0, n) for the first task.
        rank: r.

    Returns:
        Orthonormal rows, fewer than r where the inputs have fewer directions outside the memory; float64.

    Raises:
        ValueError: If the rank is less than 1, or the memory has more rows than columns.

    Example:
        >>> import torch
        >>> inputs = torch.tensor([[1.0, 2.0, 0.0]])
        >>> inflora_start(inputs, torch.eye(3)[:1], rank=1).abs()  # nothing of the first axis, which the memory holds
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    return directions_outside(inputs, memory)[0][:rank]


def grow_memory(
    memory: Float[Tensor, "k n"], inputs: Float[Tensor, "p n"], *, held_share: float = 0.95
) -> Float[Tensor, "l n"]:
    """The memory with the fewest directions more that make it hold a share of a task's inputs, `‖X Mᵀ‖² ≥ held_share ‖X‖²`.

    The update of the gradient projection memory (arXiv 2103.09762, eq. 9) that InfLoRA uses.

    Args:
        memory: M, orthonormal rows; (0, n) for none.
        inputs: Rows x of the task that has been trained.
        held_share: In (0, 1].

    Returns:
        Orthonormal rows, the old ones first, float64.

    Raises:
        ValueError: If `held_share` is out of range, or the memory has more rows than columns.

    Example:
        >>> import torch
        >>> grow_memory(torch.eye(3)[:1], torch.tensor([[1.0, 2.0, 0.0]])).abs()
        tensor([[1., 0., 0.],
                [0., 1., 0.]], dtype=torch.float64)
    """
    if not 0.0 < held_share <= 1.0:
        raise ValueError(
            f"held_share={held_share} must be in (0, 1]: the share of the inputs' squared norm that the memory is to hold."
        )
    exact = inputs.to(torch.float64)
    memory = orthonormal_rows(memory.to(torch.float64)) if len(memory) else memory.to(torch.float64)
    total = float(exact.square().sum())
    directions, values = directions_outside(exact, memory)
    held = float((exact @ memory.mT).square().sum()) + torch.cat([values.new_zeros(1), values.square().cumsum(0)])
    enough = (held >= held_share * total * (1 - 1e-9)).nonzero()
    return torch.cat([memory, directions[: int(enough[0]) if len(enough) else len(directions)]])
