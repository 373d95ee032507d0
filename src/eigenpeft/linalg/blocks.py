"""Products with block-diagonal matrices and with block-diagonal factors of an update (BD-LoRA), block by block."""

import torch
from jaxtyping import Float
from torch import Tensor


def block_product(x: Float[Tensor, "*t n_in"], blocks: Float[Tensor, "n q p"]) -> Float[Tensor, "*t n_out"]:
    """`y = x diag(W_1, ..., W_N)ᵀ`: block i of the result is `y_i = W_i x_i`, without a matrix of zeros and blocks.

    Args:
        x: Rows of N p numbers, block after block.
        blocks: W_1 to W_N.

    Returns:
        Rows of N q numbers.

    Example:
        >>> import torch
        >>> block_product(torch.tensor([1.0, 2.0]), torch.tensor([[[10.0]], [[100.0]]])).tolist()
        [10.0, 200.0]
    """
    return torch.einsum("nqp,...np->...nq", blocks, x.unflatten(-1, (len(blocks), -1))).flatten(-2)


def input_blocks(
    components_in: Float[Tensor, "k width"], coefficients_in: Float[Tensor, "r k"], *, n_blocks: int
) -> Float[Tensor, "n q p"]:
    """`A_i = C_i V_i` for each block: C_i the i-th of the rows of C_in, V_i the i-th of the columns of V_in.

    `A = diag(A_1, ..., A_N)` is BD-LoRA's block-diagonal A (PEFT's `use_bdlora`), on the components of a subspace.

    Args:
        components_in: V_in.
        coefficients_in: C_in.
        n_blocks: N, which divides the width and r.

    Example:
        >>> import torch
        >>> input_blocks(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [5.0]]), n_blocks=2).flatten().tolist()
        [3.0, 10.0]
    """
    return _rows(coefficients_in, n_blocks) @ _columns(components_in, n_blocks)


def input_block_product(
    x: Float[Tensor, "*t width"],
    components_in: Float[Tensor, "k width"],
    coefficients_in: Float[Tensor, "r k"],
    *,
    n_blocks: int,
) -> Float[Tensor, "*t r"]:
    """`h = x Aᵀ` with `A = diag(C_1 V_1, ..., C_N V_N)` as in `input_blocks`, by way of the components: `h_i = C_i (V_i x_i)`.

    Args:
        x: Input.
        components_in: V_in.
        coefficients_in: C_in.
        n_blocks: N.

    Example:
        >>> import torch
        >>> x, components_in = torch.ones(1, 2), torch.tensor([[1.0, 2.0]])
        >>> input_block_product(x, components_in, torch.tensor([[3.0], [5.0]]), n_blocks=2).tolist()
        [[3.0, 10.0]]
    """
    return block_product(block_product(x, _columns(components_in, n_blocks)), _rows(coefficients_in, n_blocks))


def output_blocks(
    components_out: Float[Tensor, "k width"], coefficients_out: Float[Tensor, "k r"], *, n_blocks: int
) -> Float[Tensor, "n q p"]:
    """`B_i = V_iᵀ C_i` for each block: V_i the i-th of the columns of V_out, C_i the i-th of the columns of C_out.

    `B = diag(B_1, ..., B_N)` is BD-LoRA's block-diagonal B (PEFT's `use_bdlora`), on the components of a subspace.

    Args:
        components_out: V_out.
        coefficients_out: C_out.
        n_blocks: N, which divides the width and r.

    Example:
        >>> import torch
        >>> output_blocks(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]), n_blocks=2).flatten().tolist()
        [3.0, 10.0]
    """
    return _columns(components_out, n_blocks).mT @ _columns(coefficients_out, n_blocks)


def output_block_product(
    hidden: Float[Tensor, "*t r"],
    components_out: Float[Tensor, "k width"],
    coefficients_out: Float[Tensor, "k r"],
    *,
    n_blocks: int,
) -> Float[Tensor, "*t width"]:
    """`y = h Bᵀ` with `B = diag(V_1ᵀ C_1, ..., V_Nᵀ C_N)` as in `output_blocks`, by way of the components: `y_i = V_iᵀ (C_i h_i)`.

    Args:
        hidden: h.
        components_out: V_out.
        coefficients_out: C_out.
        n_blocks: N.

    Example:
        >>> import torch
        >>> hidden, components_out = torch.ones(1, 2), torch.tensor([[1.0, 2.0]])
        >>> output_block_product(hidden, components_out, torch.tensor([[3.0, 5.0]]), n_blocks=2).tolist()
        [[3.0, 10.0]]
    """
    inner = block_product(hidden, _columns(coefficients_out, n_blocks))
    return block_product(inner, _columns(components_out, n_blocks).mT)


def _rows(matrix: Float[Tensor, "a b"], n_blocks: int) -> Float[Tensor, "n q b"]:
    return matrix.unflatten(0, (n_blocks, -1))


def _columns(matrix: Float[Tensor, "a b"], n_blocks: int) -> Float[Tensor, "n a p"]:
    return matrix.unflatten(1, (n_blocks, -1)).movedim(1, 0)
