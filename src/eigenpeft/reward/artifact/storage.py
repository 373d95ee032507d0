"""Reward models on disk and on the Hub: sidecar and users beside an optional stock classifier."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eigenpeft.artifacts.atomic import atomic_folder, atomic_update
from eigenpeft.artifacts.locks import one_writer
from eigenpeft.artifacts.reading import read_json
from eigenpeft.artifacts.storage import fingerprint
from eigenpeft.artifacts.tensor_file import read_tensors
from eigenpeft.errors import ArtifactError
from eigenpeft.reward.artifact.users import UserTable
from eigenpeft.reward.text.backbone import score_head
from eigenpeft.version import __version__

FORMAT_VERSION = 1
CONFIG = "lore_config.json"
BASIS = "lore.safetensors"
USERS = "lore_users.safetensors"
KIND = "reward model"


@dataclass(frozen=True, eq=False)
class Parts:
    """A reward model as read.

    Attributes:
        reward_basis: (n_basis, n_features).
        concentration: (n_basis,).
        users: The mapped table.
        info: What the fit recorded.
        backbone: The classifier, or None.
        processing_class: Its tokenizer, or None.
    """

    reward_basis: Tensor
    concentration: Tensor
    users: UserTable
    info: dict[str, Any]
    backbone: Any
    processing_class: Any


def write(
    folder: str | Path,
    *,
    reward_basis: Tensor,
    concentration: Tensor,
    users: UserTable,
    backbone: Any,
    processing_class: Any,
    info: Mapping[str, Any],
    card: str,
    overwrite: bool = False,
) -> None:
    """Write everything; whole or not at all.

    Args:
        folder: Folder to make, or to replace.
        reward_basis: (n_basis, n_features).
        concentration: (n_basis,).
        users: Table of users.
        backbone: Classifier whose head is the basis, or None.
        processing_class: Its tokenizer, or None.
        info: JSON-able.
        card: Text of README.md.
        overwrite: Whether to replace another reward model there, which must have been written by eigenpeft.

    Raises:
        ArtifactError: If the folder cannot be written, or holds something that is not replaced.
    """
    tensors = {"reward_basis": reward_basis, "concentration": concentration}
    config = {
        "format_version": FORMAT_VERSION,
        "eigenpeft_version": __version__,
        "n_basis": len(reward_basis),
        "n_features": reward_basis.shape[1],
        "backbone": backbone is not None,
        "sha256": fingerprint(tensors),
        "info": dict(info),
    }
    text = json.dumps(config, indent=2, allow_nan=False)
    with atomic_folder(folder, kind=KIND, overwrite=overwrite) as scratch:
        if backbone is not None:
            backbone.save_pretrained(scratch)
        if processing_class is not None:
            processing_class.save_pretrained(scratch)
        save_file(tensors, scratch / BASIS)
        users.save(scratch / USERS)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        (scratch / CONFIG).write_text(text + "\n", encoding="utf-8")


def write_users(folder: str | Path, *, reward_basis: Tensor, users: UserTable) -> None:
    """Write what changed in a table of users into the table of a saved model, and touch nothing else of it.

    The table on disk is read again under a lock: users that other processes added meanwhile stay.

    Args:
        folder: Folder written by `write`.
        reward_basis: (n_basis, n_features) basis that the weights belong to.
        users: Table of users.

    Raises:
        ArtifactError: If there is no model, it has another basis, or the file cannot be written.
    """
    folder, origin = Path(folder), str(folder)
    _check_basis(folder, reward_basis, origin=origin)  # before a lock is made beside a folder that is not a model
    with one_writer(folder):
        _check_basis(folder, reward_basis, origin=origin)
        merged = users.onto(UserTable.open(folder / USERS, n_basis=len(reward_basis)))
        with atomic_update(folder, last=USERS) as update:
            merged.save(update.scratch / USERS)
        users.settle(merged, path=folder / USERS)


def read(
    path_or_id: str | Path,
    *,
    load_backbone: bool,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Parts:
    """Read a model from a folder or from the Hub.

    Args:
        path_or_id: Folder or Hub id.
        load_backbone: Whether to load the classifier where there is one.
        revision: Hub revision.
        token: Hub token.
        cache_dir: Hub cache.
        local_files_only: Use the cache alone.

    Raises:
        ArtifactError: If it is missing, incomplete, altered or newer than this version.
        RewardModelError: If the classifier has no linear head.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        sidecar = None if load_backbone else [CONFIG, BASIS, USERS]
        try:
            folder = Path(
                snapshot_download(
                    str(path_or_id),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    allow_patterns=sidecar,
                )
            )
        except (HFValidationError, OSError) as error:
            raise ArtifactError(
                f"No reward model at {str(path_or_id)!r}: it is neither a local folder (from {str(Path.cwd())!r}) nor "
                f"available from the Hub ({type(error).__name__}). Check the spelling or pass the path of a copy."
            ) from error
    config, tensors = _sidecar(folder, origin=str(path_or_id))
    reward_basis = tensors["reward_basis"]
    users = UserTable.open(folder / USERS, n_basis=len(reward_basis))
    backbone, processing_class = (None, None)
    if load_backbone and config.get("backbone"):
        backbone, processing_class = _classifier(folder, reward_basis, origin=str(path_or_id))
    return Parts(
        reward_basis, tensors["concentration"], users, dict(config.get("info", {})), backbone, processing_class
    )


def _check_basis(folder: Path, reward_basis: Tensor, *, origin: str) -> None:
    _, tensors = _sidecar(folder, origin=origin)
    if not torch.equal(tensors["reward_basis"], reward_basis):
        raise ArtifactError(
            f"{origin!r} holds another reward basis: weights fitted on this one mean nothing there. Save the whole model "
            "with save_pretrained instead."
        )


def _sidecar(folder: Path, *, origin: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in (CONFIG, BASIS, USERS) if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{origin!r} is not a whole low-rank reward model: it has no {', no '.join(missing)}. Pass a folder written "
            "by `eigenpeft lore fit` or save_pretrained."
        )
    try:
        config = read_json(folder / CONFIG)
        tensors, _ = read_tensors(folder / BASIS)
    except (ArtifactError, OSError, ValueError) as error:
        raise ArtifactError(f"The reward model at {origin!r} cannot be read ({error}); get a fresh copy.") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(
            f"The reward model at {origin!r} has format_version {version!r}; this version of eigenpeft reads 1 to "
            f"{FORMAT_VERSION}. Upgrade eigenpeft."
        )
    if set(tensors) != {"reward_basis", "concentration"} or fingerprint(tensors) != config.get("sha256"):
        raise ArtifactError(
            f"The tensors of the reward model at {origin!r} do not have the hash that its {CONFIG} names: a file was altered. "
            "Get a fresh copy."
        )
    if not isinstance(config.get("info", {}), dict):
        raise ArtifactError(
            f"The {CONFIG} of the reward model at {origin!r} has info {config['info']!r}, which must be an object; get a "
            "fresh copy."
        )
    return config, tensors


def _classifier(folder: Path, reward_basis: Tensor, *, origin: str) -> tuple[Any, Any]:
    backbone = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    head = score_head(backbone)[1].weight.detach()
    if head.shape != reward_basis.shape or not torch.equal(head.cpu(), reward_basis.to(head.dtype)):
        raise ArtifactError(
            f"The classifier in {origin!r} has another head than the reward basis beside it; get a fresh copy."
        )
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))
    return backbone, AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
