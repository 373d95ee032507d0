"""The kinds of LoRA layer as one table: where LoRA keeps A and B, which factors of ours go there, blocks and shapes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import (
    BdLoraLinearVariant,
    KasaLinearVariant,
    MiCAEmbeddingVariant,
    MiCALinearVariant,
)
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg import Factors
from eigenpeft.tuners.layers.blocks import BlockInputFactor, BlockOutputFactor, n_blocks_of
from eigenpeft.tuners.layers.convolution import (
    ConvolutionInputFactor,
    ConvolutionOutputFactor,
    MixedConvolutionFactor,
    is_convolution,
)
from eigenpeft.tuners.layers.embedding import EmbeddingInputFactor, EmbeddingOutputFactor, MixedEmbeddingFactor
from eigenpeft.tuners.layers.experts import ExpertDiagonalFactor, MixedExpertFactor, RepeatedInputFactor
from eigenpeft.tuners.layers.linear import InputFactor, MixedFactor, OutputFactor
from eigenpeft.tuners.layers.mixture import EmbeddingMixtureFactor, MixtureFactor, MixtureWeights
from eigenpeft.tuners.layers.shared_bases import FrozenBank


class Sides(NamedTuple):
    """What EigenLoRA's pair of factors is made of.

    Attributes:
        frozen_bank: The components.
        coefficients_in: C_in, or None where A is the components themselves.
        coefficients_out: C_out, or the diagonals; None for a mixture.
        is_matrix: Whether C_out has columns, rather than being diagonals.
        mixture: Weights and frozen cores (T, K_out, K_in) of a mixture.
        offset: `(B (out_features, q), A (q, in_features))` of a frozen update beside the core's.
    """

    frozen_bank: FrozenBank
    coefficients_in: Tensor | None
    coefficients_out: Tensor | None
    is_matrix: bool
    mixture: tuple[MixtureWeights, Tensor] | None = None
    offset: Factors | None = None

    @property
    def offsets(self) -> tuple[Tensor | None, Tensor | None]:
        """Offsets of the input and of the output side."""
        return (None, None) if self.offset is None else (self.offset[1], self.offset[0])


def _linear_pair(sides: Sides, layer: Any, replaced: tuple[Any, Any]) -> tuple[Any, nn.Module]:
    (rows, columns), bias = sides.offsets, getattr(replaced[1], "bias", None)
    n_blocks_in, n_blocks_out = map(n_blocks_of, replaced)
    if n_blocks_in > 1 and sides.coefficients_in is not None:
        factor_in = BlockInputFactor(sides.frozen_bank, coefficients=sides.coefficients_in, n_blocks=n_blocks_in)
    else:
        factor_in = InputFactor(sides.frozen_bank, coefficients=sides.coefficients_in, offset=rows)
    if n_blocks_out > 1:
        return factor_in, BlockOutputFactor(
            sides.frozen_bank, coefficients=_coefficients_out(sides), n_blocks=n_blocks_out
        )
    if sides.mixture is not None:
        mixing, cores = sides.mixture
        return factor_in, MixtureFactor(sides.frozen_bank, mixing=mixing, cores=cores, bias=bias, offset=columns)
    return factor_in, OutputFactor(sides.frozen_bank, coefficients=_coefficients_out(sides), bias=bias, offset=columns)


def _embedding_pair(sides: Sides, layer: Any, replaced: tuple[Any, Any]) -> tuple[Any, nn.Module]:
    rows, columns = sides.offsets
    factor_in = EmbeddingInputFactor(sides.frozen_bank, coefficients=sides.coefficients_in, offset=rows)
    if sides.mixture is not None:
        mixing, cores = sides.mixture
        return factor_in, EmbeddingMixtureFactor(sides.frozen_bank, mixing=mixing, cores=cores, offset=columns)
    return factor_in, EmbeddingOutputFactor(sides.frozen_bank, coefficients=_coefficients_out(sides), offset=columns)


def _convolution_pair(sides: Sides, layer: Any, replaced: tuple[Any, Any]) -> tuple[Any, nn.Module]:
    factor_in = ConvolutionInputFactor(sides.frozen_bank, coefficients=sides.coefficients_in, replaced=replaced[0])
    return factor_in, ConvolutionOutputFactor(
        sides.frozen_bank, coefficients=_coefficients_out(sides), replaced=replaced[1]
    )


def _expert_pair(sides: Sides, layer: Any, replaced: tuple[Any, Any]) -> tuple[Any, nn.Module]:
    output = OutputFactor if sides.is_matrix else ExpertDiagonalFactor
    if sides.coefficients_in is None:
        factor_in = RepeatedInputFactor(sides.frozen_bank, n_experts=layer.num_experts)
    else:
        factor_in = InputFactor(sides.frozen_bank, coefficients=sides.coefficients_in)
    return factor_in, output(sides.frozen_bank, coefficients=_coefficients_out(sides))


def _coefficients_out(sides: Sides) -> Tensor:
    assert sides.coefficients_out is not None  # only a mixture has none, and only layers with `has_one_core` get one
    return sides.coefficients_out


@dataclass(frozen=True)
class LayerKind:
    """One row of `KINDS`.

    Attributes:
        name: What it is.
        fits: Whether a LoRA layer is of this kind; the first row that fits counts.
        attributes: Names of the dictionaries, by adapter, in which LoRA keeps A and B.
        pair: EigenLoRA's two factors from their `Sides`, the layer, and LoRA's own A and B.
        mixed: MoSLoRA's factor `B M`.
        n_blocks: How many updates of their own a layer has: experts of a parameter, groups of a convolution.
        blocks: What messages call them.
        rank_is_split: Whether LoRA's r is that of all blocks together (groups), or of each one (experts).
        window: Inputs per input channel: the entries of a convolution's kernel.
        zero_side: Side that LoRA starts at zero.
        is_parameter: Whether LoRA adapts a bare parameter, by `target_parameters`.
        has_one_core: Whether the update is one matrix `V_outᵀ M V_in`, so that a mixture and an offset are defined.
    """

    name: str
    fits: Callable[[Any], bool]
    attributes: tuple[str, str] = ("lora_A", "lora_B")
    pair: Callable[[Sides, Any, tuple[Any, Any]], tuple[Any, nn.Module]] = _linear_pair
    mixed: type[MixedFactor] = MixedFactor
    n_blocks: Callable[[Any], int] = lambda layer: 1
    blocks: str = "blocks"
    rank_is_split: bool = False
    window: Callable[[Any], int] = lambda layer: 1
    zero_side: Literal["in", "out"] = "out"
    is_parameter: bool = False
    has_one_core: bool = False


KINDS: tuple[LayerKind, ...] = (
    LayerKind(
        "embedding",
        lambda layer: isinstance(layer, Embedding),
        attributes=("lora_embedding_A", "lora_embedding_B"),
        pair=_embedding_pair,
        mixed=MixedEmbeddingFactor,
        zero_side="in",
        has_one_core=True,
    ),
    LayerKind(
        "experts",
        lambda layer: isinstance(layer, ParamWrapper) and layer.num_experts > 1,
        pair=_expert_pair,
        mixed=MixedExpertFactor,
        n_blocks=lambda layer: layer.num_experts,
        blocks="experts",
        is_parameter=True,
    ),
    LayerKind("parameter", lambda layer: isinstance(layer, ParamWrapper), is_parameter=True),
    LayerKind(
        "convolution",
        lambda layer: is_convolution(layer.get_base_layer()),
        pair=_convolution_pair,
        mixed=MixedConvolutionFactor,
        n_blocks=lambda layer: layer.get_base_layer().groups,
        blocks="groups",
        rank_is_split=True,
        window=lambda layer: math.prod(layer.get_base_layer().kernel_size),
    ),
    LayerKind("linear", lambda layer: True, has_one_core=True),
)
"""Kinds of LoRA layer; "linear" is every other one, such as Conv1D, attention, and quantized layers."""


def kind_of(layer: LoraLayer) -> LayerKind:
    """The row of a LoRA layer.

    Args:
        layer: LoRA layer.
    """
    return next(kind for kind in KINDS if kind.fits(layer))


def tuned_layers(layer: nn.Module, key: str) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers that PEFT has just made or extended for one target, by the name of the weight each adapts.

    One, but for multi-head attention, whose output projection has a layer of its own inside.

    Args:
        layer: What PEFT made or extended.
        key: Name of the target in the model; of the parameter, for bare parameters.

    Raises:
        AdapterConfigError: If it is not a LoRA layer that our methods know.
    """
    if not isinstance(layer, LoraLayer):
        raise AdapterConfigError(
            f"{key!r} became a {type(layer).__name__}, which is not one of PEFT's LoRA layers; exclude it."
        )
    yield key, layer
    if isinstance(layer, MultiheadAttention):
        projection: Any = layer.get_base_layer().out_proj
        yield f"{key}.out_proj", projection


def weight_name(path: str, layer: LoraLayer) -> str:
    """The base model's own name of the weight that a layer adapts.

    Args:
        path: Where the layer is in the adapted model.
        layer: LoRA layer.
    """
    name = path.replace(".base_layer", "")
    return f"{name}.{layer.parameter_name}" if kind_of(layer).is_parameter else name  # pyright: ignore[reportAttributeAccessIssue]


def factor_dicts(layer: LoraLayer) -> tuple[Any, Any]:
    """The dictionaries, by adapter, that hold a layer's A and B.

    Args:
        layer: LoRA layer.
    """
    inputs, outputs = kind_of(layer).attributes
    return getattr(layer, inputs), getattr(layer, outputs)


def replace_factor(factors: Any, adapter_name: str, factor: nn.Module) -> None:
    """Put a factor module where LoRA made its own, which may be a bare parameter.

    Args:
        factors: One of `factor_dicts`.
        adapter_name: Adapter.
        factor: Ours.
    """
    del factors[adapter_name]  # torch refuses a module where a parameter is
    factors[adapter_name] = factor


def weight_shape(layer: LoraLayer) -> tuple[int, int]:
    """(out_features, in_features) of the update; a convolution's input side is its flattened kernel.

    Args:
        layer: LoRA layer.
    """
    return layer.out_features or 0, (layer.in_features or 0) * kind_of(layer).window(layer)


# Variants that have done their work on the layer before its factors are swapped: cut the base weight, made the blocks that ours
# stand for, or named the side that is frozen. The others (DoRA's magnitude) are made from the factors, and so anew.
_MADE_ONCE = (BdLoraLinearVariant, KasaLinearVariant, MiCALinearVariant, MiCAEmbeddingVariant)


def settle(layer: LoraLayer, adapter_name: str, *, lora_config: LoraConfig, active_adapters: Sequence[str]) -> None:
    """Finish what `LoraLayer.update_layer` does, now for the swapped factor modules.

    Args:
        layer: LoRA layer.
        adapter_name: Adapter whose factors were swapped.
        lora_config: Its configuration, which PEFT's `LoraVariant.init` takes whole and reads for each variant its own fields.
        active_adapters: Those of the whole model: an adapter added to others is not trainable until it is activated.
    """
    layer._move_adapter_to_device_of_base_layer(adapter_name)
    variant: Any = layer.lora_variant.get(adapter_name)
    # DoRA measured its magnitude with the factors that are gone; on the meta device it waits for its file instead.
    is_meta = any(_is_meta(factors[adapter_name]) for factors in factor_dicts(layer))
    if variant is not None and not isinstance(variant, _MADE_ONCE) and not is_meta:
        variant.init(layer, adapter_name=adapter_name, config=lora_config)
    layer.set_adapter(layer.active_adapters, inference_mode=lora_config.inference_mode)
    if adapter_name not in active_adapters:
        for factors in factor_dicts(layer):
            factors[adapter_name].requires_grad_(False)


def _is_meta(factor: Any) -> bool:
    tensors = factor.parameters() if isinstance(factor, nn.Module) else [factor]
    return any(tensor.device.type == "meta" for tensor in tensors)
