"""Factor modules of convolutions: the input side is a convolution to r channels, the output side a 1x1 one."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenpeft.tuners.layers.linear import InputFactor, MixedFactor, OutputFactor
from eigenpeft.tuners.layers.shared_bases import FrozenBank


def convolve(x: Tensor, weight: Tensor, *, like: Any, bias: Tensor | None = None) -> Tensor:
    """Convolution of any dimension with another convolution's settings.

    Args:
        x: (batch, in_channels, *spatial).
        weight: (out_channels, in_channels / groups, *kernel).
        like: `stride`, `padding` and `groups`; a `torch.nn` convolution or a copy of its settings.
        bias: (out_channels,).
    """
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    bias = None if bias is None else bias.to(x.dtype)
    return function(x, weight.to(x.dtype), bias, stride=like.stride, padding=like.padding, groups=like.groups)


def settings_of(convolution: Any) -> SimpleNamespace:
    """The settings that `convolve` reads, without the weights.

    Args:
        convolution: A `torch.nn` convolution.
    """
    return SimpleNamespace(stride=convolution.stride, padding=convolution.padding, groups=convolution.groups)


class ConvolutionInputFactor(InputFactor):
    """`A = C_in V_in` as a convolution to r channels; the bank's rows are kernels (in_channels * prod(kernel),).

    Args:
        frozen_bank: Components, flattened kernels on the input side.
        coefficients: (r, n_components), or None for the components themselves.
        replaced: LoRA's own convolution, for its kernel and settings.
    """

    def __init__(self, frozen_bank: FrozenBank, *, coefficients: Tensor | None, replaced: Any):
        super().__init__(frozen_bank, coefficients=coefficients)
        self._settings = settings_of(replaced)
        self._kernel = tuple(replaced.weight.shape[1:])

    @property
    def weight(self) -> Tensor:
        """(r, in_channels, *kernel), as LoRA's own `lora_A.weight`."""
        flat = super().weight
        return flat.view(len(flat), *self._kernel)

    def forward(self, x: Tensor) -> Tensor:
        """`A x` for x (batch, in_channels, *spatial)."""
        return convolve(x, self.weight, like=self._settings)


class ConvolutionOutputFactor(OutputFactor):
    """`B = V_outᵀ C_out` as a 1x1 convolution; with g groups C_out is (n_components, r / g), as LoRA's B is.

    Args:
        frozen_bank: Components.
        coefficients: (n_components, r / groups), or (n_components,) for a diagonal without groups.
        replaced: LoRA's own convolution, for its settings and its bias.
    """

    def __init__(self, frozen_bank: FrozenBank, *, coefficients: Tensor, replaced: Any):
        super().__init__(frozen_bank, coefficients=coefficients, bias=replaced.bias)
        self._settings = settings_of(replaced)
        self._ones = (1,) * (replaced.weight.ndim - 2)

    @property
    def weight(self) -> Tensor:
        """(out_channels, r / groups, 1, ...), as LoRA's own `lora_B.weight`."""
        flat = super().weight
        return flat.reshape(*flat.shape, *self._ones)

    def forward(self, h: Tensor) -> Tensor:
        """`B h` for h (batch, r, *spatial)."""
        return convolve(h, self.weight, like=self._settings, bias=self.bias)


class MixedConvolutionFactor(MixedFactor):
    """`B M` as a 1x1 convolution; with g groups M is block-diagonal, (g, r / g, r / g).

    Args:
        replaced: LoRA's own convolution; its weight becomes the trainable B.
        mixer: (r, r), or (groups, r / groups, r / groups).
        train_mixer: Whether it is trained.
    """

    def __init__(self, replaced: Any, *, mixer: Tensor, train_mixer: bool = True):
        super().__init__(replaced, mixer=mixer, train_mixer=train_mixer)
        self._settings = settings_of(replaced)

    @property
    def weight(self) -> Tensor:
        """(out_channels, r / groups, 1, ...), as LoRA's own `lora_B.weight`."""
        mixer = self.mixer.to(self.factor.dtype)
        if mixer.ndim == 2:
            return torch.einsum("os...,sr->or...", self.factor, mixer)
        grouped = self.factor.view(len(mixer), -1, *self.factor.shape[1:])
        return torch.einsum("gos...,gsr->gor...", grouped, mixer).reshape(self.factor.shape)

    def forward(self, h: Tensor) -> Tensor:
        """`B M h` for h (batch, r, *spatial)."""
        return convolve(h, self.weight, like=self._settings, bias=self.bias)


def is_convolution(module: nn.Module) -> bool:
    """Whether a base layer is a convolution that LoRA adapts.

    Args:
        module: Base layer.
    """
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
