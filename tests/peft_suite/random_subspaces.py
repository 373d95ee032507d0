"""A subspace of random orthonormal bases for any model, since PEFT's tests know of none."""

import zlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from eigenpeft import PrincipalSubspace
from eigenpeft.subspace import ModuleSubspace, SubspaceInfo

N_COMPONENTS = 16


def random_subspace(model: nn.Module, *, parameters: bool) -> PrincipalSubspace:
    """Bases of every weight that LoRA can adapt; the same for the same architecture, whatever adapters it carries.

    Args:
        model: Any model.
        parameters: Cover bare parameters (`target_parameters`) too.
    """
    modules, transposed = {}, []
    for name, in_features, out_features, groups in _weights(model, parameters=parameters):
        n_components = min(N_COMPONENTS, in_features, out_features) // groups * groups
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        sides = [torch.randn(width, n_components, generator=generator) for width in (in_features, out_features)]
        spectrum = torch.linspace(2, 1, n_components)
        bases = (torch.linalg.qr(side)[0].mT.contiguous() for side in sides)
        modules[name] = ModuleSubspace(
            *bases,
            singular_values_in=spectrum,
            singular_values_out=spectrum,
            explained_variance_ratio=spectrum / spectrum.sum(),
        )
    info = SubspaceInfo(base_model_name_or_path="tiny", fan_in_fan_out=tuple(transposed))
    return PrincipalSubspace(modules, info=info)


def _weights(model: nn.Module, *, parameters: bool) -> Iterator[tuple[str, int, int, int]]:
    """(name, in_features, out_features, groups) of every weight."""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or ".lora_" in f".{path}":
            continue
        name = path.replace(".base_layer", "")
        if isinstance(module, nn.Linear):
            yield name, module.in_features, module.out_features, 1
        elif isinstance(module, Conv1D):
            yield name, *module.weight.shape, 1
        elif isinstance(module, nn.Embedding):
            yield name, module.num_embeddings, module.embedding_dim, 1
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            window = module.weight[0, 0].numel()
            yield name, module.in_channels * window, module.out_channels, module.groups
        elif isinstance(module, nn.MultiheadAttention):
            yield name, module.embed_dim, 3 * module.embed_dim, 1
        if parameters:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 2:
                    yield f"{name}.{own}", parameter.shape[1], parameter.shape[0], 1
                elif parameter.ndim == 3:
                    in_features, out_features = parameter.shape[1:]
                    if not getattr(module, "is_transposed", False):
                        in_features, out_features = out_features, in_features
                    yield f"{name}.{own}", in_features, out_features, 1
