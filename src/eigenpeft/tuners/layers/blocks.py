"""Factor modules of block-diagonal LoRA (BD-LoRA, `use_bdlora`), where each block of a weight has a part of the rank.

PEFT makes either A or B block-diagonal, with N blocks: block i of A reads only the i-th part of the inputs, and block i of B
writes only the i-th part of the outputs, so that tensor-parallel engines need no communication between the parts. Our
factors keep that: nothing of ours joins two blocks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eigenpeft.linalg.blocks import (
    block_product,
    input_block_product,
    input_blocks,
    output_block_product,
    output_blocks,
)
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
        return torch.block_diag(*input_blocks(components, coefficients, n_blocks=self._n_blocks))

    def forward(self, x: Tensor) -> Tensor:
        """`A x` for x (..., in_features)."""
        coefficients: Any = self.coefficients
        components, coefficients = self.frozen_bank.components_in.to(x.dtype), coefficients.to(x.dtype)
        return input_block_product(x, components, coefficients, n_blocks=self._n_blocks)


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
        return torch.block_diag(*output_blocks(components, self.coefficients, n_blocks=self._n_blocks))

    def forward(self, h: Tensor) -> Tensor:
        """`B h` for h (..., r)."""
        components, coefficients = self.frozen_bank.components_out.to(h.dtype), self.coefficients.to(h.dtype)
        return output_block_product(h, components, coefficients, n_blocks=self._n_blocks)


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
            return torch.block_diag(*(self.factor.unflatten(0, (len(mixer), -1)) @ mixer))
        return block_product(self.factor, mixer.mT)  # B M, row by row

    def forward(self, h: Tensor) -> Tensor:
        """`B M h` for h (..., r)."""
        mixer, factor = self.mixer.to(h.dtype), self.factor.to(h.dtype)
        mixed = block_product(h, mixer)
        if self._has_blocks:
            return block_product(mixed, factor.unflatten(0, (len(mixer), -1)))
        return F.linear(mixed, factor, None if self.bias is None else self.bias.to(h.dtype))
