"""How EigenLoRA's coefficients start: at ΔW = 0 by one-sided zeros, in the scale in which LoRA's factors start."""

import math
from typing import Literal

import torch
from torch import Tensor, nn


def initial_coefficients(
    n_components: int, *, rank: int, core: str, init: bool | Literal["gaussian"] = True
) -> tuple[Tensor | None, Tensor]:
    """The start ΔW = 0, one-sided: with zeros on both sides no gradient would ever flow (a saddle).

    Args:
        n_components: K.
        rank: r of the low-rank core.
        core: "low_rank", "mixer" or "diagonal".
        init: As LoRA's `init_lora_weights`: True, "gaussian", or False for random numbers on both sides (ΔW ≠ 0).

    Returns:
        Coefficients of the input side, (r, K) or None, and of the output side, (K, r), (K, K) or (K,).
    """
    shape = {"low_rank": (n_components, rank), "mixer": (n_components, n_components), "diagonal": (n_components,)}[core]
    # As LoRA starts A: rows of A = C_in V_in get the norm that LoRA's rows have, V_in being orthonormal.
    coefficients_in = None
    if core == "low_rank":
        coefficients_in = nn.init.kaiming_uniform_(torch.empty(rank, n_components), a=math.sqrt(5))
        if init == "gaussian":
            nn.init.normal_(coefficients_in, std=1 / rank)
    if init is not False:
        return coefficients_in, torch.zeros(shape)
    # LoRA's own B without a start is that of a linear layer; the fan-in of ours is the last axis too.
    bound = 1 / math.sqrt(shape[-1])
    return coefficients_in, torch.empty(shape).uniform_(-bound, bound)


def initial_embedding_coefficients(
    n_components: int, *, rank: int, core: str, init: bool | Literal["gaussian"] = True, out_features: int
) -> tuple[Tensor | None, Tensor]:
    """As `initial_coefficients`, with the sides changed over as LoRA does for embeddings: A is zero, B is normal.

    Args:
        n_components: K.
        rank: r of the low-rank core.
        core: "low_rank", "mixer" or "diagonal"; the latter two have one side only, which starts at zero.
        init: As LoRA's `init_lora_weights`.
        out_features: Width of the embedding; the entries of B = V_outᵀ C_out get the variance 1 that LoRA's have.
    """
    if core != "low_rank":
        return initial_coefficients(n_components, rank=rank, core=core, init=init)
    scale = math.sqrt(out_features / n_components)
    coefficients_in = torch.zeros(rank, n_components) if init is not False else torch.randn(rank, n_components)
    return coefficients_in, scale * torch.randn(n_components, rank)
