"""Gated composition as a PEFT tuner: frozen components in the place of A, gated cores in the place of B."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eigenpeft.collection.formats.keys import without_wrappers
from eigenpeft.collection.opening import some
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.gated import arrow_prototypes
from eigenpeft.subspace import AdapterStore, PrincipalSubspace
from eigenpeft.subspace.matching import match_modules
from eigenpeft.tuners.gated.config import GatedLoraConfig
from eigenpeft.tuners.host.factor_model import FactorModel
from eigenpeft.tuners.host.target_names import excluding, strays
from eigenpeft.tuners.layers.gated import ComponentsFactor, GatedFactor
from eigenpeft.tuners.layers.kinds import factor_dicts, kind_of, replace_factor, weight_shape

_GATE_START = 0.02  # standard deviation, so that cores weigh alike at first
_PREFIX = "base_model.model."


class GateSources(NamedTuple):
    """What every layer of one adapter starts from.

    Attributes:
        subspace: The bases; None where the adapter's own file brings them.
        store: The store whose members are composed; None for cores that start at zero.
        names: Its members.
        modules: Modules of the model to those of the subspace.
        sizes: (E, K_out, K_in) by module of the model, filled as layers are made.
    """

    subspace: PrincipalSubspace | None
    store: AdapterStore | None
    names: tuple[str, ...]
    modules: dict[str, str]
    sizes: dict[str, list[int]]


def find_sources(config: GatedLoraConfig) -> AdapterStore | PrincipalSubspace | None:
    """Open the store or the subspace that a configuration names; nothing is written to it.

    Args:
        config: Configuration of the adapter.

    Returns:
        None for an adapter of a file, which has its own bases.

    Raises:
        ArtifactError: If it is damaged.
        SubspaceNotFoundError: If it is nowhere.
        SubspaceError: If the tensors of its bases do not fit each other.
    """
    if config.given is not None:
        return config.given
    if config.sources is not None:
        return AdapterStore.from_pretrained(config.sources)
    return None if config.subspace is None else PrincipalSubspace.from_pretrained(config.subspace)


class GatedLoraModel(FactorModel):
    """Tuner behind `GatedLoraConfig`, which is experimental; made by `get_peft_model`."""

    @classmethod
    @contextmanager
    def injecting(cls, model: nn.Module, *, config: GatedLoraConfig, adapter_name: str) -> Iterator[GateSources]:
        """Open the sources once, and choose the subspace's modules when no targets are named.

        Args:
            model: Model to adapt.
            config: Configuration of the adapter; into it go the targets and the sizes.
            adapter_name: The adapter.

        Yields:
            What `swap` needs for every layer.

        Raises:
            AdapterConfigError: If the store has no such members, the model none of the modules, or the bases are of paired
                directions.
            SubspaceError, ArtifactError: If the store or the subspace is nowhere, or is damaged.
        """
        opened = find_sources(config)
        if opened is None:
            yield GateSources(None, None, (), {}, {})
            return
        store = opened if isinstance(opened, AdapterStore) else None
        subspace = opened.subspace if isinstance(opened, AdapterStore) else opened
        names = tuple(config.source_names or (store.names if store is not None else ()))
        unknown = [name for name in names if store is None or name not in store]
        if unknown or (store is not None and not names):
            raise AdapterConfigError(
                f"source_names={list(names)}: the store has {some(store.names) if store else 'no members'}, and not "
                f"{some(unknown) or 'one to compose'}."
            )
        if any(bank.paired for bank in subspace.banks.values()):
            raise AdapterConfigError(
                "The bases are paired directions, which belong together two by two, and gated cores join all of them. Use a "
                "subspace of another method."
            )
        shapes = {name: (bank.out_features, bank.in_features) for name, bank in subspace.items()}
        matches = match_modules(model, shapes, shapes=shapes)
        if config.target_modules is None:
            wanted = {without_wrappers(name) for name in matches.found}
            if not wanted:
                raise AdapterConfigError(
                    f"None of the subspace's modules, such as {subspace.modules[0]!r}, is in the model. Use a model of the base "
                    "that the subspace was built for."
                )
            config.target_modules = wanted  # pyright: ignore[reportAttributeAccessIssue]
            config.exclude_modules = excluding(config.exclude_modules, strays(model, wanted))
        if subspace.info.fan_in_fan_out:
            config.fan_in_fan_out = True
        given = GateSources(subspace, store, names, dict(matches.found), {})
        yield given
        config.core_sizes = given.sizes
        if names:
            config.n_cores = len(names)

    @staticmethod
    def swap(layer: LoraLayer, *, config: GatedLoraConfig, adapter_name: str, module: str, given: GateSources) -> None:
        """`FactorModel.swap`: components and gated cores in the place of LoRA's factors.

        Raises:
            AdapterConfigError: If the layer is not linear, there are no bases for it, or a file's sizes do not fit it.
            ArtifactError: If a member of the store cannot be read.
        """
        kind = kind_of(layer)
        if kind.name != "linear":
            raise AdapterConfigError(
                f"GatedLoRA is for linear layers, and {module!r} is of the kind {kind.name!r}; leave it out with exclude_modules."
            )
        if given.subspace is None:
            components_in, components_out, cores = _empty(
                config.core_sizes, config.n_cores, module, weight_shape(layer)
            )
        else:
            components_in, components_out, cores = _start(config.n_cores, module, weight_shape(layer), given)
        given.sizes[module] = list(cores.shape)
        is_arrow = config.gate == "arrow"
        gate = arrow_prototypes(cores) if is_arrow else _GATE_START * torch.randn(len(cores), len(components_in))
        inputs, outputs = factor_dicts(layer)
        replace_factor(inputs, adapter_name, ComponentsFactor(components_in))
        gated = GatedFactor(
            components_out,
            gate=gate,
            cores=cores,
            train_cores=config.train_cores,
            balance=float(config.balance),
            top_k=config.top_k if is_arrow else None,
        )
        replace_factor(outputs, adapter_name, gated)

    @classmethod
    def has_matrices(cls, config: Any) -> bool:
        """`FactorModel.has_matrices`: they have two axes or three.

        Args:
            config: Configuration of the adapter.
        """
        return True

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        _check_file(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of gated adapters is none.

        Args:
            adapters: Names of the adapters to combine.
            *args: PEFT's own.
            **kwargs: PEFT's own.

        Raises:
            AdapterConfigError: Always.
        """
        raise AdapterConfigError(
            f"{', '.join(map(repr, adapters))}: gated adapters (GATEDLORA) weigh their cores anew for every token and cannot be "
            "combined. Activate several at once with set_adapter([...]), whose updates add up."
        )


def _start(n_cores: int, module: str, shape: tuple[int, int], given: GateSources) -> tuple[Tensor, Tensor, Tensor]:
    """V_in, V_out and the cores of one module: of the members, zeros where one does not adapt it, or zeros."""
    assert given.subspace is not None
    name = given.modules.get(module) or given.subspace.find(module)
    bank = None if name is None else given.subspace[name]
    if name is None or bank is None or (bank.out_features, bank.in_features) != shape:
        raise AdapterConfigError(
            f"{module!r} is targeted, and the subspace has no bases of its shape {shape[0]} x {shape[1]} for it. Leave "
            "target_modules out to adapt exactly the subspace's modules."
        )
    components_in, components_out = bank.components_in.clone(), bank.components_out.clone()
    cores = torch.zeros(len(given.names) or n_cores, len(components_out), len(components_in))
    for row, member in zip(cores, given.names, strict=False):
        core = given.store[member].cores.get(name) if given.store is not None else None
        if core is not None:
            row.copy_(core.dense())
    return components_in, components_out, cores


def _check_file(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file that lacks a tensor: zeros would stay in its place, and the adapter would do nothing without a word."""
    found = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
    for path, layer in model.named_modules():
        for container in ("lora_A", "lora_B") if isinstance(layer, LoraLayer) else ():
            factor = dict(getattr(layer, container).items()).get(adapter_name)
            held = factor.state_dict() if isinstance(factor, ComponentsFactor | GatedFactor) else {}
            for name, tensor in held.items():
                key = f"{path.removeprefix(_PREFIX)}.{container}.{name}"
                value = found.get(key)
                if value is None or value.shape != tensor.shape or not value.is_floating_point():
                    what = "nothing" if value is None else f"a {value.dtype} of shape {tuple(value.shape)}"
                    raise AdapterConfigError(
                        f"The file of adapter {adapter_name!r} has {what} for {key!r}, where {tuple(tensor.shape)} numbers are "
                        "expected: it was altered or cut short. Get a fresh copy."
                    )


def _empty(
    core_sizes: Mapping[str, Any] | None, n_cores: int, module: str, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros of the sizes that an adapter's file says, which it is about to fill."""
    sizes: Any = (core_sizes or {}).get(module)
    fits = isinstance(sizes, list) and len(sizes) == 3 and all(type(size) is int and size >= 1 for size in sizes)
    if not fits or sizes[0] != n_cores or sizes[1] > shape[0] or sizes[2] > shape[1]:
        raise AdapterConfigError(
            f"core_sizes[{module!r}]={str(sizes)[:80]} must be {n_cores} cores of at most {shape[0]} x {shape[1]} "
            "components: the config was altered, or the adapter is of another model. Get a fresh copy."
        )
    _, n_out, n_in = sizes
    return torch.zeros(n_in, shape[1]), torch.zeros(n_out, shape[0]), torch.zeros(n_cores, n_out, n_in)
