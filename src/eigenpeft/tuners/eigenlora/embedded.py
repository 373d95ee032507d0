"""Components that an EigenLoRA adapter's own file brings: how they are counted, saved and read back."""

from collections.abc import Mapping

from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.eigenlora.bases import adapted_layers
from eigenpeft.tuners.layers.kinds import factor_dicts, weight_name
from eigenpeft.tuners.layers.shared_bases import drop_unused_bases, fill_bank

_EMBEDDED = {"lora_A": "components_in", "lora_B": "components_out"}


def embedded_counts(model: nn.Module, adapter_name: str) -> dict[str, int | list[int]]:
    """Number of components by adapted weight, as `EigenLoraConfig.embedded_n_components` records it.

    One number, or `[K_in, K_out]` where the sides have different ones.

    Args:
        model: Adapted model.
        adapter_name: Adapter.
    """
    counts: dict[str, int | list[int]] = {}
    for path, layer, frozen_bank in adapted_layers(model, adapter_name):
        n_in, n_out = len(frozen_bank.components_in), len(frozen_bank.components_out)
        counts[weight_name(path, layer)] = n_in if n_in == n_out else [n_in, n_out]
    return counts


def embedded_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The components that go into the adapter's own file, by key.

    Args:
        model: Adapted model.
        adapter_name: Adapter.
    """
    return {
        f"{path}.{factor}.components": getattr(frozen_bank, side)
        for path, _, frozen_bank in adapted_layers(model, adapter_name)
        for factor, side in _EMBEDDED.items()
    }


def fill_embedded(model: nn.Module, adapter_name: str, embedded: Mapping[str, Tensor]) -> None:
    """Give an adapter the components of its own file; those of other adapters stay what they are.

    Args:
        model: Adapted model.
        adapter_name: Adapter.
        embedded: As `embedded_tensors` gave them.

    Raises:
        AdapterConfigError: If components are missing, of another shape, or not finite.
    """
    layers = list(adapted_layers(model, adapter_name))
    saved = {path: _saved_components(path, embedded) for path, _, _ in layers}
    missing = [
        f"{path}.{factor}.components"
        for path, _, frozen_bank in layers
        for factor, side in _EMBEDDED.items()
        if side not in saved[path] and (not frozen_bank.is_filled or saved[path])
    ]
    if missing:
        raise AdapterConfigError(
            f"{len(missing)} tensors of embedded components are missing in the file of adapter {adapter_name!r}, such as "
            f"{missing[0]!r}: it was cut short, or a tool left them out. Get a fresh copy."
        )
    for path, _, frozen_bank in layers:
        for side, tensor in saved[path].items():
            held = getattr(frozen_bank, side)
            if tensor.shape != held.shape or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise AdapterConfigError(
                    f"The file of adapter {adapter_name!r} has {side} of shape {tuple(tensor.shape)} and dtype "
                    f"{tensor.dtype} for {path!r}, where {tuple(held.shape)} finite numbers are expected: it was altered. Get "
                    "a fresh copy."
                )
    for path, layer, frozen_bank in layers:
        if saved[path]:
            filled = fill_bank(layer, frozen_bank=frozen_bank, **saved[path])
            for factors in factor_dicts(layer):
                factors[adapter_name].use_bank(filled)
            drop_unused_bases(layer)


def _saved_components(path: str, embedded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {
        side: embedded.get(f"{path}.{factor}.components", embedded.get(f"base_model.model.{path}.{factor}.components"))
        for factor, side in _EMBEDDED.items()
    }
    return {side: tensor for side, tensor in found.items() if tensor is not None}
