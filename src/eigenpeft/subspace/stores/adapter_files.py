"""Adapters on disk or on the Hub as members of a store: EigenLoRA as it was trained, LoRA by projection."""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenpeft.artifacts.reading import read_json
from eigenpeft.collection.adapter import SourceAdapter
from eigenpeft.collection.formats.keys import canonical_module, natural_order
from eigenpeft.collection.formats.labels import label_names, labels_of
from eigenpeft.collection.formats.settings import CONFIG_NAME, LoraSettings, license_of, settings_of
from eigenpeft.collection.formats.weights import WeightsFile, file_sha256, open_weights
from eigenpeft.collection.opening import open_adapter, some
from eigenpeft.collection.reader import AdapterCollection
from eigenpeft.collection.sources import AdapterLocation, locate
from eigenpeft.errors import CollectionError, SubspaceError
from eigenpeft.linalg.factored import frobenius_norm, projection_residual
from eigenpeft.subspace.core import Core
from eigenpeft.subspace.cores import core_kind
from eigenpeft.subspace.module import ModuleSubspace
from eigenpeft.subspace.principal import PrincipalSubspace
from eigenpeft.subspace.projecting import paired_core
from eigenpeft.subspace.stores.member import AdapterMember, check_core

BASE_START = "eigenpeft_start"
"""Attribute of a base model in whose weights a merge is (`eigenpeft.combining.merged_start`)."""
_SIDES = {"A": "in", "B": "out"}
_PART = re.compile(
    r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.[^.]+)?\.(?P<what>coefficients|components|weights|cores)"
)
_DROPPED = re.compile(r"\.lora_velora_")  # what VeLoRA needs for its backward pass, and nothing else
_FACTOR_BIAS = re.compile(r"\.lora_B(?:\.[^.]+)?\.bias$")
# What an EigenLoRA configuration can have that is more than `s V_outᵀ M V_in` on one matrix.
_NOT_KEPT = {
    "use_dora": "DoRA also rescales the merged weight",
    "target_parameters": "it adapts stacked parameters (experts), each with many updates instead of one",
    "kasa_config": "KaSA cuts the base model's own weights, and puts a diagonal between the coefficients",
    "use_bdlora": "BD-LoRA keeps only the blocks of a factor, which leaves the subspace",
    "ensure_weight_tying": "the update of one weight is tied to another's",
}


def read_adapter(
    source: str | Path,
    subspace: PrincipalSubspace,
    *,
    allow_different_base_models: bool = False,
    in_part: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[str, AdapterMember]:
    """Read the adapter that a folder or Hub id means, as name and member.

    Args:
        source: Folder or Hub id of one adapter of peft_type EIGENLORA or LORA.
        subspace: Bases of the store.
        allow_different_base_models: Take a LoRA adapter whose config names another base model than the subspace's.
        in_part: Leave out modules of a LoRA adapter that the subspace lacks; the member's record has them as `left_out`.
        token: Token for the Hub.
        cache_dir: Download cache.
        local_files_only: Use downloaded files only.

    Raises:
        CollectionError: If the adapter cannot be read.
        SubspaceError: If there are several, or it does not fit the bases, or has something that a store does not keep.
    """
    locations, problems = locate(source, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if problems:
        raise CollectionError(problems)
    if len(locations) != 1:
        raise SubspaceError(
            f"{str(source)!r} holds {len(locations)} adapters, {some(each.name for each in locations)}; add them one by one, "
            "or use AdapterStore.from_collection."
        )
    (location,) = locations
    return location.name, _read(
        location, subspace, allow_different_base_models=allow_different_base_models, in_part=in_part
    )


def read_model(model: Any, subspace: PrincipalSubspace, *, adapter_name: str) -> AdapterMember:
    """One adapter of a PEFT model, by what the model saves of it.

    Args:
        model: A `PeftModel`.
        subspace: Bases of the store.
        adapter_name: Which of its adapters.

    Raises:
        SubspaceError: If the model has no such adapter, or it does not fit the bases.
        CollectionError: If it is of a kind that cannot be read.
    """
    if adapter_name not in model.peft_config:
        raise SubspaceError(
            f"adapter_name={adapter_name!r} is not in the model; it has {some(model.peft_config, limit=10) or 'none'}."
        )
    if getattr(model.get_base_model(), BASE_START, None) is not None:
        raise SubspaceError(
            f"The adapter {adapter_name!r} was trained on top of a merged start, which is in the base model's weights and not in "
            "the adapter. Write both as one LoRA with eigenpeft.export_lora, and add that folder."
        )
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, selected_adapters=[adapter_name])
        folder = Path(scratch) if adapter_name == "default" else Path(scratch) / adapter_name
        location = AdapterLocation(adapter_name, adapter_name, folder)
        member = _read(location, subspace, allow_different_base_models=False)
    record = {**member.record, "source": "a model in memory"}
    if labels := label_names(getattr(model.get_base_model(), "config", None)):
        record["labels"] = labels
    return replace(member, record=record)


def projected(
    collection: AdapterCollection, name: str, subspace: PrincipalSubspace, *, in_part: bool = False
) -> AdapterMember:
    """One LoRA adapter of a collection, projected on the bases; what is lost is measured, and the rest is kept exactly.

    Args:
        collection: Opened adapters.
        name: Which of them.
        subspace: The bases.
        in_part: As for `read_adapter`.

    Raises:
        SubspaceError: If it adapts a module that is not in the subspace, or has trained biases of its factors.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    only = collection.subset([name])
    found = {module: subspace.find(module) for module in only.modules}
    unknown = [module for module, own in found.items() if own is None]
    if unknown and (not in_part or len(unknown) == len(found)):
        raise SubspaceError(
            f"{len(unknown)} of the {len(found)} adapted modules are not in the subspace, such as {unknown[0]!r}, in the "
            f"adapter {name!r}. Build the subspace from a collection that adapts them, or leave out the adapters that do."
        )
    found = {module: own for module, own in found.items() if own is not None}
    _refuse_double(name, found)
    kept = {key: tensor for key, tensor in only.read_kept_aside(name).items() if not _DROPPED.search(key)}
    biases = [key for key in kept if _FACTOR_BIAS.search(key)]
    if biases:
        raise SubspaceError(
            f"The adapter {name!r} has trained biases of its factors (lora_bias), {some(biases)}, which a store does not "
            "keep; train it without them, or leave it out."
        )
    original = {new: old for old, new in only.aligned(name).items()}
    cores, errors, paths = {}, {}, {}
    for module, own in sorted(found.items(), key=lambda pair: natural_order(pair[1])):
        pair = only.factors(module)[0]
        cores[own] = subspace.project({own: (pair.lora_B, pair.lora_A)})[own]
        errors[own] = relative_error(pair.lora_B, pair.lora_A, subspace[own])
        paths[own] = original.get(module, module)
    weights = Path(only[name].weights_path)
    record = {
        **only[name].record(),
        "file_bytes": weights.stat().st_size,
        "config": _short_config(_config_of(weights.parent)),
    }
    if unknown:
        record["left_out"] = unknown
    if labels := labels_of(weights.parent):
        record["labels"] = labels
    return AdapterMember(cores, record=record, kept_aside=kept, relative_errors=errors, paths=paths)


def relative_error(lora_B: Tensor, lora_A: Tensor, bank: ModuleSubspace) -> float:
    """‖ΔW - its projection‖ / ‖ΔW‖ in the Frobenius norm; 0 for ΔW = 0.

    Args:
        lora_B: (out_features, r), scaling included.
        lora_A: (r, in_features).
        bank: Bank of the module; on paired directions the projection is the nearest diagonal core.
    """
    norm = float(frobenius_norm(lora_B, lora_A))
    if norm == 0.0:
        return 0.0  # nothing to represent: an untrained adapter is reproduced exactly
    if bank.paired:
        return paired_core(lora_B, lora_A, bank=bank)[1] / norm
    residual = projection_residual(lora_B, lora_A, components_out=bank.components_out, components_in=bank.components_in)
    return float(residual) / norm


def _read(
    location: AdapterLocation, subspace: PrincipalSubspace, *, allow_different_base_models: bool, in_part: bool = False
) -> AdapterMember:
    if _config_of(location.folder).get("peft_type") == "EIGENLORA":
        return _trained(location, subspace)
    opened, problems = open_adapter(location, embeddings=bool(subspace.info.embeddings))
    if opened is None:
        raise CollectionError(problems)
    with AdapterCollection([opened]) as collection:
        if not allow_different_base_models:
            check_base(collection[location.name], subspace)
        return projected(collection, location.name, subspace, in_part=in_part)


def _trained(location: AdapterLocation, subspace: PrincipalSubspace) -> AdapterMember:
    """An EigenLoRA adapter bit for bit: its parts, its scaling, and everything else that its file holds."""
    config = _config_of(location.folder)
    label = f"The adapter {location.name!r}"
    _check_trained_config(label, config, subspace)
    try:
        weights = open_weights(location.folder)
    except ValueError as error:
        raise CollectionError([f"Adapter {location.name!r} {error}."]) from error
    settings, kind = _settings(label, config), core_kind(str(config.get("core", "low_rank")), from_file=True)
    parts: dict[str, dict[str, Tensor]] = {}
    components: dict[str, dict[str, Tensor]] = {}
    kept = {}
    for key in sorted(weights.shapes, key=natural_order):
        tensor = _tensor(weights, key, location.name)
        match = _PART.fullmatch(key)
        if match is None:
            kept[key] = tensor
            continue
        path, side = canonical_module(match["module"]), _SIDES[match["side"]]
        if match["what"] == "components":
            components.setdefault(path, {})[f"components_{side}"] = tensor
        else:
            what = f"coefficients_{side}" if match["what"] == "coefficients" else match["what"]
            parts.setdefault(path, {})[what] = tensor
    if not parts:
        raise SubspaceError(f"{label} has no coefficients in its file; save it again.")
    _refuse_magnitudes(label, kept)
    found = {path: subspace.find(path.replace(".base_layer", "")) for path in parts}
    missing = [path for path, module in found.items() if module is None]
    if missing:
        raise SubspaceError(
            f"{label} adapts {len(missing)} modules that the subspace lacks, {some(missing)}. Add it to a store of the subspace "
            "that it was trained in, or build one from adapters that have these modules."
        )
    _refuse_double(location.name, found)
    cores, paths = {}, {}
    for path, module in sorted(found.items(), key=lambda pair: natural_order(str(pair[1]))):
        assert module is not None
        try:
            cores[module] = Core(kind.name, parts[path], settings.scaling_of(path.replace(".base_layer", "")))
            check_core(cores[module], module, subspace)
        except (SubspaceError, ValueError) as error:
            raise SubspaceError(f"{label} cannot be kept in a store: {error}") from error
        _check_embedded(label, module, components.get(path, {}), subspace[module])
        paths[module] = path
    return AdapterMember(
        cores,
        record=_record(location, config=config, settings=settings, weights=weights, n_modules=len(cores)),
        kept_aside=kept,
        relative_errors={},
        paths=paths,
    )


def _record(
    location: AdapterLocation,
    *,
    config: Mapping[str, Any],
    settings: LoraSettings,
    weights: WeightsFile,
    n_modules: int,
) -> dict[str, Any]:
    source = location.source if location.revision else location.folder.resolve().name
    labels = labels_of(location.folder)
    return {
        "name": location.name,
        "source": source,
        "revision": location.revision,
        "base_model": settings.base_model,
        "rank": settings.rank,
        "lora_alpha": settings.lora_alpha,
        "use_rslora": settings.use_rslora,
        "task_type": settings.task_type,
        "license": license_of(location.folder),
        "sha256": file_sha256(weights.path),
        "n_modules": n_modules,
        "config": _short_config(config),
        **({"labels": labels} if labels else {}),
    }


def _check_trained_config(label: str, config: Mapping[str, Any], subspace: PrincipalSubspace) -> None:
    for name, why in _NOT_KEPT.items():
        if config.get(name):
            raise SubspaceError(
                f"{label} has {name}={config[name]!r}: {why}. A store does not keep such adapters; "
                f"keep its folder beside the store, or train it without {name}."
            )
    expected = config.get("subspace_sha256")
    if not isinstance(expected, str) or not subspace.has_been(expected):
        raise SubspaceError(
            f"{label} was trained on bases of fingerprint {expected}, and those of the store have {subspace.fingerprint}. "
            "Use a store of the subspace that it was trained on; or write it as a plain LoRA with eigenpeft.export_lora, "
            "which can be projected."
        )


def _settings(label: str, config: Mapping[str, Any]) -> LoraSettings:
    settings, problems = settings_of(config)
    if settings is None:
        raise SubspaceError(f"{label} {'; it '.join(problems)}.")
    return settings


def _check_embedded(label: str, module: str, components: Mapping[str, Tensor], bank: ModuleSubspace) -> None:
    """Components in the adapter's own file are dropped, since the store has them: they must be the same."""
    for name, tensor in components.items():
        own = getattr(bank, name)[: len(tensor)]
        if (
            own.shape != tensor.shape
            or not tensor.is_floating_point()
            or not torch.allclose(
                own.to(tensor.dtype).float(), tensor.float(), rtol=0, atol=torch.finfo(tensor.dtype).eps
            )
        ):
            raise SubspaceError(
                f"{label} brings {name} of {module!r} that are not those of the store, although it names the same "
                "fingerprint: its file was altered. Train or download it again."
            )


def check_base(adapter: SourceAdapter, subspace: PrincipalSubspace) -> None:
    """Refuse a LoRA adapter whose config names another base model, or another revision of it, than the subspace's.

    Args:
        adapter: The adapter.
        subspace: The bases.

    Raises:
        SubspaceError: If both name one and they differ.
    """
    own, base = adapter.base_model, subspace.info.base_model_name_or_path
    if own and base and own != base:
        raise SubspaceError(
            f"The adapter {adapter.name!r} names the base model {own!r}, and the store's subspace {base!r}. If these are "
            "copies of one model, pass allow_different_base_models=True."
        )
    own, base = adapter.base_model_revision, subspace.info.base_model_revision
    if own and base and own != base:
        raise SubspaceError(
            f"The adapter {adapter.name!r} names revision {own!r} of its base model, and the store's subspace {base!r}. If the "
            "weights are the same, pass allow_different_base_models=True."
        )


def _refuse_double(name: str, found: Mapping[str, str | None] | Mapping[str, str]) -> None:
    by_module: dict[str | None, list[str]] = {}
    for path, module in found.items():
        by_module.setdefault(module, []).append(path)
    double = {module: paths for module, paths in by_module.items() if len(paths) > 1}
    for module, paths in double.items():
        raise SubspaceError(
            f"The adapter {name!r} adapts {some(paths)}, which all fit the subspace's one module {module!r}. Build a "
            "subspace that has them apart."
        )


def _refuse_magnitudes(label: str, kept: Mapping[str, Tensor]) -> None:
    foreign = [key for key in kept if ".lora_" in key]
    if offsets := [key for key in foreign if key.endswith(".offset")]:
        raise SubspaceError(
            f"{label} has an offset beside its cores in {len(offsets) // 2} modules, which no bases hold, and a store does not "
            "keep. Write it as a plain LoRA with eigenpeft.export_lora, which can be projected with its error, or start it "
            "with init_offset=False."
        )
    if foreign:
        raise SubspaceError(
            f"{label} has {len(foreign)} tensors that belong to no core, {some(foreign)}, which a store does not keep; keep its "
            "folder beside the store."
        )


def _tensor(weights: WeightsFile, key: str, name: str) -> Tensor:
    try:
        return weights.read(key)
    except (ValueError, KeyError) as error:
        raise CollectionError([f"Adapter {name!r}: its tensor {key!r} cannot be read ({error})."]) from error


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG_NAME)
    except (OSError, ValueError):
        return {}  # whoever opens the adapter says what is wrong with it
    return config if isinstance(config, dict) else {}


def _short_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that have a value, without the place of the subspace, which may be a path of its author's machine."""
    return {name: value for name, value in config.items() if value not in (None, {}, []) and name != "subspace"}
