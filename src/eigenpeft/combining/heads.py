"""Trained parts that no rule merges: heads are kept, one per task; biases, trained tokens and the rest are refused by name."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from eigenpeft.artifacts.reading import read_json
from eigenpeft.artifacts.tensor_file import read_tensors
from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.formats.settings import CONFIG_NAME
from eigenpeft.collection.formats.weights import WeightsFile, open_weights
from eigenpeft.collection.opening import some
from eigenpeft.errors import ArtifactError, CollectionError

HEADS_FOLDER = "heads"
HEAD_FILE = "head.safetensors"
# Trained beside the factors, but neither a head nor a matrix s B A; the first pattern that fits names it.
_REFUSED = {
    r"\.lora_B(\.[^.]+)?\.bias$": "biases of lora_B (lora_bias=True)",
    r"token_adapter|trainable_tokens": "trained tokens (trainable_token_indices)",
    r"\.lora_embedding_[AB]": "factors of embeddings, which the collection left aside (open it with embeddings=True)",
}
_BIASES, _OTHER = "biases of the base model (bias='all' or 'lora_only')", "other tensors"
_NEEDED_IN_TRAINING_ONLY = re.compile(r"\.lora_velora_")
_WRAPPED = re.compile(r"\.(modules_to_save|original_module)(\.[^.]+)?(?=\.)")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class OtherParts:
    """What adapters hold besides their factors.

    Attributes:
        heads: Tensors under the modules of `modules_to_save`, by adapter and key of PEFT's state dict.
        shared: Weights that all adapters hold with the same bits, by key: copies of the base model's, such as the embedding
            that PEFT saves with an adapter of it. They need no merging.
    """

    heads: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor]


def parts_of_files(collection: AdapterCollection) -> OtherParts:
    """What the files of adapters hold besides their factors.

    Args:
        collection: Adapters on disk.

    Raises:
        OSError, ValueError: If a file is gone, or a tensor that it had is not there any more.
        CollectionError: If an adapter has other trained tensors; the message names them all.
    """
    folders = {adapter.name: Path(adapter.weights_path).parent for adapter in collection.adapters}
    files: dict[str, WeightsFile] = {}  # those that hold something else

    def read(name: str, key: str) -> Tensor:
        if name not in files:
            files[name] = open_weights(folders[name])
        return files[name].read(key)

    try:
        return parts_of(
            {adapter.name: adapter.kept_aside for adapter in collection.adapters},
            saved={name: _saved_modules(folder) for name, folder in folders.items()},
            read=read,
        )
    finally:
        for file in files.values():
            file.close()


def parts_of(
    keys: Mapping[str, Sequence[str]],
    *,
    saved: Mapping[str, Sequence[str]],
    read: Callable[[str, str], Tensor],
) -> OtherParts:
    """What adapters hold besides their factors, sorted into what can be kept; the rest is refused.

    Args:
        keys: Keys of the tensors that are not factors, by adapter.
        saved: `modules_to_save` of the configs, by adapter.
        read: Tensor of an adapter and a key.

    Raises:
        CollectionError: If an adapter has other trained tensors; the message names them all.
    """
    heads, shared, problems = {}, {}, []
    for name, own in keys.items():
        kept, refused = _sorted_out(own, saved[name])
        for key in list(refused.get(_OTHER, ())):
            if key.endswith(".weight") and _same_in_all(key, keys, read):
                shared[key] = read(name, key)
                refused[_OTHER].remove(key)
        problems += [
            f"Adapter {name!r} has, besides its factors, {what}, {some(names)}: no rule merges them, and without them its "
            "update is not whole. Leave it out, or train it without."
            for what, names in refused.items()
            if names
        ]
        if kept:
            heads[name] = {key: read(name, key) for key in kept}
    if problems:
        raise CollectionError(problems)
    return OtherParts(heads, shared)


def head_files(heads: Mapping[str, Mapping[str, Tensor]]) -> dict[str, bytes]:
    """Files of the heads by path inside the merged adapter's folder: `heads/<name>/head.safetensors`.

    Args:
        heads: Tensors by adapter and key.

    Raises:
        ArtifactError: If an adapter's name cannot be a folder's name.
    """
    files = {}
    for name, tensors in heads.items():
        if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ArtifactError(f"The adapter's name {name!r} cannot be the name of a folder for its head; rename it.")
        content = {key: tensor.contiguous() for key, tensor in tensors.items()}
        files[f"{HEADS_FOLDER}/{name}/{HEAD_FILE}"] = save(content, metadata={"format": "pt"})
    return files


def load_head(model: nn.Module, *, folder: str | Path, name: str) -> None:
    """Put the head of one task into a model, in place: `merged/heads/<name>/head.safetensors`.

    Args:
        model: The base model, or a PEFT model on it, with a head of the task's shape.
        folder: Folder of the merged adapter.
        name: Name of the source adapter.

    Raises:
        ArtifactError: If there is no such head, or it does not fit the model.

    Examples:
        >>> import eigenpeft
        >>> import torch
        >>> from collections import OrderedDict
        >>> from peft import LoraConfig, get_peft_model
        >>> def base():
        ...     return torch.nn.Sequential(OrderedDict(body=torch.nn.Linear(8, 4), score=torch.nn.Linear(4, 2)))
        >>> for name in ("legal", "sports"):
        ...     config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["score"], init_lora_weights=False)
        ...     trained = get_peft_model(base(), config)
        ...     trained.save_pretrained(f"adapters/{name}")
        >>> eigenpeft.merge("adapters", progress=False).save_pretrained("merged")
        >>> model = base()
        >>> load_head(model, folder="merged", name="sports")
        >>> torch.equal(model.score.weight, trained.base_model.model.score.modules_to_save["default"].weight)
        True
    """
    root = Path(folder) / HEADS_FOLDER
    present = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if name not in present:
        raise ArtifactError(f"name={name!r} has no head in {str(folder)!r}, which has those of {present}.")
    try:
        tensors, _ = read_tensors(root / name / HEAD_FILE)
    except ArtifactError as error:
        raise ArtifactError(f"The head of {name!r} cannot be read ({error}); merge again.") from error
    put_head(model, tensors, name=name)


def put_head(model: nn.Module, tensors: Mapping[str, Tensor], *, name: str) -> None:
    """Copy a head's tensors into a model, into every copy of the module that PEFT keeps.

    Args:
        model: The base model, or a PEFT model on it.
        tensors: By key of PEFT's state dict.
        name: What to call it when it does not fit.

    Raises:
        ArtifactError: If the model has no such parameter, or one of another shape.
    """
    places: dict[str, list[Tensor]] = {}
    for key, parameter in model.state_dict(keep_vars=True).items():
        places.setdefault(_plain(key), []).append(parameter)
    targets = {key: _find(places, _plain(key)) for key in tensors}
    wrong = [key for key, found in targets.items() if not found or found[0].shape != tensors[key].shape]
    if wrong:
        has = [tuple(found.shape) for found in targets[wrong[0]]][:1] or "no such parameter"
        raise ArtifactError(
            f"The head of {name!r} does not fit the model: {_plain(wrong[0])!r} has shape {tuple(tensors[wrong[0]].shape)}, "
            f"the model has {has}. Make the model with as many labels as the task."
        )
    for key, found in targets.items():
        for parameter in found:
            parameter.data.copy_(tensors[key])


def _find(places: Mapping[str, list[Tensor]], key: str) -> list[Tensor]:
    """The parameters of a name, or of the only one that ends in it."""
    if key in places:
        return places[key]
    fits = [found for name, found in places.items() if name.endswith(f".{key}")]
    return fits[0] if len(fits) == 1 else []


def _plain(key: str) -> str:
    return _WRAPPED.sub("", key.removeprefix(_PREFIX))


def _saved_modules(folder: Path) -> tuple[str, ...]:
    config = read_json(folder / CONFIG_NAME)
    named = config.get("modules_to_save") or ()
    return tuple(name for name in named if isinstance(name, str))


def _sorted_out(keys: Sequence[str], saved: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Keys under a module of `modules_to_save`, and the others by what they are."""
    kept: list[str] = []
    refused: dict[str, list[str]] = {}
    for key in keys:
        if _NEEDED_IN_TRAINING_ONLY.search(key):
            continue
        what = next((words for pattern, words in _REFUSED.items() if re.search(pattern, key)), None)
        module = _plain(key).rpartition(".")[0]
        if what is None and any(module == head or f".{head}." in f".{module}." for head in saved):
            kept.append(key)
            continue
        refused.setdefault(what or (_BIASES if key.endswith(".bias") else _OTHER), []).append(key)
    return kept, refused


def _same_in_all(key: str, keys: Mapping[str, Sequence[str]], read: Callable[[str, str], Tensor]) -> bool:
    if not all(key in own for own in keys.values()):
        return False
    first, *others = keys
    tensor = read(first, key)
    return all(torch.equal(tensor, read(name, key)) for name in others)
