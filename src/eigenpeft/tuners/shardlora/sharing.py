"""What layers share of LoRA's two factors, as one table: how many vectors of a side are common and how many a layer's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Budget(NamedTuple):
    """The numbers that a side's sizes follow from.

    Attributes:
        n_layers: L, layers that share.
        rank: r of a layer; where the ranks differ, the largest.
        pool_rank: e.
        private_rank: p.
    """

    n_layers: int
    rank: int
    pool_rank: int
    private_rank: int


@dataclass(frozen=True)
class Side:
    """How the vectors of one side (rows of A, columns of B) are shared.

    Attributes:
        n_public: Vectors that all layers share.
        n_private: Vectors of each layer's own.
        is_drawn: Whether a layer takes a random subset of the public shards; otherwise the first ones in order.
        is_cut: Whether vectors are made of several shards.
    """

    n_public: Callable[[Budget], int]
    n_private: Callable[[Budget], int]
    is_drawn: bool = False
    is_cut: bool = False


_POOLED = Side(
    lambda budget: (budget.pool_rank - budget.private_rank) * budget.n_layers,
    lambda budget: budget.private_rank,
    is_drawn=True,
    is_cut=True,
)
_COMMON = Side(lambda budget: budget.rank, lambda budget: 0)
_OWN = Side(lambda budget: 0, lambda budget: budget.rank)

SHARINGS: dict[str, tuple[Side, Side]] = {
    "shards": (_POOLED, _POOLED),
    "input": (_COMMON, _OWN),
    "output": (_OWN, _COMMON),
}
"""(A, B) by the name of the sharing: MoS (arXiv 2410.00938, section 3); one A for all layers, `ΔW_l = B_l A` (ASLoRA, arXiv
2412.10135, before its B are merged); and its mirror image."""


def n_parameters(sharing: str, budget: Budget, *, in_features: int, out_features: int) -> int:
    """How many numbers are trained for L layers of one kind and shape.

    MoS trains `e L (n + m)`, as many as LoRA of rank e does, whatever r, p and l are; a common A trains `r (n + L m)`.

    Args:
        sharing: Name of a row of `SHARINGS`.
        budget: L, r, e and p.
        in_features: n.
        out_features: m.

    Examples:
        >>> n_parameters("shards", Budget(6, 8, 2, 1), in_features=384, out_features=384)
        9216
        >>> n_parameters("input", Budget(6, 2, 2, 1), in_features=384, out_features=384)
        5376
    """
    sides = zip(SHARINGS[sharing], (in_features, out_features), strict=True)
    return sum(width * (side.n_public(budget) + budget.n_layers * side.n_private(budget)) for side, width in sides)
