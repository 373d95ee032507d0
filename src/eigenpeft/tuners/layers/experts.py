"""Factor modules of bare parameters (`target_parameters`), such as the stacked experts of a mixture.

LoRA keeps one pair of factors a parameter: A (n_experts * r, in_features), expert by expert, and B (out_features,
r * n_experts), in which the expert is the faster index.
"""

from typing import Any

import torch
from torch import Tensor

from eigenpeft.tuners.layers.linear import InputFactor, MixedFactor, OutputFactor
from eigenpeft.tuners.layers.shared_bases import FrozenBank


class RepeatedInputFactor(InputFactor):
    """`A = V_in` for every expert, (n_experts * n_components, in_features).

    Args:
        frozen_bank: Bank whose components of the input side are used.
        n_experts: How many experts share them.
    """

    def __init__(self, frozen_bank: FrozenBank, *, n_experts: int):
        super().__init__(frozen_bank, coefficients=None)
        self._n_experts = n_experts
        self.out_features *= n_experts

    @property
    def weight(self) -> Tensor:
        """(n_experts * n_components, in_features)."""
        return super().weight.repeat(self._n_experts, 1)


class ExpertDiagonalFactor(OutputFactor):
    """`B = V_outᵀ diag(d_e)` for expert e, (out_features, n_components * n_experts).

    Args:
        frozen_bank: Bank whose components of the output side are used.
        coefficients: (n_components, n_experts), one diagonal per expert.
    """

    def __init__(self, frozen_bank: FrozenBank, *, coefficients: Tensor):
        super().__init__(frozen_bank, coefficients=coefficients)
        self.in_features = coefficients.numel()

    @property
    def weight(self) -> Tensor:
        """(out_features, n_components * n_experts)."""
        components = self.frozen_bank.components_out.to(self.coefficients.dtype)
        return torch.einsum("ko,ke->oke", components, self.coefficients).flatten(1)


class MixedExpertFactor(MixedFactor):
    """`B_e M_e` for expert e, (out_features, r * n_experts): a mixer of its own for every expert.

    Args:
        replaced: LoRA's own linear layer; its weight becomes the trainable B.
        mixer: (n_experts, r, r).
        train_mixer: Whether it is trained.
    """

    def __init__(self, replaced: Any, *, mixer: Tensor, train_mixer: bool = True):
        super().__init__(replaced, mixer=mixer, train_mixer=train_mixer)
        self.in_features = replaced.weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """(out_features, r * n_experts), as LoRA's own `lora_B.weight`."""
        n_experts, rank, _ = self.mixer.shape
        factor = self.factor.view(-1, rank, n_experts)
        return torch.einsum("ose,esr->ore", factor, self.mixer.to(factor.dtype)).flatten(1)
