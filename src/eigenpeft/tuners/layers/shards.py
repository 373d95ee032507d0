"""Factors of linear layers whose vectors are shards of a pool that several layers share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenpeft.linalg.shards import composed


class ShardFactor(nn.Module):
    """LoRA's A or B with rows, or columns, put together from public and private shards (MoS, arXiv 2410.00938, section 3).

    The public shards are a parameter of the factor of one layer, the owner, and the other layers refer to that factor: the
    adapter's file has them once.

    Args:
        index: (r, l), places in `[public; private]`; saved with the adapter and never trained.
        private: (n_private, w), the layer's own shards, or None.
        public: (n_public, w) of the owner; None for the other layers, and where there are none.
        owner: The factor that has the public shards; None for the owner itself, and where there are none.
        is_output: Whether the vectors are columns, as those of B are.
        bias: (out_features,), trained and added to `B h` (`lora_bias`), or None.
    """

    index: Tensor

    def __init__(
        self,
        index: Tensor,
        *,
        private: Tensor | None,
        public: Tensor | None,
        owner: "ShardFactor | None",
        is_output: bool,
        bias: nn.Parameter | None = None,
    ):
        super().__init__()
        self.register_buffer("index", index)
        self.private = None if private is None else nn.Parameter(private)
        self.public = None if public is None else nn.Parameter(public)
        self._owned_elsewhere = () if owner is None else (owner,)  # in a tuple, so that it is not a submodule
        self.is_output = is_output
        self.bias = bias
        sizes = len(index), self.pool.shape[1] * index.shape[1]
        self.in_features, self.out_features = sizes if is_output else sizes[::-1]

    @property
    def pool(self) -> Tensor:
        """(n_public + n_private, w), on the device of the layer."""
        owner: Any = self._owned_elsewhere[0] if self._owned_elsewhere else self
        public, private = owner.public, self.private
        if public is None:
            assert private is not None
            return private
        public = public.to(self.index.device)
        return public if private is None else torch.cat([public.to(private.dtype), private])

    @property
    def weight(self) -> Tensor:
        """(r, in_features), as LoRA's own `lora_A.weight`; or (out_features, r), as `lora_B.weight`."""
        vectors = composed(self.pool, self.index)
        return vectors.mT if self.is_output else vectors

    def extra_repr(self) -> str:
        """Sizes, as a linear layer prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """`A x` for x (..., in_features), or `B h` for h (..., r)."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
