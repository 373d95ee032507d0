"""How much updates of a whole model point the same way: cosines over all modules taken together."""

import torch
from jaxtyping import Float
from torch import Tensor


def update_cosines(
    inner_products: Float[Tensor, " l *t"], squares: Float[Tensor, " l *t"], other_squares: Float[Tensor, " l *t"]
) -> Float[Tensor, "*t"]:
    """`cos = Σ_l ⟨U_l, V_l⟩ / (sqrt(Σ_l ‖U_l‖²) sqrt(Σ_l ‖V_l‖²))`: the cosine of updates U and V over their modules l.

    It is the cosine of the updates with all their entries in one vector. The sums of several modules may come as one row,
    since they add up; a module that an update does not have is a row of zeros.

    Args:
        inner_products: ⟨U_l, V_l⟩ of each module, for any number of pairs; from `eigenpeft.linalg.factored.inner_product`.
        squares: ‖U_l‖².
        other_squares: ‖V_l‖².

    Returns:
        One cosine per pair; NaN where U or V is zero in all modules, which points nowhere.

    Examples:
        >>> import torch
        >>> inner = torch.tensor([[3.0, 0.0], [3.0, 0.0]])  # two modules, two pairs
        >>> squares, other = torch.tensor([[9.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> update_cosines(inner, squares, other)
        tensor([1., nan])
    """
    lengths = squares.sum(dim=0).sqrt() * other_squares.sum(dim=0).sqrt()
    return torch.where(lengths > 0, inner_products.sum(dim=0) / lengths, torch.nan)
