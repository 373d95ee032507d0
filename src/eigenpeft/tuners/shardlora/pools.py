"""From the layers of one adapter to their factors on common pools."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eigenpeft.building.sharing import group_of
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.shards import shard_index
from eigenpeft.subspace.seeding import seeded_generator
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of, replace_factor
from eigenpeft.tuners.layers.shards import ShardFactor
from eigenpeft.tuners.shardlora.sharing import SHARINGS, Budget, Side

_PREFIX = "base_model.model."
Placed = tuple[str, LoraLayer]
"""Name of an adapted weight in the base model, and its layer."""


def check_layer(layer: LoraLayer, module: str) -> None:
    """Refuse a layer that is not linear.

    Args:
        layer: LoRA layer.
        module: Name of the adapted weight.

    Raises:
        AdapterConfigError: If it is an embedding, a convolution or a bare parameter.
    """
    kind = kind_of(layer)
    if kind.name != "linear":
        raise AdapterConfigError(
            f"ShardLoRA is for linear layers, and {module!r} is of the kind {kind.name!r}; leave it out with exclude_modules, or "
            "use LoraConfig for it."
        )


def share_factors(
    layers: Sequence[Placed],
    adapter_name: str,
    *,
    sharing: str,
    share: Any,
    pool_rank: int,
    private_rank: int,
    shards_per_vector: int,
    seed: int,
    init: bool | str,
) -> None:
    """Give the layers of an adapter factors on pools that those of one kind and shape share.

    Args:
        layers: All layers of the adapter, which have LoRA's own factors, in the order of the model.
        adapter_name: The adapter.
        sharing: Name in `SHARINGS`.
        share: Which layers share, as `ShardLoraConfig` has it.
        pool_rank: Size of the pools, in ranks of LoRA.
        private_rank: Vectors of each layer's own.
        shards_per_vector: Shards that make a vector.
        seed: Seed of the draw of shards.
        init: PEFT's `init_lora_weights`.

    Raises:
        AdapterConfigError: If a pool has fewer shards than a layer needs, or a width is not a multiple of `shards_per_vector`.
    """
    group = group_of(share)
    groups: dict[Any, list[Placed]] = {}
    for module, layer in layers:
        groups.setdefault((group(module), layer.in_features, layer.out_features), []).append((module, layer))
    for members in groups.values():
        budget = Budget(len(members), max(layer.r[adapter_name] for _, layer in members), pool_rank, private_rank)
        made = [
            _factors(
                members,
                side,
                adapter_name,
                budget=budget,
                length=shards_per_vector if side.is_cut else 1,
                seed=seed,
                init=init,
                is_output=bool(is_output),
            )
            for is_output, side in enumerate(SHARINGS[sharing])
        ]
        for (_, layer), factor_in, factor_out in zip(members, *made, strict=True):
            for factors, factor in zip(factor_dicts(layer), (factor_in, factor_out), strict=True):
                _put(factors, adapter_name, factor)
            if not factor_in.index.is_meta:
                layer._move_adapter_to_device_of_base_layer(adapter_name)


def _factors(
    members: Sequence[Placed],
    side: Side,
    adapter_name: str,
    *,
    budget: Budget,
    length: int,
    seed: int,
    init: bool | str,
    is_output: bool,
) -> list[ShardFactor]:
    """The factors of one side of all layers that share, in shards of 1 / `length` vector; the first layer owns the public ones."""
    ranks = [layer.r[adapter_name] for _, layer in members]
    first = members[0][1]
    width = int((first.out_features if is_output else first.in_features) or 0)
    if width % length:
        raise AdapterConfigError(
            f"shards_per_vector={length} does not divide the {width} {'outputs' if is_output else 'inputs'} of "
            f"{members[0][0]!r}; choose a divisor, or leave the layer out with exclude_modules."
        )
    n_public = side.n_public(budget) * length
    found: list[ShardFactor] = []
    for (module, layer), rank in zip(members, ranks, strict=True):
        n_private = min(side.n_private(budget), rank)
        if (rank - n_private) * length > n_public:
            raise AdapterConfigError(
                f"r={rank} is too much for {module!r}: {len(members)} layers share, and pool_rank={budget.pool_rank} with "
                f"private_rank={budget.private_rank} gives them {n_public // length} common vectors, of which a layer takes "
                f"r - private_rank. Choose r of at most {n_public // length + n_private}, a larger pool_rank, or let more layers "
                "share (share=)."
            )
        generator = seeded_generator(seed, module, "B" if is_output else "A") if side.is_drawn else None
        index = shard_index(rank, n_public=n_public, n_private=n_private, shards_per_vector=length, generator=generator)
        replaced = factor_dicts(layer)[is_output][adapter_name]
        shape, device = (length, width, rank), replaced.weight.device
        private = _start(n_private, shape, init, is_output=is_output, device=device) if n_private else None
        owns = n_public > 0 and not found
        public = _start(n_public // length, shape, init, is_output=is_output, device=device) if owns else None
        found.append(
            ShardFactor(
                index.to(device=device, dtype=torch.int32),
                private=private,
                public=public,
                owner=found[0] if found and n_public else None,
                is_output=is_output,
                bias=getattr(replaced, "bias", None),
            )
        )
    return found


def _start(
    n_vectors: int, shape: tuple[int, int, int], init: bool | str, *, is_output: bool, device: torch.device
) -> Tensor:
    """Vectors that start as LoRA's do, cut into shards, from torch's global generator as PEFT's own starts are."""
    length, width, rank = shape
    vectors = torch.empty(n_vectors, width, device=device)
    if is_output and init is not False:
        vectors.zero_()
    elif not is_output and init == "gaussian":
        nn.init.normal_(vectors, std=1 / rank)
    else:
        bound = 1 / math.sqrt(rank if is_output else width)
        vectors.uniform_(-bound, bound)
    return vectors.view(n_vectors * length, width // length)


def _put(factors: Any, adapter_name: str, factor: ShardFactor) -> None:
    """In the place of LoRA's own factor, trained if that is."""
    is_trained = factors[adapter_name].weight.requires_grad
    replace_factor(factors, adapter_name, factor)
    factor.requires_grad_(is_trained)


def shard_factors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ShardFactor]]:
    """(path as the adapter's file has it, factor) of every factor of an adapter that has shards.

    Args:
        model: Adapted model.
        adapter_name: The adapter.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for container, factors in zip(kind_of(layer).attributes, factor_dicts(layer), strict=True):
                factor = dict(factors.items()).get(adapter_name)
                if isinstance(factor, ShardFactor):
                    yield f"{path.removeprefix(_PREFIX)}.{container}", factor


def check_index(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter's file whose indices are not those of places in the pools.

    Args:
        model: Adapted model.
        adapter_name: The adapter.
        tensors: Tensors of the file, by key without the adapter's name.

    Raises:
        AdapterConfigError: If some are missing, of another shape or kind, or name shards that there are not.
    """
    found = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
    for path, factor in shard_factors(model, adapter_name):
        index, key = found.get(f"{path}.index"), f"{path}.index"
        if index is None:
            raise AdapterConfigError(
                f"The file of adapter {adapter_name!r} lacks {key!r}, which says of which shards a layer is made: it was altered "
                "or cut short. Get a fresh copy."
            )
        n_shards, shape = len(factor.pool), tuple(factor.index.shape)
        is_whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        if tuple(index.shape) != shape or not is_whole or int(index.min()) < 0 or int(index.max()) >= n_shards:
            raise AdapterConfigError(
                f"The file of adapter {adapter_name!r} has {key!r} of shape {tuple(index.shape)} and dtype {index.dtype}, where "
                f"{shape} whole numbers from 0 to {n_shards - 1} are expected: it was altered, or belongs to other layers. Get a "
                "fresh copy."
            )
