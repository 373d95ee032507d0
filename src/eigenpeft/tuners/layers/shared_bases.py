"""One frozen copy of each bank per model, and the ways to find a subspace that an adapter names."""

import itertools
import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eigenpeft.artifacts.reading import is_folder
from eigenpeft.errors import ArtifactError, SubspaceNotFoundError
from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace

SEARCH_PATH = "EIGENPEFT_SUBSPACE_PATH"
_BASES = "lora_bases"
_live: WeakValueDictionary[str, PrincipalSubspace] = WeakValueDictionary()


class FrozenBank(nn.Module):
    """The frozen components of one bank, shared by all adapters of a layer, and by the layers, that use them.

    Buffers, so that they move with the model and are never trained; not persistent, so that they are not saved with every
    adapter.

    Args:
        components_in: (K_in, in_features).
        components_out: (K_out, out_features).
        is_filled: Whether these are components, and not zeros that an adapter's file is about to fill.
    """

    components_in: Tensor
    components_out: Tensor

    def __init__(self, components_in: Tensor, components_out: Tensor, *, is_filled: bool = True):
        super().__init__()
        self.is_filled = is_filled
        self.register_buffer("components_in", components_in, persistent=False)
        self.register_buffer("components_out", components_out, persistent=False)


def remember(subspace: PrincipalSubspace) -> str:
    """Keep a subspace findable by its fingerprint while somebody holds it; returns the fingerprint.

    Args:
        subspace: Any subspace in memory.
    """
    _live[subspace.fingerprint] = subspace
    return subspace.fingerprint


def recall(fingerprint: str | None) -> PrincipalSubspace | None:
    """The live subspace of that fingerprint, or None.

    Args:
        fingerprint: As `remember` gave it.
    """
    return _live.get(fingerprint) if fingerprint is not None else None


def resolve(
    path_or_id: str | None, *, revision: str | None, fingerprint: str | None, adapter: Path | None = None
) -> PrincipalSubspace:
    """Find the subspace that an adapter refers to: in memory, at its path, beside the adapter, on the search path, on the Hub.

    Args:
        path_or_id: Folder or Hub id; None when it was never saved.
        revision: Hub revision.
        fingerprint: Fingerprint that it must have; None takes any.
        adapter: Folder that the adapter was read from. A subspace of that name and fingerprint is found in it and in the two
            folders around it, so that a relative path holds wherever the program is started.

    Raises:
        SubspaceNotFoundError: If it is nowhere; the message lists the places searched.
        ArtifactError: If what is there is damaged or another subspace.
        SubspaceError: If the tensors of the bases do not fit each other.
    """
    if (live := recall(fingerprint)) is not None:
        return live
    searched = ["subspaces in memory"]
    folders = [Path(folder) for folder in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if folder]
    candidates = [Path(path_or_id)] if path_or_id else []
    # Of what a file calls the subspace only the last part is looked for elsewhere, and only below the folders named here.
    name = Path(path_or_id).name if path_or_id else ""
    if not path_or_id:
        candidates += folders
    elif name not in ("", ".", ".."):
        if adapter is not None and fingerprint is not None:
            candidates += [folder / name for folder in (adapter, *adapter.absolute().parents[:2])]
        candidates += [folder / name for folder in folders]
    mismatch = None
    for candidate in candidates:
        searched.append(str(candidate.absolute()))
        if is_folder(candidate):
            try:
                subspace = PrincipalSubspace.from_pretrained(candidate, fingerprint=fingerprint)
            except ArtifactError as error:
                mismatch = error
                continue
            remember(subspace)
            return subspace
    if mismatch is not None:
        raise mismatch
    if path_or_id and not Path(path_or_id).is_absolute():
        searched.append(f"the Hub, {path_or_id} at revision {revision or 'main'}")
        try:
            subspace = PrincipalSubspace.from_pretrained(path_or_id, revision=revision, fingerprint=fingerprint)
        except SubspaceNotFoundError as error:
            raise SubspaceNotFoundError(_not_found(path_or_id, fingerprint, searched)) from error
        remember(subspace)
        return subspace
    raise SubspaceNotFoundError(_not_found(path_or_id, fingerprint, searched))


def attach_bank(
    layer: LoraLayer, bank: ModuleSubspace, *, fingerprint: str, shared: dict[Any, FrozenBank] | None = None
) -> FrozenBank:
    """The layer's one copy of `bank`, made on the base weight's device when it is the first to be asked for.

    A copy is shared only where it holds these very components, number by number: the fingerprint that a file states is no
    reason to give an adapter the components of another.

    Args:
        layer: LoRA layer of the module.
        bank: The module's components, cut to the number wanted.
        fingerprint: Fingerprint of the subspace they come from.
        shared: What the layers of one injection share, filled here; None for a bank that no other layer has.
    """
    for frozen_bank in _bases(layer).values():
        if frozen_bank.is_filled and _holds(frozen_bank, bank.components_in, bank.components_out):  # pyright: ignore[reportArgumentType]
            return frozen_bank  # pyright: ignore[reportReturnType]
    device = next((p.device for p in layer.get_base_layer().parameters() if p.device.type != "meta"), None)
    shared = {} if shared is None else shared
    place = id(bank), device
    if place not in shared:
        shared[place] = FrozenBank(bank.components_in.to(device), bank.components_out.to(device))
    return _add(layer, shared[place], fingerprint=fingerprint)


def attach_empty_bank(
    layer: LoraLayer, *, shape: tuple[int, int], n_components: tuple[int, int], fingerprint: str
) -> FrozenBank:
    """A bank of zeros for embedded components, which the adapter's own file is about to fill; no other adapter gets it.

    Args:
        layer: LoRA layer of the module.
        shape: (out_features, in_features) of the update.
        n_components: (K_in, K_out), as the adapter's config records it.
        fingerprint: Fingerprint of the subspace the components were cut from.
    """
    device = next((p.device for p in layer.get_base_layer().parameters() if p.device.type != "meta"), None)
    components_in, components_out = (
        torch.zeros(count, width, device=device) for count, width in zip(n_components, reversed(shape), strict=True)
    )
    return _add(layer, FrozenBank(components_in, components_out, is_filled=False), fingerprint=fingerprint)


def fill_bank(
    layer: LoraLayer, *, frozen_bank: FrozenBank, components_in: Tensor, components_out: Tensor
) -> FrozenBank:
    """Load the components of an adapter's file into a bank of the layer.

    A bank of the layer that already holds equal components is shared. Otherwise the adapter's bank is filled if it is still
    empty, and a new one is added if it holds other components.

    Args:
        layer: LoRA layer of the module.
        frozen_bank: What the adapter has now.
        components_in: (K_in, in_features), from its file.
        components_out: (K_out, out_features), from its file.

    Returns:
        The bank that the adapter must use from now on. No other adapter's components change.
    """
    for other in _bases(layer).values():
        if other.is_filled and _holds(other, components_in, components_out):  # pyright: ignore[reportArgumentType]
            return other  # pyright: ignore[reportReturnType]
    components_in, components_out = (
        saved.to(device=held.device, dtype=held.dtype, copy=True)
        for saved, held in ((components_in, frozen_bank.components_in), (components_out, frozen_bank.components_out))
    )
    if frozen_bank.is_filled:
        return _add(layer, FrozenBank(components_in, components_out), fingerprint="embedded")
    frozen_bank.components_in, frozen_bank.components_out, frozen_bank.is_filled = components_in, components_out, True
    return frozen_bank


def _holds(frozen_bank: FrozenBank, components_in: Tensor, components_out: Tensor) -> bool:
    pairs = ((frozen_bank.components_in, components_in), (frozen_bank.components_out, components_out))
    return all(
        held.shape == wanted.shape and torch.equal(held, wanted.to(device=held.device, dtype=held.dtype))
        for held, wanted in pairs
    )


def _add(layer: LoraLayer, frozen_bank: FrozenBank, *, fingerprint: str) -> FrozenBank:
    bases = _bases(layer)
    n_in, n_out = len(frozen_bank.components_in), len(frozen_bank.components_out)
    stem = f"{fingerprint[:24]}-{n_in}" + (f"-{n_out}" if n_out != n_in else "")
    keys = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    bases[next(key for key in keys if key not in bases)] = frozen_bank
    return frozen_bank


def drop_unused_bases(layer: LoraLayer) -> None:
    """Free the bases of a layer that no adapter of it uses any more.

    Args:
        layer: LoRA layer.
    """
    places: list[Any] = [layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B]
    used = {id(getattr(factor, "frozen_bank", None)) for factors in places for factor in factors.values()}
    bases = _bases(layer)
    for key in [key for key, frozen_bank in bases.items() if id(frozen_bank) not in used]:
        del bases[key]


def _bases(layer: LoraLayer) -> nn.ModuleDict:
    assert isinstance(layer, nn.Module)  # LoraLayer is the mixin of the modules that PEFT makes
    if not hasattr(layer, _BASES):
        layer.add_module(_BASES, nn.ModuleDict())
    return layer.get_submodule(_BASES)  # pyright: ignore[reportReturnType]


def _not_found(path_or_id: str | None, fingerprint: str | None, searched: list[str]) -> str:
    return (
        f"The subspace {path_or_id or '(never saved)'!r} that the adapter refers to (fingerprint {fingerprint or 'any'}) was not "
        f"found. Searched: {'; '.join(searched)}. Put a copy at that path, or name the folder that has it in {SEARCH_PATH}, or ask "
        'the adapter\'s author to save it with save_subspace="embed".'
    )
