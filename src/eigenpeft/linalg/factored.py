"""Matrices given as factors `B A`: norms, products, singular values, truncation; the product is never formed."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eigenpeft.linalg.decompose import numerical_rank


@dataclass(frozen=True)
class FactoredSvd:
    """Thin singular value decomposition `B A = U diag(S) Vh`, k = min(r, m, n).

    Attributes:
        U: Left singular vectors as columns.
        S: Singular values, descending.
        Vh: Right singular vectors as rows.
    """

    U: Float[Tensor, "m k"]
    S: Float[Tensor, " k"]
    Vh: Float[Tensor, "k n"]


def frobenius_norm(lora_B: Float[Tensor, "m r"], lora_A: Float[Tensor, "r n"]) -> Float[Tensor, ""]:
    """‖B A‖_F, from `‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ)`.

    Args:
        lora_B: Left factor.
        lora_A: Right factor.

    Returns:
        A float64 scalar.

    Example:
        >>> import torch
        >>> frobenius_norm(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]])).item()
        10.0
    """
    return inner_product(lora_B, lora_A, other_B=lora_B, other_A=lora_A).clamp(min=0.0).sqrt()


def inner_product(
    lora_B: Float[Tensor, "m r"],
    lora_A: Float[Tensor, "r n"],
    *,
    other_B: Float[Tensor, "m s"],
    other_A: Float[Tensor, "s n"],
) -> Float[Tensor, ""]:
    """Frobenius inner product `⟨B A, B' A'⟩ = Σ (BᵀB') ∘ (A A'ᵀ)`; the ranks may differ.

    Args:
        lora_B: Left factor of the first matrix.
        lora_A: Right factor of the first matrix.
        other_B: Left factor of the second matrix.
        other_A: Right factor of the second matrix.

    Returns:
        A float64 scalar.

    Examples:
        >>> import torch
        >>> column, row = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0]])
        >>> inner_product(column, row, other_B=column, other_A=2 * row).item()
        90.0
    """
    left = lora_B.to(torch.float64).mT @ other_B.to(torch.float64)
    right = lora_A.to(torch.float64) @ other_A.to(torch.float64).mT
    return (left * right).sum()


def factored_svd(lora_B: Float[Tensor, "m r"], lora_A: Float[Tensor, "r n"]) -> FactoredSvd:
    """Singular value decomposition of `B A`, from the QR decompositions of both factors and an r x r core.

    Args:
        lora_B: Left factor.
        lora_A: Right factor.

    Returns:
        `FactoredSvd` with k = min(r, m, n) triples, zeros included; float64 if a factor is, else float32.

    Examples:
        >>> import torch
        >>> factored_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]])).S.round(decimals=4).tolist()
        [10.0]
    """
    q_out, r_out = torch.linalg.qr(lora_B.to(torch.float64))
    q_in, r_in = torch.linalg.qr(lora_A.to(torch.float64).mT)
    left, values, right = torch.linalg.svd(r_out @ r_in.mT, full_matrices=False)
    # With r > m or r > n the QR decompositions have fewer than r columns: the core is min(r, m) x min(r, n).
    dtype = _result_dtype(lora_B, lora_A)
    return FactoredSvd(U=(q_out @ left).to(dtype), S=values.to(dtype), Vh=(right @ q_in.mT).to(dtype))


def balance(
    lora_B: Float[Tensor, "m r"], lora_A: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, "m rank"], Float[Tensor, "rank n"]]:
    """The factors `B' = U S^{1/2}`, `A' = S^{1/2} Vᵀ` of `B A = U S Vᵀ`: the same for every `(B G⁻¹, G A)`.

    Costs r x r work beyond four products of a factor with an r x r matrix: with `W_B`, `W_A` the Cholesky factors
    of the Gram matrices (`BᵀB = W_BᵀW_B`, `A Aᵀ = W_AᵀW_A`) and `W_B W_Aᵀ = U₀ S V₀ᵀ`, the result is
    `B' = B W_Aᵀ V₀ S^{-1/2}` and `A' = S^{-1/2} U₀ᵀ W_B A`. Gram matrices are formed in float64, where squaring
    costs float32 factors nothing; float64 factors and singular Gram matrices take QR decompositions instead.

    Args:
        lora_B: Left factor.
        lora_A: Right factor.

    Returns:
        `(B', A')` whose rank is the numerical rank of the product (0 if it vanishes); float64 if a factor is, else
        float32. Signs are those of the decomposition; a row of A' and its column of B' flip together.

    Example:
        >>> import torch
        >>> B, A = balance(torch.tensor([[100.0], [0.0]]), torch.tensor([[0.01, 0.0]]))
        >>> B, A
        (tensor([[1.],
                [0.]]), tensor([[1., 0.]]))
    """
    turn = balancing(lora_B, lora_A)
    balanced_B, balanced_A = lora_B.to(torch.float64) @ turn.out_side, turn.in_side @ lora_A.to(torch.float64)
    # The largest entry of each row of A' is positive, so that equal matrices have equal factors.
    peaks = balanced_A.gather(1, balanced_A.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(peaks[:, 0] < 0, -1.0, 1.0).to(torch.float64)
    dtype = _result_dtype(lora_B, lora_A)
    return (balanced_B * signs).to(dtype), (balanced_A * signs[:, None]).to(dtype)


@dataclass(frozen=True)
class Balancing:
    """What turns factors into balanced ones: `B' = B out_side`, `A' = in_side A`; without the signs `balance` fixes.

    In float64, as the products with them should be: badly scaled factors make their entries cancel.

    Attributes:
        out_side: Factor of the left factor.
        in_side: Factor of the right factor.
        singular_values: Singular values of the product, descending.
    """

    out_side: Float[Tensor, "*t r rank"]
    in_side: Float[Tensor, "*t rank r"]
    singular_values: Float[Tensor, "*t rank"]

    @classmethod
    def of_roots(
        cls, root_out: Float[Tensor, "*t k r"], root_in: Float[Tensor, "*t l r"], *, dtype: torch.dtype | None = None
    ) -> "Balancing":
        """From square roots of the Gram matrices, `W_BᵀW_B = BᵀB` and `W_AᵀW_A = A Aᵀ`, of one update or of many.

        Args:
            root_out: W_B, float64.
            root_in: W_A, float64.
            dtype: Leave out what is rounding noise of factors of this dtype, for one update; None keeps all directions.
        """
        u, values, vh = torch.linalg.svd(root_out @ root_in.mT, full_matrices=False)
        rank = values.shape[-1]
        if dtype is not None:
            # Factors that cancel (B A = 0, neither of them 0) leave rounding noise, which must not count as rank.
            floor = torch.finfo(dtype).eps * root_out.norm() * root_in.norm()
            # Relative to the largest one before the cast: float32 ends at 1e38, and products of factors do not.
            relative = (values / values[:1].clamp(min=torch.finfo(torch.float64).tiny)).to(dtype)
            rank = int((values[: numerical_rank(relative)] > floor).sum())
        kept = values[..., :rank]
        scale = kept.rsqrt()[..., None]
        return cls(
            out_side=root_in.mT @ vh[..., :rank, :].mT * scale.mT,
            in_side=scale * u[..., :rank].mT @ root_out,
            singular_values=kept,
        )


def balancing(lora_B: Float[Tensor, "m r"], lora_A: Float[Tensor, "r n"]) -> Balancing:
    """The r x r part of `balance`.

    Args:
        lora_B: Left factor.
        lora_A: Right factor.

    Returns:
        `Balancing` of the product's numerical rank, 0 if it vanishes.
    """
    dtype = _result_dtype(lora_B, lora_A)
    root_out = _gram_root(lora_B.to(torch.float64), dtype=dtype)
    root_in = _gram_root(lora_A.to(torch.float64).mT, dtype=dtype)
    return Balancing.of_roots(root_out, root_in, dtype=dtype)


def truncate(
    lora_B: Float[Tensor, "m r"], lora_A: Float[Tensor, "r n"], *, rank: int
) -> tuple[Float[Tensor, "m {rank}"], Float[Tensor, "{rank} n"]]:
    """The best approximation of `B A` of rank `rank` in the Frobenius norm, as balanced factors.

    The truncated singular value decomposition (Eckart and Young, Psychometrika 1, 1936), split as
    `B' = U S^{1/2}`, `A' = S^{1/2} Vᵀ`.

    Args:
        lora_B: Left factor.
        lora_A: Right factor.
        rank: Rank of the result, at least 1; if it exceeds min(r, m, n), columns and rows of zeros are added.

    Returns:
        `(B', A')`; float64 if a factor is, else float32.

    Raises:
        ValueError: If `rank` is less than 1.

    Examples:
        >>> import torch
        >>> B, A = truncate(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), rank=1)
        >>> (B @ A).round(decimals=4).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    if rank < 1:
        raise ValueError(f"rank={rank} is not a rank of LoRA factors; pass at least 1.")
    svd = factored_svd(lora_B, lora_A)
    kept = min(rank, len(svd.S))
    roots = svd.S[:kept].sqrt()
    truncated_B = svd.S.new_zeros(len(lora_B), rank)
    truncated_A = svd.S.new_zeros(rank, lora_A.shape[1])
    truncated_B[:, :kept] = svd.U[:, :kept] * roots
    truncated_A[:kept] = roots[:, None] * svd.Vh[:kept]
    return truncated_B, truncated_A


def difference_norm(
    lora_B: Float[Tensor, "m r"],
    lora_A: Float[Tensor, "r n"],
    *,
    other_B: Float[Tensor, "m s"],
    other_A: Float[Tensor, "s n"],
) -> Float[Tensor, ""]:
    """‖B A - B' A'‖_F, from QR decompositions of the factors side by side; the ranks may differ.

    Squared norms would lose differences below 1e-8 of the matrices; this does not, down to 1e-15.

    Args:
        lora_B: Left factor of the first matrix.
        lora_A: Right factor of the first matrix.
        other_B: Left factor of the second matrix.
        other_A: Right factor of the second matrix.

    Returns:
        A float64 scalar.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> round(difference_norm(3 * eye[:, :1], eye[:1], other_B=eye, other_A=eye).item(), 4)  # diag(3, 0) - diag(1, 1)
        2.2361
    """
    left = torch.cat([lora_B.to(torch.float64), -other_B.to(torch.float64)], dim=1)
    right = torch.cat([lora_A.to(torch.float64), other_A.to(torch.float64)])
    return torch.linalg.vector_norm(factored_svd(left, right).S)


def projection_residual(
    lora_B: Float[Tensor, "m r"],
    lora_A: Float[Tensor, "r n"],
    *,
    components_out: Float[Tensor, "k_out m"],
    components_in: Float[Tensor, "k_in n"],
) -> Float[Tensor, ""]:
    """‖ΔW - P_out ΔW P_in‖_F for `ΔW = B A` and the orthogonal projections `P = VᵀV`.

    The residual is the sum of the orthogonal parts `(I - P_out) ΔW` and `P_out ΔW (I - P_in)`, so its square is
    `‖B⊥ A‖² + ‖(V_out B) A⊥‖²`. Subtracting squared norms would lose residuals below 1e-4 of ‖ΔW‖ in float32; this does
    not, down to the orthonormality of the components.

    Args:
        lora_B: Left factor, scaling included.
        lora_A: Right factor.
        components_out: Orthonormal rows in the output space.
        components_in: Orthonormal rows in the input space.

    Returns:
        A float64 scalar.

    Examples:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> projection_residual(
        ...     eye, torch.tensor([[3.0, 0.0], [0.0, 4.0]]), components_out=eye[:1], components_in=eye[:1]
        ... ).item()
        4.0
    """
    left, right, components_out, components_in = (
        tensor.to(torch.float64) for tensor in (lora_B, lora_A, components_out, components_in)
    )
    coefficients_out = components_out @ left
    left_rest = left - components_out.mT @ coefficients_out
    right_rest = right - (right @ components_in.mT) @ components_in
    return torch.hypot(frobenius_norm(left_rest, right), frobenius_norm(coefficients_out, right_rest))


def _gram_root(columns: Float[Tensor, "n r"], *, dtype: torch.dtype) -> Float[Tensor, "k r"]:
    """W with `WᵀW = XᵀX`; k = r, or min(n, r) where a QR decomposition is needed."""
    if dtype != torch.float64:
        factor, info = torch.linalg.cholesky_ex(columns.mT @ columns)
        if info == 0:
            return factor.mT
    return torch.linalg.qr(columns, mode="r").R


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
