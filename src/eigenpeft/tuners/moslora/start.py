"""How MoSLoRA's mixer starts."""

import math

import torch
from torch import Tensor, nn


def initial_mixer(rank: int, *, init: str, n_blocks: int | None = None) -> Tensor:
    """The start of a mixer, (r, r), from torch's global generator as PEFT's own starts are.

    Args:
        rank: Its size r.
        init: "kaiming" (uniform, a = √5), "orthogonal", or "identity" (plain LoRA).
        n_blocks: Make that many, (n_blocks, r, r), for layers whose channels or experts do not mix.
    """
    if n_blocks is not None:
        return torch.stack([initial_mixer(rank, init=init) for _ in range(n_blocks)])
    if init == "identity":
        return torch.eye(rank)
    mixer = torch.empty(rank, rank)
    if init == "orthogonal":
        return nn.init.orthogonal_(mixer)
    return nn.init.kaiming_uniform_(mixer, a=math.sqrt(5))


@torch.no_grad()
def unmixed(factor: Tensor, mixer: Tensor) -> Tensor:
    """`B M⁻¹` for a B (m, r) that something else has written, so that `B M⁻¹ · M A` is that `B A`; solved in float64.

    An orthogonal mixer keeps the size of B; the inverse of a Kaiming start makes it many times larger, with as many times the
    rounding errors. A singular one raises torch's own error.

    Args:
        factor: B, (m, r).
        mixer: M, (r, r).
    """
    solved = torch.linalg.solve(mixer.to(device=factor.device, dtype=torch.float64), factor.double(), left=False)
    return solved.to(factor.dtype)
