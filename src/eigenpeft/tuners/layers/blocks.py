"""Factor modules of block-diagonal LoRA (BD-LoRA, `use_bdlora`), where each block of a weight has a part of the rank.

PEFT makes either A or B block-diagonal, with N blocks: block i of A reads only the i-th part of the inputs, and block i of B
writes only the i-th part of the outputs, so that tensor-parallel engines need no communication between the parts. Our
factors keep that: nothing of ours joins two blocks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eigenpeft.tuners.layers.linear import InputFactor, MixedFactor, OutputFactor
from eigenpeft.tuners.layers.shared_bases import FrozenBank


def n_blocks_of(factor: Any) -> int:
    """How many blocks a factor of LoRA's own has; 1 if it is dense.

    Args:
        factor: LoRA's A or B, as PEFT made it.
    """
    return getattr(factor, "nblocks", 1)


def dense_weight(factor: Any) -> Any:
    """A factor's weight as a matrix, with zeros outside the blocks of PEFT's own block-diagonal factors.

    Args:
        factor: LoRA's A or B, or a factor module of ours.
    """
    return factor.weight_as_blockdiagonal_matrix() if n_blocks_of(factor) > 1 else getattr(factor, "weight", factor)


class BlockInputFactor(InputFactor):
    """`A_i = C_i V_in[:, i]` for each block i: the i-th rows of C_in on the i-th part of the components.

    Args:
        frozen_bank: Components.
        coefficients: (r, n_components).
        n_blocks: N.
    """

    def __init__(self, frozen_bank: FrozenBank, *, coefficients: Tensor, n_blocks: int):
        super().__init__(frozen_bank, coefficients=coefficients)
        self._n_blocks = n_blocks

    @property
    def weight(self) -> Tensor:
        """(r, in_features), with zeros outside the blocks."""
        coefficients: Any = self.coefficients
        components = self.frozen_bank.components_in.to(coefficients.dtype)
        pairs = zip(coefficients.chunk(self._n_blocks), components.chunk(self._n_blocks, dim=1), strict=True)
        return torch.block_diag(*(block @ part for block, part in pairs))

    def forward(self, x: Tensor) -> Tensor:
        """`A x` for x (..., in_features)."""
        coefficients: Any = self.coefficients
        components = self.frozen_bank.components_in.to(x.dtype).unflatten(1, (self._n_blocks, -1))
        coefficients = coefficients.to(x.dtype).unflatten(0, (self._n_blocks, -1))
        inner = torch.einsum("...nd,knd->...nk", x.unflatten(-1, (self._n_blocks, -1)), components)
        return torch.einsum("...nk,nqk->...nq", inner, coefficients).flatten(-2)


class BlockOutputFactor(OutputFactor):
    """`B_i = V_out[:, i]ᵀ C_i` for each block i: the i-th columns of C_out on the i-th part of the components.

    Args:
        frozen_bank: Components.
        coefficients: (n_components, r).
        n_blocks: N.
    """

    def __init__(self, frozen_bank: FrozenBank, *, coefficients: Tensor, n_blocks: int):
        super().__init__(frozen_bank, coefficients=coefficients)
        self._n_blocks = n_blocks

    @property
    def weight(self) -> Tensor:
        """(out_features, r), with zeros outside the blocks."""
        components = self.frozen_bank.components_out.to(self.coefficients.dtype)
        pairs = zip(
            components.chunk(self._n_blocks, dim=1), self.coefficients.chunk(self._n_blocks, dim=1), strict=True
        )
        return torch.block_diag(*(part.mT @ block for part, block in pairs))

    def forward(self, h: Tensor) -> Tensor:
        """`B h` for h (..., r)."""
        components = self.frozen_bank.components_out.to(h.dtype).unflatten(1, (self._n_blocks, -1))
        coefficients = self.coefficients.to(h.dtype).unflatten(1, (self._n_blocks, -1))
        inner = torch.einsum("...nq,knq->...nk", h.unflatten(-1, (self._n_blocks, -1)), coefficients)
        return torch.einsum("...nk,knd->...nd", inner, components).flatten(-2)


class MixedBlockFactor(MixedFactor):
    """`B diag(M_1, ..., M_N)`: a mixer of its own for every block of A or B.

    Args:
        replaced: LoRA's own B: a linear layer if A has the blocks, else PEFT's block-diagonal layer.
        mixer: (N, r / N, r / N).
        train_mixer: Whether it is trained.
    """

    def __init__(self, replaced: Any, *, mixer: Tensor, train_mixer: bool = True):
        super().__init__(replaced, mixer=mixer, train_mixer=train_mixer)
        self.in_features = len(mixer) * mixer.shape[1]
        self._has_blocks = n_blocks_of(replaced) > 1

    @property
    def weight(self) -> Tensor:
        """(out_features, r), with zeros outside the blocks of B."""
        mixer = self.mixer.to(self.factor.dtype)
        if self._has_blocks:
            pairs = zip(self.factor.chunk(len(mixer)), mixer, strict=True)
            return torch.block_diag(*(block @ each for block, each in pairs))
        return torch.einsum("onq,nqp->onp", self.factor.unflatten(1, (len(mixer), -1)), mixer).flatten(1)

    def forward(self, h: Tensor) -> Tensor:
        """`B M h` for h (..., r)."""
        mixer, factor = self.mixer.to(h.dtype), self.factor.to(h.dtype)
        mixed = torch.einsum("nqp,...np->...nq", mixer, h.unflatten(-1, (len(mixer), -1)))
        if self._has_blocks:
            return torch.einsum("noq,...nq->...no", factor.unflatten(0, (len(mixer), -1)), mixed).flatten(-2)
        return F.linear(mixed.flatten(-2), factor, None if self.bias is None else self.bias.to(h.dtype))
