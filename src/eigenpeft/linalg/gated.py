"""Cores weighed anew for every token (CoMoL's form), and how evenly a gate weighs them."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear


def gated_core(
    projected: Float[Tensor, "*t k_in"], gate: Float[Tensor, "e k_in"], cores: Float[Tensor, "e k_out k_in"]
) -> tuple[Float[Tensor, "*t k_out"], Float[Tensor, "*t e"]]:
    """`Σ_e g_e M_e z` with `g = softmax(W_g z)` for every token `z = V_in x`, and the weights g.

    The weights of a token are convex, so that on orthonormal bases the update of x is no longer than `max_e ‖M_e‖₂ ‖x‖`.

    Args:
        projected: z.
        gate: W_g.
        cores: The M_e.

    Examples:
        >>> z, cores = torch.tensor([[1.0, 0.0]]), torch.stack([torch.eye(2), 3 * torch.eye(2)])
        >>> gated_core(z, torch.zeros(2, 2), cores)[0].tolist()
        [[2.0, 0.0]]
    """
    weights = torch.softmax(linear(projected, gate), dim=-1)
    return torch.einsum("...e,eoi,...i->...o", weights, cores, projected), weights


def load_balance(weights: Float[Tensor, "*t e"]) -> Float[Tensor, ""]:
    """`E Σ_e ḡ_e²`, ḡ the mean weights over all tokens: 1 where cores weigh alike, E where one has everything.

    It is 1 plus the squared coefficient of variation of ḡ, the importance loss of mixtures of experts (arXiv
    1701.06538, section 4).

    Args:
        weights: g of every token.

    Examples:
        >>> float(load_balance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))), float(load_balance(torch.tensor([[1.0, 0.0]])))
        (1.0, 2.0)
    """
    mean = weights.flatten(0, -2).mean(dim=0)
    return len(mean) * mean.square().sum()
