"""From text to features: the last hidden state that a reward model's head reads, cached as Arrow, resumable."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from eigenpeft.errors import RewardModelError
from eigenpeft.reward.text.backbone import score_head
from eigenpeft.reward.text.rewards import classify, join


def embed_texts(
    model: Any, processing_class: Any, texts: Sequence[str], *, batch_size: int = 8, max_length: int | None = None
) -> Tensor:
    """Features of texts: what the model's score head takes, or the mean hidden state of a model without one.

    Args:
        model: `AutoModelForSequenceClassification` model (pooled as the model itself pools), or an encoder.
        processing_class: Its tokenizer.
        texts: Texts.
        batch_size: Texts at a time.
        max_length: Longest text in tokens; None for the tokenizer's limit.

    Returns:
        (n, n_features) float32 on the CPU.
    """
    try:
        name, head = score_head(model)
    except RewardModelError:
        return _mean_hidden_states(model, processing_class, texts, batch_size=batch_size, max_length=max_length)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_submodule(name, nn.Identity())
    try:
        features = classify(model, processing_class, texts, batch_size=batch_size, max_length=max_length)
    finally:
        base.set_submodule(name, head)
    return features if len(texts) else torch.zeros(0, head.in_features)


def embed_preferences(
    dataset: Dataset,
    model: Any,
    processing_class: Any,
    *,
    cache_dir: str | Path,
    user_column: str = "user_id",
    batch_size: int = 8,
    max_length: int | None = None,
    part_size: int = 512,
) -> Dataset:
    """A data set of features, memory-mapped: `chosen`, `rejected` (n_features,) and the user, ready for `LoReFitter`.

    Takes TRL's preference format, conversational or not, with the prompt apart or inside both sides. Parts are written
    one after the other; an interrupted run goes on where it stopped, a finished one is read back.

    Args:
        dataset: With `chosen`, `rejected`, perhaps `prompt`, and the user column.
        model: Sequence classifier or encoder.
        processing_class: Its tokenizer.
        cache_dir: Folder of this data set's features.
        user_column: Column that names the user.
        batch_size: Texts at a time.
        max_length: Longest text in tokens.
        part_size: Comparisons a part.

    Raises:
        RewardModelError: If a column is missing, or the folder holds features of other texts or of another model.
    """
    missing = {"chosen", "rejected", user_column} - set(dataset.column_names)
    if missing:
        raise RewardModelError(
            f"The data set has no column {sorted(missing)}, only {sorted(dataset.column_names)}; preferences need chosen, "
            f"rejected and the user ({user_column!r})."
        )
    folder = Path(cache_dir)
    _claim(folder, _identity(dataset, model, user_column, max_length, part_size))
    n_parts = -(-len(dataset) // part_size)
    for number in tqdm(range(n_parts), desc="Embedding comparisons", disable=n_parts < 2):
        place = folder / f"part-{number:06d}"
        if place.is_dir():
            continue
        rows = dataset.select(range(number * part_size, min((number + 1) * part_size, len(dataset))))
        examples: list[Any] = list(rows)
        texts = [
            join(row.get("prompt") or ("" if isinstance(row[side], str) else []), row[side], processing_class)
            for side in ("chosen", "rejected")
            for row in examples
        ]
        features = embed_texts(model, processing_class, texts, batch_size=batch_size, max_length=max_length).numpy()
        columns = Features(
            {
                "chosen": List(Value("float32"), length=features.shape[1]),
                "rejected": List(Value("float32"), length=features.shape[1]),
                user_column: Value("string"),
            }
        )
        part = Dataset.from_dict(
            {
                "chosen": features[: len(rows)],
                "rejected": features[len(rows) :],
                user_column: [str(user) for user in rows[user_column]],
            },
            features=columns,
        )
        scratch = folder / f".part-{number:06d}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        part.save_to_disk(scratch)
        scratch.rename(place)
    parts = [load_from_disk(folder / f"part-{number:06d}") for number in range(n_parts)]
    whole = concatenate_datasets(parts)  # pyright: ignore[reportArgumentType]
    return whole.with_format("numpy")


@torch.no_grad()
def _mean_hidden_states(
    model: Any, processing_class: Any, texts: Sequence[str], *, batch_size: int, max_length: int | None
) -> Tensor:
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = processing_class(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(model.device)
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][:, :, None].to(hidden)
        parts.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1)).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, model.config.hidden_size)


def _identity(dataset: Dataset, model: Any, user_column: str, max_length: int | None, part_size: int) -> dict[str, Any]:
    """What makes features the same: texts, users, weights, lengths."""
    digest = hashlib.sha256()
    for row in dataset:
        fields = [row.get(name) for name in ("prompt", "chosen", "rejected", user_column)]  # pyright: ignore
        digest.update(json.dumps(fields, default=str).encode())
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item():.6e}".encode())
    return {
        "texts": digest.hexdigest(),
        "model": weights.hexdigest(),
        "n_comparisons": len(dataset),
        "max_length": max_length,
        "part_size": part_size,
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Start a cache, or make sure that it is this one."""
    record = folder / "features.json"
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        other = [name for name, value in identity.items() if known.get(name) != value]
        if other:
            raise RewardModelError(
                f"{str(folder)!r} holds features with another {', '.join(other)}; pass another cache_dir, or remove it."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".features.json.tmp"
    scratch.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    scratch.replace(record)
