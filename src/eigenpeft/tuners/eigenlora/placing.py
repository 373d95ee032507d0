"""The pair of EigenLoRA factors, with its starting coefficients, for each kind of LoRA layer."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig
from eigenpeft.tuners.eigenlora.start import initial_coefficients, initial_embedding_coefficients
from eigenpeft.tuners.layers.convolution import ConvolutionInputFactor, ConvolutionOutputFactor, is_convolution
from eigenpeft.tuners.layers.embedding import EmbeddingInputFactor, EmbeddingOutputFactor
from eigenpeft.tuners.layers.experts import ExpertDiagonalFactor, RepeatedInputFactor
from eigenpeft.tuners.layers.kinds import factor_dicts, replace_factor
from eigenpeft.tuners.layers.linear import InputFactor, OutputFactor
from eigenpeft.tuners.layers.shared_bases import Basis

Start = tuple[Tensor | None, Tensor]


def start(layer: LoraLayer, adapter_name: str, *, basis: Basis, config: EigenLoraConfig, module: str) -> Start:
    """Coefficients of both sides that an adapter starts from on a layer.

    Args:
        layer: LoRA layer.
        adapter_name: Adapter.
        basis: Its components there.
        config: Its configuration.
        module: Name of the adapted weight, for messages.

    Raises:
        AdapterConfigError: If the core is not defined for a grouped convolution.
    """
    rank, n_components = layer.r[adapter_name], len(basis.components_in)
    settings: Any = {"core": config.core, "init": config.init_lora_weights}
    if isinstance(layer, Embedding):
        width = layer.out_features or 0
        return initial_embedding_coefficients(n_components, rank=rank, out_features=width, **settings)
    if isinstance(layer, ParamWrapper) and (n_experts := layer.num_experts) > 1:
        if config.core == "low_rank":
            return initial_coefficients(n_components, rank=rank * n_experts, **settings)
        each = [initial_coefficients(n_components, rank=rank, **settings)[1] for _ in range(n_experts)]
        return None, torch.stack(each, dim=-1).flatten(1)
    base: Any = layer.get_base_layer()
    if is_convolution(base) and (groups := base.groups) > 1:
        return _grouped(initial_coefficients(n_components, rank=rank, **settings), groups, config.core, module)
    return initial_coefficients(n_components, rank=rank, **settings)


def _grouped(whole: Start, groups: int, core: str, module: str) -> Start:
    coefficients_in, coefficients_out = whole
    if core == "diagonal":
        raise AdapterConfigError(
            f"core='diagonal' is not defined for {module!r}, a convolution with {groups} groups, whose matrix is no "
            "square; use core='low_rank' or 'mixer', or leave it out with exclude_modules."
        )
    n_channels = coefficients_out.shape[1]
    if n_channels % groups:
        raise AdapterConfigError(
            f"core={core!r} has {n_channels} inner channels for {module!r}, a convolution with {groups} groups, and needs "
            f"a multiple of {groups}; choose n_components (core='mixer') or r (core='low_rank') so."
        )
    return coefficients_in, coefficients_out[:, : n_channels // groups].clone()


def place(layer: LoraLayer, adapter_name: str, *, basis: Basis, coefficients: Start, core: str) -> None:
    """Put EigenLoRA's factors in the place of LoRA's own.

    Args:
        layer: LoRA layer.
        adapter_name: Adapter.
        basis: Its components there.
        coefficients: Of the input and the output side.
        core: Form of P.
    """
    inputs, outputs = factor_dicts(layer)
    replaced = inputs[adapter_name], outputs[adapter_name]
    pair: tuple[Any, nn.Module]
    inside, outside = coefficients
    if isinstance(layer, Embedding):
        pair = EmbeddingInputFactor(basis, coefficients=inside), EmbeddingOutputFactor(basis, coefficients=outside)
    elif isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        pair = _expert_pair(basis, coefficients, n_experts=layer.num_experts, core=core)
    elif is_convolution(layer.get_base_layer()):
        pair = (
            ConvolutionInputFactor(basis, coefficients=inside, replaced=replaced[0]),
            ConvolutionOutputFactor(basis, coefficients=outside, replaced=replaced[1]),
        )
    else:
        pair = InputFactor(basis, coefficients=inside), OutputFactor(basis, coefficients=outside)
    if inside is None:
        pair[0].follows = (pair[1],)
    for factors, factor in zip((inputs, outputs), pair, strict=True):
        replace_factor(factors, adapter_name, factor)


def _expert_pair(basis: Basis, coefficients: Start, *, n_experts: int, core: str) -> tuple[InputFactor, OutputFactor]:
    inside, outside = coefficients
    output = ExpertDiagonalFactor if core == "diagonal" else OutputFactor
    if inside is not None:
        return InputFactor(basis, coefficients=inside), output(basis, coefficients=outside)
    return RepeatedInputFactor(basis, n_experts=n_experts), output(basis, coefficients=outside)
