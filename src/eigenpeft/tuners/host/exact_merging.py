"""LoRA layers that give back their base weight bit for bit when an adapter is unmerged."""

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn


class _ExactUnmerge:
    """Keeps the weight that `merge` is about to change, and restores it in `unmerge`.

    LoRA subtracts ΔW again, which leaves rounding errors of the weight's dtype: `(W + ΔW) - ΔW` is not W. The price is a
    copy of each merged weight for as long as it is merged; `merge_and_unload` holds one layer's at a time.
    """

    _before_merge: tuple[Tensor, ...] = ()

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As LoRA's, keeping the weight first.

        Args:
            safe_merge: PEFT's own: refuse to merge what is not finite.
            adapter_names: PEFT's own: None merges the active adapters.
        """
        before = () if self.merged else _copies(_adapted_tensors(self))
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # pyright: ignore[reportAttributeAccessIssue]
        if before and self.merged:
            self._before_merge = before

    def unmerge(self: Any) -> None:
        """Unmerge as LoRA does, then put back the very weight that was kept, unless somebody else has changed it since."""
        before, self._before_merge = self._before_merge, ()
        merged = _copies(_adapted_tensors(self)) if before else ()
        super().unmerge()  # pyright: ignore[reportAttributeAccessIssue]
        for tensor, old, new in zip(_adapted_tensors(self), before, merged, strict=False):
            old = old.to(device=tensor.device, dtype=tensor.dtype)
            if old.shape == tensor.shape and _is_rounding(tensor - old, largest=(old, new)):
                tensor.copy_(old)

    def _get_name(self) -> str:
        # LoRA's own name, in representations.
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("peft."))


class ExactLinear(_ExactUnmerge, lora.Linear):
    """LoRA's linear layer."""


class ExactEmbedding(_ExactUnmerge, lora.Embedding):
    """LoRA's embedding."""


class ExactConv1d(_ExactUnmerge, lora.Conv1d):
    """LoRA's convolution over sequences."""


class ExactConv2d(_ExactUnmerge, lora.Conv2d):
    """LoRA's convolution over images."""


class ExactConv3d(_ExactUnmerge, lora.Conv3d):
    """LoRA's convolution over volumes."""


class ParamWrapper(_ExactUnmerge, lora.ParamWrapper):
    """LoRA's wrapper of a bare parameter; it keeps the name, by which PEFT tells it from other layers."""


_EXACT = {kind.__mro__[2]: kind for kind in _ExactUnmerge.__subclasses__()}


def make_exact(layer: nn.Module) -> nn.Module:
    """Give a layer that PEFT has just made the exact `unmerge`; quantised and other kinds are left as they are.

    Args:
        layer: LoRA layer.
    """
    if type(layer) in _EXACT:
        layer.__class__ = _EXACT[type(layer)]  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def _adapted_tensors(layer: Any) -> list[Tensor]:
    """The weight that adapters of a layer change, and the bias where they have one (`lora_bias`)."""
    if isinstance(layer, lora.ParamWrapper):
        return [layer.get_param().detach()]
    base = layer.get_base_layer()
    has_bias = any(layer.lora_bias.values()) and getattr(base, "bias", None) is not None
    return [base.weight.detach(), *([base.bias.detach()] if has_bias else [])]


def _copies(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


def _is_rounding(difference: Tensor, *, largest: tuple[Tensor, Tensor]) -> bool:
    scale = max(float(tensor.abs().max()) if tensor.numel() else 0.0 for tensor in largest)
    return bool(difference.abs().max() <= 8 * torch.finfo(difference.dtype).eps * scale) if difference.numel() else True
