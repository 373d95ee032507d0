"""Factors of a layer whose core is weighed anew for every token, and a loss that rides on their output."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.gated import arrow_weights, gated_core, load_balance, weighed_core
from eigenpeft.tuners.layers.linear import KeepsPrecision


class ComponentsFactor(KeepsPrecision):
    """`z = V_in x`: frozen components in the place of LoRA's A, which the adapter's file contains.

    Args:
        components: V_in, (K_in, in_features).
    """

    components: Tensor

    def __init__(self, components: Tensor):
        super().__init__()
        self.register_buffer("components", components)
        self.bias = None
        self.out_features, self.in_features = components.shape

    @property
    def weight(self) -> Tensor:
        """(K_in, in_features), as LoRA's own `lora_A.weight`."""
        return self.components

    def forward(self, x: Tensor) -> Tensor:
        """`V_in x` for x (..., in_features)."""
        return F.linear(x, self.components.to(x.dtype))


class GatedFactor(KeepsPrecision):
    """`V_outᵀ Σ_e g_e M_e z` in the place of LoRA's B, with weights g of every token; no matrix does the same.

    The weights are `softmax(W_g z)` of a trained gate (CoMoL's form), or `arrow_weights` of prototypes, where nothing is trained.

    Args:
        components: V_out, (K_out, out_features); the adapter's file contains it.
        gate: W_g, (E, K_in), trained; or the prototypes p_e, frozen, with `top_k`.
        cores: The M_e, (E, K_out, K_in).
        train_cores: Whether they are trained; otherwise they are frozen and saved.
        balance: Weight of the load-balance loss, which is added to the gradient in training.
        top_k: How many cores act on a token by Arrow's rule; None for the trained gate.
    """

    components: Tensor
    cores: Tensor
    gate: Tensor

    def __init__(
        self,
        components: Tensor,
        *,
        gate: Tensor,
        cores: Tensor,
        train_cores: bool,
        balance: float = 0.0,
        top_k: int | None = None,
    ):
        super().__init__()
        self.register_buffer("components", components)
        for name, tensor, is_trained in (("gate", gate, top_k is None), ("cores", cores, train_cores)):
            if is_trained:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.balance, self.top_k, self.bias = balance, top_k, None
        self.in_features, self.out_features = gate.shape[1], components.shape[1]

    @property
    def weight(self) -> Tensor:
        """A gated adapter has no weight matrix.

        Raises:
            AdapterConfigError: Always; whatever asks for a matrix would merge, combine or export the adapter.
        """
        raise AdapterConfigError(
            "A gated adapter (GATEDLORA) weighs its cores anew for every token, so that no one matrix has its update: it cannot be "
            "merged, combined or exported as a LoRA. Serve it as it is with PEFT, or train core='mixture', whose weights are fixed."
        )

    def extra_repr(self) -> str:
        """Sizes, as a linear layer prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, n_cores={len(self.cores)}"

    def forward(self, z: Tensor) -> Tensor:
        """The update at z (..., K_in)."""
        gate, cores = self.gate.to(z.dtype), self.cores.to(z.dtype)
        if self.top_k is None:
            core, weights = gated_core(z, gate, cores)
        else:
            weights = arrow_weights(z, gate, top_k=self.top_k)
            core = weighed_core(z, weights, cores)
        y = F.linear(core, self.components.to(z.dtype).mT)
        if self.training and self.balance and torch.is_grad_enabled():
            y = _WithLoss.apply(y, self.balance * load_balance(weights.float()))
        return y


class _WithLoss(torch.autograd.Function):
    """y itself, whose backward pass also starts at a loss: any trainer minimises both without knowing of the second."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)
