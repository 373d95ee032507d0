"""LoRA's linear layer with the whole update of an EigenLoRA adapter taken as one operation."""

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn, tensor
from torch.nn.utils.rnn import pad_sequence

from eigenpeft.tuners.host.exact_merging import ExactLinear
from eigenpeft.tuners.layers.linear import InputFactor, OutputFactor
from eigenpeft.tuners.layers.routes import add_update, add_updates, owns_output


class EigenLinear(ExactLinear):
    """`peft.tuners.lora.Linear` whose active adapters have coefficients on components.

    Everything but the forward pass is PEFT's. DoRA, disabled and merged adapters, and plain LoRA's
    that share the layer, go PEFT's way, through the factor modules.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the base layer plus the active adapters' updates.

        Args:
            x: (..., in_features).
            *args: The base layer's own.
            **kwargs: PEFT's and the base layer's own.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = not kwargs and not self.disable_adapters and not self.merged
        has_variant = any(name in self.lora_variant for name in names)
        if plain and not has_variant and any(_whole(self.lora_B[name]) is not self.lora_B[name] for name in names):
            return self._forward_of_shards(x, names, *args)
        if not plain or not self._are_ours(names):
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x, *args)
        dtype, in_place = y.dtype, owns_output(self.base_layer)
        for name in names:
            factor_in: Any = self.lora_A[name]
            factor_out: Any = self.lora_B[name]
            x = self._cast_input_dtype(x, factor_out.coefficients.dtype)
            dropped = self.lora_dropout[name](x)
            y = add_update(
                y,
                dropped,
                components_in=factor_in.frozen_bank.components_in,
                coefficients_in=factor_in.coefficients,
                coefficients_out=factor_out.coefficients,
                components_out=factor_out.frozen_bank.components_out,
                scaling=self.scaling[name],
                in_place=in_place,
            )
            if factor_in.offset is not None:
                rest = nn.functional.linear(dropped.to(y.dtype), factor_in.offset.to(y.dtype))
                y = y + self.scaling[name] * nn.functional.linear(rest, factor_out.offset.to(y.dtype))
            if factor_out.bias is not None:
                y = y + self.scaling[name] * factor_out.bias.to(y.dtype)
        return y.to(dtype)

    def _forward_of_shards(self, x: Tensor, names: Sequence[str], *args: Any) -> Tensor:
        # The factors that FullyShardedDataParallel wraps have their tensors whole only while they are called.
        y = self.base_layer(x, *args)
        dtype = y.dtype
        for name in names:
            factor_in, factor_out = self.lora_A[name], self.lora_B[name]
            x = self._cast_input_dtype(x, next(_whole(factor_out).parameters()).dtype)
            y = y + factor_out(factor_in(self.lora_dropout[name](x))) * self.scaling[name]
        return y.to(dtype)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
        # PEFT's loop over the adapters of a batch, as batched products when they share their components.
        names = [name for name in dict.fromkeys(adapter_names) if name in self.lora_A]
        if not names or not self._can_be_stacked(names) or any(value is not None for value in kwargs.values()):
            return super()._mixed_batch_forward(x, *args, adapter_names=list(adapter_names), **kwargs)
        y = self.base_layer(x, *args)
        factor_in: Any = [self.lora_A[name] for name in names]
        factor_out: Any = [self.lora_B[name] for name in names]
        rows = {name: row for row, name in enumerate(names)}
        coefficients_in = pad_sequence([factor.coefficients for factor in factor_in], batch_first=True)
        scaling = coefficients_in.new_tensor([float(self.scaling[name]) for name in names])
        coefficients_out = pad_sequence([factor.coefficients.mT for factor in factor_out], batch_first=True).mT
        # One more member of zeros, for rows of the base model and of adapters that lack this layer.
        padding = (0, 0, 0, 0, 0, 1)
        sum_ = add_updates(
            y,
            self._cast_input_dtype(x, coefficients_in.dtype),
            tensor([rows.get(name, len(names)) for name in adapter_names], device=x.device),
            components_in=factor_in[0].frozen_bank.components_in,
            coefficients_in=nn.functional.pad(coefficients_in, padding),
            coefficients_out=nn.functional.pad(coefficients_out * scaling[:, None, None], padding),
            components_out=factor_out[0].frozen_bank.components_out,
            in_place=owns_output(self.base_layer),
        )
        return sum_.to(y.dtype)

    def _are_ours(self, names: Sequence[str]) -> bool:
        for name in names:
            ours = isinstance(self.lora_A[name], InputFactor) and isinstance(self.lora_B[name], OutputFactor)
            if not ours or name in self.lora_variant:
                return False
        return True

    def _can_be_stacked(self, names: Sequence[str]) -> bool:
        factors: Any = [self.lora_A[name] for name in names]
        has_dropout = self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in names)
        return (
            not has_dropout
            and self._are_ours(names)
            and all(factor.coefficients is not None and factor.offset is None for factor in factors)
            and all(factor.frozen_bank is factors[0].frozen_bank for factor in factors)
            and not any(self.lora_bias[name] for name in names)
        )


def _whole(factor: nn.Module) -> nn.Module:
    """A factor without the wrapper of FullyShardedDataParallel."""
    return getattr(factor, "_fsdp_wrapped_module", factor)


def adopt(layer: LoraLayer, adapter_name: str) -> None:
    """Make PEFT's linear layer ours once its factors are; layers of other kinds (quantised, ...) stay as they are.

    Args:
        layer: LoRA layer.
        adapter_name: Adapter whose factors were just put in.
    """
    if type(layer) is not ExactLinear:
        return
    factors = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if isinstance(factors[0], InputFactor) and isinstance(factors[1], OutputFactor):
        layer.__class__ = EigenLinear  # same fields, another forward pass: as if PEFT had made it
