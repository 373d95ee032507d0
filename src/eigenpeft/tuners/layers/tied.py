"""The factors of a layer whose weight is tied to an embedding's: the embedding's own, transposed."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class TransposedFactor(nn.Module):
    """The transpose of another factor, which keeps the trained tensors.

    An embedding's update B A (embedding_dim, num_embeddings) is Aᵀ Bᵀ in the output layer that shares its weight, so that
    its A is the other's Bᵀ. Nothing is trained or saved twice.

    Args:
        of: Factor of the embedding; not a submodule of this one.
    """

    def __init__(self, of: Any):
        super().__init__()
        self._owned_elsewhere = (of,)
        self.bias = None
        self.out_features, self.in_features = reversed(of.shape)

    @property
    def weight(self) -> Tensor:
        """Transpose of the other factor's."""
        return self._owned_elsewhere[0].T

    def forward(self, x: Tensor) -> Tensor:
        """Product with x (..., in_features)."""
        return F.linear(x, self.weight.to(x.dtype))
