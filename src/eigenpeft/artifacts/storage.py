"""Artifacts on disk and on the Hub: a JSON config, one safetensors file whose hash it names, a model card."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.artifacts.atomic import atomic_folder
from eigenpeft.artifacts.manifest import MANIFEST, UNFINISHED_MANIFEST
from eigenpeft.artifacts.reading import is_folder, read_json
from eigenpeft.artifacts.tensor_file import TensorFile
from eigenpeft.errors import ArtifactError, SubspaceNotFoundError


@dataclass(frozen=True)
class ArtifactKind:
    """File names and format of one kind of artifact.

    Attributes:
        label: What messages call it.
        config_name: Name of the JSON file; written last, it holds the hash of the tensors.
        tensors_name: Name of the safetensors file; of a store's index.
        format_version: Version written, and the newest one that can be read.
        further: Patterns of the other files that it needs.
    """

    label: str
    config_name: str
    tensors_name: str
    format_version: int = 1
    further: tuple[str, ...] = ()


SUBSPACE = ArtifactKind("subspace", "subspace_config.json", "subspace.safetensors", format_version=2)
STORE = ArtifactKind(
    "adapter store",
    "store_config.json",
    "members.index",
    format_version=2,
    further=(SUBSPACE.config_name, SUBSPACE.tensors_name, "members/*.shard"),
)
"""Its bases are a subspace of their own in the same folder."""
STORE_1 = ArtifactKind("adapter store", "store_config.json", "store.safetensors")
"""A store of format 1, with the bases and the coefficients of all members in one file."""


@dataclass(frozen=True)
class Location:
    """A folder that holds an artifact, and what the user called it.

    Attributes:
        folder: Local folder.
        kind: Which artifact it holds.
        origin: Path or Hub id as given.
        revision: Commit of the Hub snapshot, None for a local folder.
    """

    folder: Path
    kind: ArtifactKind
    origin: str
    revision: str | None = None


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, whatever file holds them.

    Args:
        tensors: Tensors by name; their order does not matter.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_artifact(
    folder: str | Path,
    kind: ArtifactKind,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
    overwrite: bool = False,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Write config, tensors and card to `folder`; whole or not at all.

    Args:
        folder: Folder to make, or to replace.
        kind: Which artifact; gives the file names.
        config: JSON-serialisable; `format_version` is added.
        tensors: Tensors by name.
        card: Text of README.md.
        overwrite: Whether to replace an artifact of this kind that eigenpeft wrote; see `atomic_folder`.
        inputs: Paths that were read; the folder must not be one of them or lie inside one.

    Raises:
        ArtifactError: If the folder cannot be written, or holds something that must not be replaced.
    """
    with atomic_folder(folder, kind=kind.label, overwrite=overwrite, inputs=inputs) as scratch:
        write_files(scratch, kind, config=config, tensors=tensors)
        (scratch / "README.md").write_text(card, encoding="utf-8")


def write_files(folder: Path, kind: ArtifactKind, *, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and config into a folder, in this order; the caller sees to it that nobody reads them meanwhile.

    Args:
        folder: An existing folder.
        kind: Which artifact; gives the file names.
        config: JSON-serialisable; `format_version` is added.
        tensors: Tensors by name.
    """
    text = json.dumps({"format_version": kind.format_version, **config}, indent=2, allow_nan=False)
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(owned, folder / kind.tensors_name)
    (folder / kind.config_name).write_text(text + "\n", encoding="utf-8")


def locate(
    path_or_id: str | Path,
    *kinds: ArtifactKind,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Location:
    """Find an artifact in a local folder or on the Hub (downloading it when needed).

    Args:
        path_or_id: Folder, or Hub id `owner/name`.
        *kinds: The kinds that will do.
        revision: Hub branch, tag or commit.
        token: Hub token; None takes the logged-in one.
        cache_dir: Hub cache.
        local_files_only: Use the cache alone.

    Raises:
        SubspaceNotFoundError: If there is none; the message lists the places searched.
        ArtifactError: If the place exists and holds something else, or only a part.
    """
    label = " or ".join(dict.fromkeys(kind.label for kind in kinds))
    folder, commit = Path(path_or_id), None
    if not is_folder(folder):
        try:
            folder = Path(
                snapshot_download(
                    str(path_or_id),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    allow_patterns=[
                        name for kind in kinds for name in (kind.config_name, kind.tensors_name, *kind.further)
                    ],
                )
            )
        except (
            HFValidationError,
            OSError,
        ) as error:  # OSError: no connection, no such repository, not in the cache
            reason = str(error).strip().splitlines()[0]
            raise SubspaceNotFoundError(
                f"No {label} at {str(path_or_id)!r}. Looked for a local folder (from {str(Path.cwd())!r}), then on "
                f"the Hub at revision {revision or 'main'!r} ({type(error).__name__}: {reason}). Check the spelling, "
                "log in for private repositories, or pass the path of a local copy."
            ) from error
        commit = folder.name
    lacking = {
        kind: [name for name in (kind.config_name, kind.tensors_name) if not (folder / name).is_file()]
        for kind in kinds
    }
    for kind, missing in lacking.items():
        if not missing:
            return Location(folder, kind, str(path_or_id), revision=commit)
    for kind, missing in lacking.items():
        if len(missing) == 1:
            raise ArtifactError(
                f"The {kind.label} at {str(path_or_id)!r} is incomplete: it has no {missing[0]}. Get a fresh copy."
            )
    article = "an" if label[0] in "aeio" else "a"
    names = " and no ".join(dict.fromkeys(kind.config_name for kind in kinds))
    raise ArtifactError(
        f"{str(path_or_id)!r} is not {article} {label}: it has no {names}. Pass a folder written by save_pretrained or by "
        "the `eigenpeft` command."
    )


def read_config(location: Location) -> dict[str, Any]:
    """The JSON config of an artifact, its format version checked.

    Args:
        location: Where it is.

    Raises:
        ArtifactError: If the file is not JSON, or of a newer format than this version can read.
    """
    kind = location.kind
    path = location.folder / kind.config_name
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{str(path)!r} cannot be read as JSON ({error}); get a fresh copy of the {kind.label}."
        ) from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or not 1 <= version <= kind.format_version:
        raise ArtifactError(
            f"{str(path)!r} has format_version {version!r}; this version of eigenpeft reads 1 to "
            f"{kind.format_version}. Upgrade eigenpeft, or build the artifact again."
        )
    return config


def open_tensors(location: Location) -> TensorFile:
    """An artifact's tensors, the header read and checked; the file stays open.

    Args:
        location: Where it is.

    Raises:
        DamagedFileError: If the file is truncated or not safetensors.
    """
    return TensorFile(location.folder / location.kind.tensors_name)


def push_folder(
    folder: str | Path, repo_id: str, *, private: bool | None, token: str | bool | None, message: str
) -> str:
    """Upload a saved artifact as a model repository and return its address.

    Args:
        folder: Folder written by `write_artifact`.
        repo_id: `owner/name`, made when it does not exist.
        private: Visibility of a new repository.
        token: Hub token; None takes the logged-in one.
        message: Commit message.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=[MANIFEST, UNFINISHED_MANIFEST]
    )
    return str(commit.commit_url)
