"""Orthonormal axes of one side of many updates, kept as combinations of the updates' factors and formed when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Columns that are turned to float64 at a time, and rows of a Gram matrix that are made at a time, its upper part left out.
_CHUNK, _STRIPE = 2048, 32


@dataclass(frozen=True)
class Axes:
    """Rows `V = turn Z`, where Z are the rows of all blocks one below the other; float64.

    A few combinations of the axes cost a few combinations of the blocks, `W V = (W turn) Z`; V itself, R x R x n operations, is
    formed by `rows` alone. Blocks may be views and of any floating dtype: they are turned to float64 in parts.

    Attributes:
        turn: Coefficients of the axes.
        blocks: Rows of Z, block by block.

    Example:
        >>> import torch
        >>> axes = Axes(torch.eye(2).double(), (torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])))
        >>> axes.combined(torch.tensor([[2.0, 3.0]]).double())
        tensor([[2., 0., 3.]], dtype=torch.float64)
    """

    turn: Float[Tensor, "k r"]
    blocks: tuple[Float[Tensor, "_r n"], ...]

    def __len__(self) -> int:
        return len(self.turn)

    @property
    def size(self) -> int:
        """Entries of an axis."""
        return self.blocks[0].shape[1]

    def rows(self) -> Float[Tensor, "k n"]:
        """The axes themselves."""
        return _combined(self.turn, self.blocks)

    def combined(self, weights: Float[Tensor, "q k"], *, dtype: torch.dtype = torch.float64) -> Float[Tensor, "q n"]:
        """`W V`.

        Args:
            weights: W, float64.
            dtype: Dtype of the result, and of the product with the blocks.
        """
        return _combined((weights @ self.turn).to(dtype), self.blocks)

    def signed(self, along: Float[Tensor, " r"]) -> "tuple[Axes, Float[Tensor, ' k']]":
        """The axes turned so that each has a positive inner product with `generic_direction`, and the signs that did it.

        Args:
            along: Inner products of the rows of Z with it, as `gram` gives them.
        """
        signs = torch.where(self.turn @ along < 0, -1.0, 1.0).to(torch.float64)
        return Axes(signs[:, None] * self.turn, self.blocks), signs


def generic_direction(n: int) -> Float[Tensor, " n"]:
    """`g_j = cos(√2 j²)`: a fixed vector that no structure of a weight is orthogonal to, to give axes a sign.

    An axis's largest entry would need the axis itself, and the sum of the entries is zero where an output goes into a LayerNorm.

    Args:
        n: Its length.
    """
    return torch.arange(1, n + 1, dtype=torch.float64).square().mul_(2**0.5).cos_()


def gram(blocks: Sequence[Float[Tensor, "_r n"]]) -> tuple[Float[Tensor, "r r"], Float[Tensor, " r"]]:
    """`Z Zᵀ` and `Z g` of the rows of all blocks one below the other, g the `generic_direction`, in float64.

    Args:
        blocks: Rows, block by block; views and other dtypes are turned to float64 in parts.
    """
    n, places = blocks[0].shape[1], _places(blocks)
    generic = generic_direction(n).to(blocks[0].device)
    part = blocks[0].new_empty(places[-1].stop, min(_CHUNK, n), dtype=torch.float64)
    products, along = part.new_zeros(len(part), len(part)), part.new_zeros(len(part))
    for start in range(0, n, _CHUNK):
        columns = part[:, : min(_CHUNK, n - start)]
        for place, block in zip(places, blocks, strict=True):
            columns[place].copy_(block[:, start : start + _CHUNK])
        for first in range(0, len(part), _STRIPE):
            last = first + _STRIPE
            products[first:last, :last].addmm_(columns[first:last], columns[:last].mT)
        along.addmv_(columns, generic[start : start + _CHUNK])
    return products.tril() + products.tril(-1).mT, along


def _combined(weights: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    result = weights.new_zeros(len(weights), blocks[0].shape[1])
    for place, block in zip(_places(blocks), blocks, strict=True):
        result.addmm_(weights[:, place], block.to(weights))
    return result


def _places(blocks: Sequence[Tensor]) -> list[slice]:
    places: list[slice] = []
    for block in blocks:
        start = places[-1].stop if places else 0
        places.append(slice(start, start + len(block)))
    return places
