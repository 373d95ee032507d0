"""One frozen copy of each bank per model, and the ways to find a subspace that an adapter names."""

import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eigenpeft.errors import ArtifactError, SubspaceNotFoundError
from eigenpeft.subspace import ModuleSubspace, PrincipalSubspace

SEARCH_PATH = "EIGENPEFT_SUBSPACE_PATH"
_BASES = "lora_bases"
_live: WeakValueDictionary[str, PrincipalSubspace] = WeakValueDictionary()


class Basis(nn.Module):
    """The frozen components of one bank, shared by all adapters of a layer, and by the layers, that use them.

    Buffers, so that they move with the model and are never trained; not persistent, so that they are not saved with every
    adapter.

    Args:
        components_in: (K_in, in_features).
        components_out: (K_out, out_features).
    """

    components_in: Tensor
    components_out: Tensor

    def __init__(self, components_in: Tensor, components_out: Tensor):
        super().__init__()
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


def resolve(path_or_id: str | None, *, revision: str | None, sha256: str | None) -> PrincipalSubspace:
    """Find the subspace that an adapter refers to: in memory, at its path, on the search path, on the Hub.

    Args:
        path_or_id: Folder or Hub id; None when it was never saved.
        revision: Hub revision.
        sha256: Fingerprint that it must have; None takes any.

    Raises:
        SubspaceNotFoundError: If it is nowhere; the message lists the places searched.
        ArtifactError: If what is there is damaged or another subspace.
    """
    if (live := recall(sha256)) is not None:
        return live
    searched = ["subspaces in memory"]
    folders = [Path(folder) for folder in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if folder]
    candidates = [Path(path_or_id)] if path_or_id else []
    candidates += [folder / Path(path_or_id).name if path_or_id else folder for folder in folders]
    mismatch = None
    for candidate in candidates:
        searched.append(str(candidate.absolute()))
        if candidate.is_dir():
            try:
                subspace = PrincipalSubspace.from_pretrained(candidate, sha256=sha256)
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
            subspace = PrincipalSubspace.from_pretrained(path_or_id, revision=revision, sha256=sha256)
        except SubspaceNotFoundError as error:
            raise SubspaceNotFoundError(_not_found(path_or_id, sha256, searched)) from error
        remember(subspace)
        return subspace
    raise SubspaceNotFoundError(_not_found(path_or_id, sha256, searched))


def attach_basis(
    layer: LoraLayer, bases: ModuleSubspace, *, fingerprint: str, shared: dict[Any, Basis] | None = None
) -> Basis:
    """The layer's one copy of `bases`, made on the base weight's device when it is the first to be asked for.

    Args:
        layer: LoRA layer of the module.
        bases: The module's components, cut to the number wanted.
        fingerprint: Of the subspace they come from.
        shared: What the layers of one injection share, filled here; None for a bank that no other layer has.
    """
    bases_of_layer = _bases(layer)
    n_in, n_out = bases.n_components_in, bases.n_components_out
    key = f"{fingerprint[:24]}-{n_in}" + (f"-{n_out}" if n_out != n_in else "")
    if key not in bases_of_layer:
        device = next((p.device for p in layer.get_base_layer().parameters() if p.device.type != "meta"), None)
        shared = {} if shared is None else shared
        place = id(bases), device
        if place not in shared:
            shared[place] = Basis(bases.components_in.to(device), bases.components_out.to(device))
        bases_of_layer[key] = shared[place]
    return bases_of_layer[key]  # pyright: ignore[reportReturnType]


def attach_empty_basis(
    layer: LoraLayer, *, shape: tuple[int, int], n_components: tuple[int, int], fingerprint: str
) -> Basis:
    """A basis of zeros for embedded components, which the adapter's own file is about to fill.

    Args:
        layer: LoRA layer of the module.
        shape: (out_features, in_features) of the update.
        n_components: (K_in, K_out), as the adapter's config records it.
        fingerprint: Of the subspace the components were cut from.
    """
    outside, inside = (torch.zeros(count, width) for count, width in zip(reversed(n_components), shape, strict=True))
    empty = torch.zeros(0)
    return attach_basis(layer, ModuleSubspace(inside, outside, empty, empty, empty), fingerprint=fingerprint)


def drop_unused_bases(layer: LoraLayer) -> None:
    """Free the bases of a layer that no adapter of it uses any more.

    Args:
        layer: LoRA layer.
    """
    places: list[Any] = [layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B]
    used = {id(getattr(factor, "basis", None)) for factors in places for factor in factors.values()}
    bases = _bases(layer)
    for key in [key for key, basis in bases.items() if id(basis) not in used]:
        del bases[key]


def _bases(layer: LoraLayer) -> nn.ModuleDict:
    assert isinstance(layer, nn.Module)  # LoraLayer is the mixin of the modules that PEFT makes
    if not hasattr(layer, _BASES):
        layer.add_module(_BASES, nn.ModuleDict())
    return layer.get_submodule(_BASES)  # pyright: ignore[reportReturnType]


def _not_found(path_or_id: str | None, sha256: str | None, searched: list[str]) -> str:
    return (
        f"The subspace {path_or_id or '(never saved)'!r} that the adapter refers to (sha256 {sha256 or 'any'}) was not "
        f"found. Searched: {'; '.join(searched)}. Put a copy at that path, or name the folder that has it in {SEARCH_PATH}, or ask "
        'the adapter\'s author to save it with save_subspace="embed".'
    )
