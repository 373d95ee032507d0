"""Factor modules that stand in for LoRA's `lora_A` / `lora_B`: modules whose weight is computed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenpeft.linalg.layer_update import factor_is_cheaper, input_product, output_operands
from eigenpeft.tuners.layers.shared_bases import FrozenBank


class KeepsPrecision(nn.Module):
    """A factor whose frozen tensors stay as precise as they are where PEFT gives an adapter the base weight's 16 bits.

    PEFT makes trained coefficients float32 again afterwards; what is not trained would stay rounded, in its file too.
    """

    _FROZEN = ("offset", "cores", "components")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        before = {name: buffer for name in self._FROZEN if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, *args, **kwargs)
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype.itemsize < buffer.dtype.itemsize and not buffer.is_meta:
                self._buffers[name] = buffer.to(now.device)
        return self


class InputFactor(KeepsPrecision):
    """`A = C_in V_in`, (r, in_features): trainable coefficients on frozen components.

    With no coefficients it is `A = V_in` itself, (K, in_features): the input side of a mixer.

    Args:
        frozen_bank: Where the components live; not a submodule of this one, so that they move and are counted once.
        coefficients: (r, n_components), or None.
        offset: Frozen rows below those of A, (q, in_features): the input side of an update that the components do not hold.
    """

    offset: Tensor | None

    def __init__(self, frozen_bank: FrozenBank, *, coefficients: Tensor | None, offset: Tensor | None = None):
        super().__init__()
        self._owned_elsewhere = (frozen_bank,)  # in a tuple, so that it is not a submodule: the LoRA layer owns it
        self.coefficients = None if coefficients is None else nn.Parameter(coefficients)
        self.register_buffer("offset", offset)
        self.follows: tuple[Any, ...] = ()  # the output side, whose dtype is the adapter's when there is nothing here
        self.bias = None
        self.in_features = frozen_bank.components_in.shape[1]
        own = len(frozen_bank.components_in) if coefficients is None else len(coefficients)
        self.out_features = own if offset is None else own + len(offset)

    @property
    def frozen_bank(self) -> FrozenBank:
        """The shared components."""
        return self._owned_elsewhere[0]

    def use_bank(self, frozen_bank: FrozenBank) -> None:
        """Stand on other components of the same shape, which the LoRA layer owns too.

        Args:
            frozen_bank: The components.
        """
        self._owned_elsewhere = (frozen_bank,)

    @property
    def weight(self) -> Tensor:
        """(r, in_features), as LoRA's own `lora_A.weight`; (r + q, in_features) with an offset."""
        components = self.frozen_bank.components_in
        if self.coefficients is None:
            # A copy, since PEFT writes into weights and the components are everybody's; in the adapter's dtype, as LoRA's.
            own = components.to(self.follows[0].coefficients.dtype if self.follows else components.dtype, copy=True)
        else:
            own = self.coefficients @ components.to(self.coefficients.dtype)
        return own if self.offset is None else torch.cat([own, self.offset.to(own)])

    def extra_repr(self) -> str:
        """Sizes, as a linear layer prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """`A x` for x (..., in_features)."""
        coefficients = None if self.coefficients is None else self.coefficients.to(x.dtype)
        on_factor = coefficients is not None and _factor_is_cheaper(x, coefficients)
        h = input_product(x, self.frozen_bank.components_in.to(x.dtype), coefficients, on_factor=on_factor)[0]
        return h if self.offset is None else torch.cat([h, F.linear(x, self.offset.to(x.dtype))], dim=-1)


class OutputFactor(KeepsPrecision):
    """`B = V_outᵀ C_out`, (out_features, r): trainable coefficients on frozen components.

    Args:
        frozen_bank: Where the components live; not a submodule of this one.
        coefficients: (n_components, r); or (n_components,), the diagonal of a square matrix.
        bias: (out_features,), trained and added to `B h` (`lora_bias`), or None.
        offset: Frozen columns beside those of B, (out_features, q): the output side of an update that the components do not
            hold. The adapter's scaling multiplies it too.
    """

    offset: Tensor | None

    def __init__(
        self,
        frozen_bank: FrozenBank,
        *,
        coefficients: Tensor,
        bias: nn.Parameter | None = None,
        offset: Tensor | None = None,
    ):
        super().__init__()
        self.coefficients = nn.Parameter(coefficients)
        self._stand_on(frozen_bank, rank=coefficients.shape[-1], bias=bias, offset=offset)

    def _stand_on(
        self, frozen_bank: FrozenBank, *, rank: int, bias: nn.Parameter | None, offset: Tensor | None
    ) -> None:
        self._owned_elsewhere = (frozen_bank,)
        self.bias = bias
        self.register_buffer("offset", offset)
        self.in_features = rank if offset is None else rank + offset.shape[1]
        self.out_features = frozen_bank.components_out.shape[1]

    @property
    def frozen_bank(self) -> FrozenBank:
        """The shared components."""
        return self._owned_elsewhere[0]

    def use_bank(self, frozen_bank: FrozenBank) -> None:
        """Stand on other components of the same shape, which the LoRA layer owns too.

        Args:
            frozen_bank: The components.
        """
        self._owned_elsewhere = (frozen_bank,)

    @property
    def weight(self) -> Tensor:
        """(out_features, r), as LoRA's own `lora_B.weight`; (out_features, r + q) with an offset."""
        coefficients = self.coefficients
        components = self.frozen_bank.components_out.to(coefficients.dtype)
        own = components.mT * coefficients if coefficients.ndim == 1 else components.mT @ coefficients
        return own if self.offset is None else torch.cat([own, self.offset.to(own)], dim=1)

    def extra_repr(self) -> str:
        """Sizes, as a linear layer prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, h: Tensor) -> Tensor:
        """`B h` for h (..., r); with an offset, (..., r + q)."""
        components = self.frozen_bank.components_out.to(h.dtype)
        coefficients = self.coefficients.to(h.dtype)
        bias = None if self.bias is None else self.bias.to(h.dtype)
        rest = None
        if self.offset is not None:
            h, rest = h.split([h.shape[-1] - self.offset.shape[1], self.offset.shape[1]], dim=-1)
        on_factor = coefficients.ndim == 2 and _factor_is_cheaper(h, coefficients)
        left, right = output_operands(h, coefficients, components, on_factor=on_factor)
        own = F.linear(left, right.mT, bias)
        return own if rest is None else own + F.linear(rest, self.offset.to(h.dtype))  # pyright: ignore[reportOptionalMemberAccess]


class MixedFactor(nn.Module):
    """`B M`, (out_features, r): LoRA's B behind a trainable r x r mixer (MoSLoRA, arXiv 2406.11909, equation 3).

    Stands in for the linear layer that LoRA made for B; other layers have subclasses.

    Args:
        replaced: LoRA's own module; its weight becomes the trainable B.
        mixer: (r, r).
        train_mixer: Whether it is a parameter; otherwise it is a buffer, saved but never trained.
    """

    mixer: Tensor
    factor: Tensor

    def __init__(self, replaced: Any, *, mixer: Tensor, train_mixer: bool = True):
        super().__init__()
        self.factor = nn.Parameter(replaced.weight.detach())
        if train_mixer:
            self.mixer = nn.Parameter(mixer)
        else:
            self.register_buffer("mixer", mixer)
        self.bias: nn.Parameter | None = getattr(replaced, "bias", None)
        self.in_features = mixer.shape[1]
        self.out_features = len(self.factor)

    def freeze_factor(self) -> None:
        """Make B a buffer, saved but never trained, for starts that train A alone (MiCA); the mixer stays as it is."""
        factor = self.factor.detach()
        del self.factor
        self.register_buffer("factor", factor)

    @property
    def weight(self) -> Tensor:
        """(out_features, r), as LoRA's own `lora_B.weight`."""
        return self.factor @ self.mixer.to(self.factor.dtype)

    def extra_repr(self) -> str:
        """Sizes, as a linear layer prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, h: Tensor) -> Tensor:
        """`B M h` for h (..., r)."""
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return F.linear(F.linear(h, self.mixer.to(h.dtype)), self.factor.to(h.dtype), bias)


def _factor_is_cheaper(x: Tensor, coefficients: Tensor) -> bool:
    n_components, rank = sorted(coefficients.shape, reverse=True)
    return factor_is_cheaper(x.numel() // x.shape[-1], n_components=n_components, rank=rank)
