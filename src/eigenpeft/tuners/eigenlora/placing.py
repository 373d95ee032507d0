"""The pair of EigenLoRA factors, with its starting coefficients, for each kind of LoRA layer."""

import logging
import math

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg import Factors
from eigenpeft.subspace.cores import CoreKind, Init, Parts
from eigenpeft.tuners.layers.blocks import n_blocks_of
from eigenpeft.tuners.layers.kinds import Sides, factor_dicts, kind_of, replace_factor
from eigenpeft.tuners.layers.mixture import MixtureWeights
from eigenpeft.tuners.layers.shared_bases import FrozenBank

logger = logging.getLogger(__name__)


def warn_of_idle_rank(rank: int, *, core: CoreKind, n_components: int) -> None:
    """Say so where the rank is larger than the components allow: a K × K core has rank K at most.

    Args:
        rank: r of an adapter.
        core: Its kind of core.
        n_components: Components that it uses of the module that has the most.
    """
    if core.is_factored and rank > n_components:
        logger.warning(
            "r=%d is above the %d components, and a core on them has rank %d at most: r=%d has the same updates with fewer "
            "numbers, and core='full' with %d per module.",
            *(rank, n_components, n_components, n_components, n_components**2),
        )


def start(
    layer: LoraLayer, adapter_name: str, *, frozen_bank: FrozenBank, core: CoreKind, init: Init, module: str
) -> dict[str, Tensor]:
    """The parts of the core that an adapter starts from on a layer.

    Args:
        layer: LoRA layer.
        adapter_name: Adapter.
        frozen_bank: Its components there.
        core: Its kind of core.
        init: PEFT's `init_lora_weights`.
        module: Name of the adapted weight, for messages.

    Raises:
        AdapterConfigError: If the core is not defined for a grouped convolution.
    """
    kind, rank = kind_of(layer), layer.r[adapter_name]
    n_in, n_out, n_blocks = len(frozen_bank.components_in), len(frozen_bank.components_out), kind.n_blocks(layer)
    if n_blocks == 1 or kind.rank_is_split:
        # Where the output side is not zero, the entries of B = V_outᵀ C_out get the variance 1 that LoRA's have.
        scale = math.sqrt((layer.out_features or 0) / n_out)
        whole = core.start(
            n_components_in=n_in, n_components_out=n_out, rank=rank, init=init, zero_side=kind.zero_side, scale=scale
        )
        n_parts = n_blocks_of(factor_dicts(layer)[0][adapter_name])
        if n_parts > 1:  # a row of A has 1 / N of the components' entries: the same norm as without blocks
            whole["coefficients_in"] = whole["coefficients_in"] * math.sqrt(n_parts)
        return whole if n_blocks == 1 else _grouped(whole, n_blocks, core, module)
    if core.is_factored:
        return core.start(n_components_in=n_in, n_components_out=n_out, rank=rank * n_blocks, init=init)
    each = [
        core.start(n_components_in=n_in, n_components_out=n_out, rank=rank, init=init)["coefficients_out"]
        for _ in range(n_blocks)
    ]
    return {"coefficients_out": torch.stack(each, dim=-1).flatten(1)}


def _grouped(whole: dict[str, Tensor], groups: int, core: CoreKind, module: str) -> dict[str, Tensor]:
    if not core.is_matrix:
        raise AdapterConfigError(
            f"core={core.name!r} is not defined for {module!r}, a convolution with {groups} groups, whose matrix is not "
            "square; use core='low_rank' or 'full', or leave it out with exclude_modules."
        )
    n_channels = whole["coefficients_out"].shape[1]
    if n_channels % groups:
        raise AdapterConfigError(
            f"core={core.name!r} has {n_channels} inner channels for {module!r}, a convolution with {groups} groups, and "
            f"needs a multiple of {groups}; choose n_components (core='full') or r (core='low_rank') so."
        )
    return whole | {"coefficients_out": whole["coefficients_out"][:, : n_channels // groups].clone()}


def place(
    layer: LoraLayer,
    adapter_name: str,
    *,
    frozen_bank: FrozenBank,
    parts: Parts,
    core: CoreKind,
    mixture: tuple[MixtureWeights, Tensor] | None = None,
    offset: Factors | None = None,
) -> None:
    """Put EigenLoRA's factors in the place of LoRA's own.

    Args:
        layer: LoRA layer.
        adapter_name: Adapter.
        frozen_bank: Its components there.
        parts: Parts of its core, of the shapes of `core.shapes`; a mixture has none.
        core: The kind of core.
        mixture: Weights of a mixture and its cores (T, K_out, K_in).
        offset: Frozen factors (out_features, q), (q, in_features) of what the core does not hold, divided by the scaling.
    """
    inputs, outputs = factor_dicts(layer)
    replaced = inputs[adapter_name], outputs[adapter_name]
    coefficients_in = parts.get("coefficients_in")
    sides = Sides(frozen_bank, coefficients_in, parts.get("coefficients_out"), core.is_matrix, mixture, offset)
    pair = kind_of(layer).pair(sides, layer, replaced)
    if coefficients_in is None:
        pair[0].follows = (pair[1],)
    for factors, factor in zip((inputs, outputs), pair, strict=True):
        replace_factor(factors, adapter_name, factor)
