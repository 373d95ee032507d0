"""From text to features: the last hidden state that a reward model's head reads, cached as Arrow, resumable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from huggingface_hub.utils import tqdm
from torch import Tensor

from eigenpeft.errors import RewardModelError
from eigenpeft.reward.text.backbone import head_module, score_head
from eigenpeft.reward.text.features_cache import FeaturesCache
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

    Raises:
        RewardModelError: If the model has no linear head.
    """
    try:
        _, head = head_module(model)
    except RewardModelError:
        return _mean_hidden_states(model, processing_class, texts, batch_size=batch_size, max_length=max_length)
    # The head hands on what it is given, and the model pools that as it pools logits. Nothing in the model is replaced.
    handle = head.register_forward_hook(lambda module, inputs, output: inputs[0])
    try:
        features = classify(model, processing_class, texts, batch_size=batch_size, max_length=max_length)
    finally:
        handle.remove()
    return features if len(texts) else torch.zeros(0, score_head(model)[1].in_features)


def embed_preferences(
    rows: Dataset,
    *,
    model: Any,
    processing_class: Any,
    cache_dir: str | Path,
    user_column: str = "user_id",
    batch_size: int = 8,
    max_length: int | None = None,
    part_size: int = 512,
) -> Dataset:
    """A data set of features, memory-mapped: `chosen`, `rejected` (n_features,) and the user, ready for `LoReFitter`.

    Takes TRL's preference format, conversational or not, with the prompt apart or inside both sides. A text that stands in many
    comparisons of a part, or in the part before, is embedded once. Parts are written one after the other; an interrupted run goes
    on where it stopped, a finished one is read back, and rows added at the end cost only themselves.

    Args:
        rows: Comparisons: a data set with `chosen`, `rejected`, perhaps `prompt`, and the user column.
        model: Sequence classifier or encoder.
        processing_class: Its tokenizer.
        cache_dir: Folder of this data set's features.
        user_column: Column that names the user.
        batch_size: Texts at a time.
        max_length: Longest text in tokens.
        part_size: Comparisons a part.

    Raises:
        RewardModelError: If a column is missing, a row has no user, or the folder holds features of another
            model or tokenizer.
        OSError: If the folder of the features cannot be written.

    Examples:
        >>> from transformers import AutoModel, AutoTokenizer
        >>> from eigenpeft.demo.assets import base_model
        >>> model, tokenizer = AutoModel.from_pretrained(base_model()), AutoTokenizer.from_pretrained(base_model())
        >>> rows = Dataset.from_dict({"chosen": ["a good joke"], "rejected": ["a bad one"], "user_id": ["ada"]})
        >>> found = embed_preferences(rows, model=model, processing_class=tokenizer, cache_dir="features")
        >>> sorted(found.column_names), len(found[0]["chosen"])
        (['chosen', 'rejected', 'user_id'], 384)
    """
    missing = {"chosen", "rejected", user_column} - set(rows.column_names)
    if missing:
        raise RewardModelError(
            f"The data set has no column {sorted(missing)}, only {sorted(rows.column_names)}; preferences need chosen, "
            f"rejected and the user ({user_column!r})."
        )
    if empty := [row for row, user in enumerate(rows[user_column]) if user is None or str(user) == ""]:
        raise RewardModelError(
            f"Row {empty[0]} has no user in its column {user_column!r} (nor have {len(empty) - 1} more rows); name the user of "
            "each comparison, or leave those rows out."
        )
    cache = FeaturesCache(Path(cache_dir), model, processing_class, max_length=max_length, part_size=part_size)
    starts = range(0, len(rows), part_size)
    parts, known = [], {}
    for start in tqdm(starts, desc="Embedding comparisons", disable=len(starts) < 2):
        some = rows.select(range(start, min(start + part_size, len(rows))))
        examples: list[Any] = list(some)
        texts = [
            join(row.get("prompt") or ("" if isinstance(row[side], str) else []), row[side], processing_class)
            for side in ("chosen", "rejected")
            for row in examples
        ]
        users = [str(user) for user in some[user_column]]
        part = cache.read(texts, users)
        if part is None:
            new = [text for text in dict.fromkeys(texts) if text not in known]
            features = embed_texts(model, processing_class, new, batch_size=batch_size, max_length=max_length)
            known |= dict(zip(new, features, strict=True))
            stacked = torch.stack([known[text] for text in texts])
            part = cache.write(_table(stacked.numpy(), users, user_column), texts, users)
            known = dict(zip(texts, stacked, strict=True))  # of one part, in one tensor, so that memory does not grow
        parts.append(part)
    whole = concatenate_datasets(parts)  # pyright: ignore[reportArgumentType]
    return whole.with_format("numpy")


def _table(features: Any, users: list[str], user_column: str) -> Dataset:
    """Features of the chosen texts, then of the rejected ones, as columns beside their users."""
    width = features.shape[1]
    columns = Features(
        {
            "chosen": List(Value("float32"), length=width),
            "rejected": List(Value("float32"), length=width),
            user_column: Value("string"),
        }
    )
    n = len(users)
    return Dataset.from_dict({"chosen": features[:n], "rejected": features[n:], user_column: users}, features=columns)


@torch.no_grad()
def _mean_hidden_states(
    model: Any, processing_class: Any, texts: Sequence[str], *, batch_size: int, max_length: int | None
) -> Tensor:
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    parts = []
    was_training = model.training
    model.eval()  # without dropout a text has the same features each time
    try:
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
    finally:
        model.train(was_training)
    return torch.cat(parts) if parts else torch.zeros(0, model.config.hidden_size)
