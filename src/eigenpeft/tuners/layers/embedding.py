"""Factor modules of embeddings: they stand where LoRA keeps bare matrices, so they behave as matrices too."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from eigenpeft.tuners.layers.linear import InputFactor, MixedFactor, OutputFactor


class ActsAsMatrix(nn.Module):
    """What LoRA's embedding layer asks of `lora_embedding_A` and `lora_embedding_B`: the matrix is `weight`."""

    weight: Any

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's functions take the matrix."""
        return function(*tree_map(_matrix, args), **tree_map(_matrix, kwargs or {}))

    @property
    def T(self) -> Tensor:
        """The matrix transposed."""
        return self.weight.mT

    def t(self) -> Tensor:
        """The matrix transposed."""
        return self.weight.mT

    @property
    def data(self) -> Tensor:
        """The matrix without its history."""
        return self.weight.detach()

    def detach(self) -> Tensor:
        """The matrix without its history."""
        return self.weight.detach()

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Device of the trained tensors."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the trained tensors."""
        return next(self.parameters()).dtype

    @property
    def requires_grad(self) -> bool:
        """Whether the matrix is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def float(self) -> Any:
        """A float32 copy of the matrix, as a tensor's `float` gives; the module is not changed."""
        return self.weight.float()

    def __matmul__(self, other: Any) -> Tensor:
        return self.weight @ _matrix(other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return other @ self.weight


def _matrix(value: Any) -> Any:
    return value.weight if isinstance(value, ActsAsMatrix) else value


class EmbeddingInputFactor(ActsAsMatrix, InputFactor):
    """`A = C_in V_in`, (r, num_embeddings): an embedding's input side, one column per token."""

    @property
    def T(self) -> Tensor:
        """(num_embeddings, r), to look tokens up in; the components themselves, not copied, when there is no C_in."""
        if self.coefficients is not None or self.offset is not None or not self.follows:
            return self.weight.mT
        return self.frozen_bank.components_in.mT.to(self.follows[0].coefficients.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the components."""
        return self.frozen_bank.components_in.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix."""
        return self.weight.dtype


class EmbeddingOutputFactor(ActsAsMatrix, OutputFactor):
    """`B = V_outᵀ C_out`, (embedding_dim, r)."""


class MixedEmbeddingFactor(ActsAsMatrix, MixedFactor):
    """`B M`, (embedding_dim, r): an embedding's B behind a mixer.

    Args:
        factor: (embedding_dim, r), LoRA's own.
        mixer: (r, r).
        train_mixer: Whether it is trained.
    """

    def __init__(self, factor: Tensor, *, mixer: Tensor, train_mixer: bool = True):
        super().__init__(SimpleNamespace(weight=factor, bias=None), mixer=mixer, train_mixer=train_mixer)
