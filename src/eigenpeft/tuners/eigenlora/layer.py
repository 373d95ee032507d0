"""LoRA's linear layer with the whole update of an EigenLoRA adapter taken as one operation."""

from typing import Any

from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor

from eigenpeft.tuners.factors import InputFactor, OutputFactor
from eigenpeft.tuners.routes import add_update, owns_output


class EigenLinear(Linear):
    """`peft.tuners.lora.Linear` whose active adapters have coefficients on components.

    Everything but the forward pass is PEFT's. DoRA, disabled, merged and mixed adapters go PEFT's way, through the factor
    modules.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the base layer plus the active adapters' updates.

        Args:
            x: (..., in_features).
            *args: The base layer's own.
            **kwargs: PEFT's and the base layer's own.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        if kwargs or self.disable_adapters or self.merged or any(name in self.lora_variant for name in names):
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x, *args)
        dtype, in_place = y.dtype, owns_output(self.base_layer)
        for name in names:
            inside: Any = self.lora_A[name]
            outside: Any = self.lora_B[name]
            x = self._cast_input_dtype(x, outside.coefficients.dtype)
            y = add_update(
                y,
                self.lora_dropout[name](x),
                components_in=inside.basis.components_in,
                coefficients_in=inside.coefficients,
                coefficients_out=outside.coefficients,
                components_out=outside.basis.components_out,
                scaling=self.scaling[name],
                in_place=in_place,
            )
        return y.to(dtype)


def adopt(layer: LoraLayer, adapter_name: str) -> None:
    """Make PEFT's linear layer ours once its factors are; layers of other kinds (quantised, ...) stay as they are.

    Args:
        layer: LoRA layer.
        adapter_name: Adapter whose factors were just put in.
    """
    factors = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if type(layer) is Linear and isinstance(factors[0], InputFactor) and isinstance(factors[1], OutputFactor):
        layer.__class__ = EigenLinear  # same fields, another forward pass: as if PEFT had made it
