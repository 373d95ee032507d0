"""Which subspace, modules and bases an EigenLoRA adapter uses, and how embedded components are saved and read back."""

from collections.abc import Iterator, Mapping

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.subspace import PrincipalSubspace
from eigenpeft.tuners.eigenlora.config import EigenLoraConfig
from eigenpeft.tuners.layers.kinds import factor_dicts, weight_name, weight_shape
from eigenpeft.tuners.layers.linear import InputFactor
from eigenpeft.tuners.layers.shared_bases import Basis, attach_basis, attach_empty_basis, recall, resolve

_EMBEDDED = {"lora_A": "components_in", "lora_B": "components_out"}


def subspace_of(config: EigenLoraConfig) -> PrincipalSubspace | None:
    """The subspace, or None when the adapter's own file brings the components.

    Args:
        config: Of the adapter; nothing is written into it.

    Raises:
        AdapterConfigError: If no subspace is named at all.
        SubspaceNotFoundError: If it is nowhere.
    """
    subspace = recall(config.subspace_sha256)
    if subspace is None and config.embedded_n_components is not None:
        return None
    if subspace is None:
        if config.subspace is None and config.subspace_sha256 is None:
            raise AdapterConfigError(
                "EigenLoRA needs a subspace: pass EigenLoraConfig(subspace=...) a path, a Hub id, or the "
                "PrincipalSubspace that SubspaceBuilder made."
            )
        place = config.subspace if isinstance(config.subspace, str) else None
        subspace = resolve(place, revision=config.subspace_revision, sha256=config.subspace_sha256)
    return subspace


def matching_modules(model: nn.Module, subspace: PrincipalSubspace | None, config: EigenLoraConfig) -> set[str]:
    """The modules of a model that the subspace, or the adapter's own file, has bases for.

    Args:
        model: Model to adapt, with or without other adapters.
        subspace: The subspace, or None for embedded components.
        config: Of the adapter.

    Raises:
        AdapterConfigError: If there is none.
    """
    names = tuple(subspace.modules) if subspace is not None else tuple(config.embedded_n_components or ())
    wanted = set()
    for name, _ in model.named_modules():
        plain = name.removesuffix(".base_layer")
        found = subspace.find(plain) if subspace is not None else next((n for n in names if n == plain), None)
        if plain and found is not None:
            wanted.add(plain)
    if not wanted:
        raise AdapterConfigError(
            f"None of the subspace's {len(names)} modules, such as {names[0]!r}, is in the model "
            f"({type(model).__name__}). Use a model of the base that the subspace was built for."
        )
    return wanted


def basis_for(
    layer: LoraLayer, subspace: PrincipalSubspace | None, config: EigenLoraConfig, module: str
) -> tuple[str, Basis]:
    """The subspace's name of a module, and the layer's shared copy of its bases.

    Args:
        layer: LoRA layer of the module.
        subspace: The subspace, or None for embedded components.
        config: Of the adapter.
        module: Name of the adapted weight in the model.

    Raises:
        AdapterConfigError: If the subspace has no bases for it, or bases of another shape.
    """
    fingerprint, shape = config.subspace_sha256 or "", weight_shape(layer)
    if subspace is None:
        count = (config.embedded_n_components or {}).get(module)
        if count is None:
            raise AdapterConfigError(
                f"The adapter embeds no components for {module!r}; it has them for "
                f"{sorted(config.embedded_n_components or ())[:3]}."
            )
        return module, attach_empty_basis(layer, shape=shape, n_components=count, fingerprint=fingerprint)
    name = subspace.find(module)
    if name is None:
        raise AdapterConfigError(
            f"{module!r} is targeted but not in the subspace of {len(subspace)} modules, such as {subspace.modules[0]!r}. "
            "Leave target_modules out to adapt exactly the subspace's modules."
        )
    bases = subspace[name]
    if (bases.out_features, bases.in_features) != shape:
        raise AdapterConfigError(
            f"{module!r} is {shape[0]} x {shape[1]} in the model and {bases.out_features} x "
            f"{bases.in_features} in the subspace: it was built for another base model."
        )
    if config.n_components is not None:
        bases = bases.truncate(config.n_components)
    return name, attach_basis(layer, bases, fingerprint=fingerprint)


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer, Basis]]:
    """(path, layer, basis) of every layer that has EigenLoRA factors of an adapter.

    Args:
        model: Adapted model, of PEFT's class or the base's own.
        adapter_name: Adapter.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            factor = dict(factor_dicts(layer)[0].items()).get(adapter_name)
            if isinstance(factor, InputFactor):
                yield path, layer, factor.basis


def embedded_counts(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Number of components by adapted weight, as `EigenLoraConfig.embedded_n_components` records it.

    Args:
        model: Adapted model.
        adapter_name: Adapter.
    """
    layers = adapted_layers(model, adapter_name)
    return {weight_name(path, layer): len(basis.components_in) for path, layer, basis in layers}


def embedded_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The components that go into the adapter's own file, by key.

    Args:
        model: Adapted model.
        adapter_name: Adapter.
    """
    return {
        f"{path}.{factor}.components": getattr(basis, side)
        for path, _, basis in adapted_layers(model, adapter_name)
        for factor, side in _EMBEDDED.items()
    }


def fill_embedded(model: nn.Module, adapter_name: str, embedded: Mapping[str, Tensor]) -> None:
    """Put saved components where `attach_empty_basis` left zeros.

    Args:
        model: Adapted model.
        adapter_name: Adapter.
        embedded: As `embedded_tensors` gave them.
    """
    for path, _, basis in adapted_layers(model, adapter_name):
        for factor, side in _EMBEDDED.items():
            key = f"{path}.{factor}.components"
            saved = embedded.get(key, embedded.get(f"base_model.model.{key}"))
            if saved is not None:
                held = getattr(basis, side)
                setattr(basis, side, saved.to(device=held.device, dtype=held.dtype))
