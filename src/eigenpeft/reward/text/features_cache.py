"""The cache of embedded comparisons: a folder of parts, each found by the texts that it was made from."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch import nn

from eigenpeft.artifacts.reading import read_json
from eigenpeft.errors import RewardModelError
from eigenpeft.reward.text.backbone import head_module

RECORD = "features.json"


class FeaturesCache:
    """Features of one model and one tokenizer, in parts named by the hash of their texts and users.

    Features are the inputs of the head, so that models which differ in the head alone can use the same cache.

    Args:
        folder: Where; made if absent.
        model: Sequence classifier or encoder.
        processing_class: Its tokenizer.
        max_length: Longest text in tokens.
        part_size: Comparisons per part.

    Raises:
        RewardModelError: If the folder holds features of another model, tokenizer or length.
        OSError: If the folder cannot be written.
    """

    def __init__(self, folder: Path, model: Any, processing_class: Any, *, max_length: int | None, part_size: int):
        self.folder = folder
        identity = {
            "format_version": 2,
            "model": _model_digest(model),
            "tokenizer": _tokenizer_digest(processing_class),
            "max_length": max_length,
            "part_size": part_size,
        }
        record = folder / RECORD
        if record.is_file():
            _check_same(record, identity)
            return
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{RECORD}.tmp"
        scratch.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        scratch.replace(record)

    def read(self, texts: Sequence[str], users: Sequence[str]) -> Dataset | None:
        """The part made from these texts and users, or None.

        Args:
            texts: As the tokenizer takes them.
            users: User of each comparison.
        """
        place = self._place(texts, users)
        return load_from_disk(place) if place.is_dir() else None  # pyright: ignore[reportReturnType]

    def write(self, part: Dataset, texts: Sequence[str], users: Sequence[str]) -> Dataset:
        """Keep a part, whole or not at all, and read it back.

        Args:
            part: Features and users.
            texts: As the tokenizer takes them.
            users: User of each comparison.
        """
        place = self._place(texts, users)
        scratch = place.with_name(f".{place.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        part.save_to_disk(scratch)
        scratch.rename(place)
        return load_from_disk(place)  # pyright: ignore[reportReturnType]

    def _place(self, texts: Sequence[str], users: Sequence[str]) -> Path:
        digest = hashlib.sha256(json.dumps([list(texts), list(users)]).encode("utf-8", "surrogatepass"))
        return self.folder / f"part-{digest.hexdigest()[:32]}"


def _check_same(record: Path, identity: dict[str, Any]) -> None:
    try:
        known = read_json(record)
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict):
        raise RewardModelError(f"{str(record)!r} cannot be read; pass another cache_dir, or remove the folder.")
    if known.get("format_version") != identity["format_version"]:
        raise RewardModelError(
            f"{str(record.parent)!r} holds features that another version of eigenpeft wrote; pass another cache_dir, or "
            "remove the folder."
        )
    other = [name for name, value in identity.items() if known.get(name) != value]
    if other:
        raise RewardModelError(
            f"{str(record.parent)!r} holds features with another {', '.join(other)}; pass another cache_dir, or remove it."
        )


def _model_digest(model: nn.Module) -> str:
    """SHA-256 of all weights but the head's."""
    try:
        head = head_module(model)[0]
    except RewardModelError:
        head = None
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if head is None or f".{head}." not in f".{name}":
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer_digest(processing_class: Any) -> str:
    """SHA-256 of what turns texts into tokens: rules, vocabulary, special tokens, sides and chat template."""
    backend = getattr(processing_class, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": processing_class.get_vocab()}
    for state in ("truncation", "padding"):  # what the last call asked for, not a property of the tokenizer
        rules.pop(state, None)
    settings = {
        name: getattr(processing_class, name, None)
        for name in ("chat_template", "padding_side", "truncation_side", "model_max_length", "special_tokens_map")
    }
    text = json.dumps([type(processing_class).__name__, rules, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
