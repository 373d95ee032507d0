"""Cores weighed for every token, by a trained gate (CoMoL) or their own directions (Arrow), and how evenly weights spread."""

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
    return weighed_core(projected, weights, cores), weights


def weighed_core(
    projected: Float[Tensor, "*t k_in"], weights: Float[Tensor, "*t e"], cores: Float[Tensor, "e k_out k_in"]
) -> Float[Tensor, "*t k_out"]:
    """`Σ_e g_e M_e z` for every token.

    Args:
        projected: z.
        weights: g of every token.
        cores: The M_e.

    Example:
        >>> import torch
        >>> weighed_core(torch.ones(1, 2), torch.tensor([[0.5, 0.5]]), torch.stack([torch.eye(2), 3 * torch.eye(2)]))
        tensor([[2., 2.]])
    """
    return torch.einsum("...e,eoi,...i->...o", weights, cores, projected)


def arrow_prototypes(cores: Float[Tensor, "e k_out k_in"]) -> Float[Tensor, "e k_in"]:
    """The leading right singular vector p_e of every core, on which its update acts most (Arrow, arXiv 2405.11157, section 4).

    On orthonormal bases `p_e V_in` is that of the whole update. The sign is arbitrary, and a core of zeros gets zeros.

    Args:
        cores: The M_e.

    Examples:
        >>> arrow_prototypes(torch.diag(torch.tensor([1.0, 3.0]))[None]).abs().tolist()
        [[0.0, 1.0]]
    """
    leading = torch.linalg.svd(cores.double()).Vh[:, 0]
    return torch.where(cores.flatten(1).any(dim=1)[:, None], leading, 0.0).to(cores.dtype)


def arrow_weights(
    projected: Float[Tensor, "*t k_in"], prototypes: Float[Tensor, "e k_in"], *, top_k: int
) -> Float[Tensor, "*t e"]:
    """Softmax of `|p_e · z|` over the `top_k` largest, zero for the others (Arrow, arXiv 2405.11157, section 4).

    Args:
        projected: z.
        prototypes: The p_e.
        top_k: How many cores act on a token; all of them where there are fewer.

    Examples:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> arrow_weights(z, torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), top_k=2).tolist()
        [[0.5, 0.0, 0.5]]
    """
    scores = linear(projected, prototypes).abs()
    best = scores.topk(min(top_k, len(prototypes)), dim=-1)
    return torch.zeros_like(scores).scatter(-1, best.indices, torch.softmax(best.values, dim=-1))


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
