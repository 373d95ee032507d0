"""Comparisons of a file as features: columns checked, text embedded by a backbone, one user's rows where one is named."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from eigenpeft.cli.rows import feature_column, naming_the_base, open_rows, open_tokenizer, without_load_reports
from eigenpeft.errors import RewardModelError
from eigenpeft.reward import embed_preferences
from eigenpeft.reward.text.backbone import head_module, reference_head

_LONGEST_NAME = 100  # characters of a user's id in a file's name


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Comparisons as features, and where they come from.

    Attributes:
        chosen: (n_pairs, n_features) features of the preferred answers.
        rejected: (n_pairs, n_features) features of the others.
        user_ids: User of each pair.
        prompt_ids: Prompt of each pair; None where no column tells them apart.
        reference: (n_features,) head of the reward model that embedded the texts; None without one.
        backbone: Model that embedded the texts; None where the file has features.
        processing_class: Its tokenizer; None where the file has features.
    """

    chosen: Any
    rejected: Any
    user_ids: list[str]
    prompt_ids: list[str] | None
    reference: torch.Tensor | None = None
    backbone: Any = None
    processing_class: Any = None


def read_comparisons(
    path: Path,
    *,
    user_column: str,
    cache: Path | None,
    model: str | None = None,
    prompt_column: str | None = None,
    embedder: tuple[Any, Any] = (None, None),
    user: str | None = None,
) -> Comparisons:
    """Comparisons of a file as features, embedded where they are text.

    Args:
        path: Rows with chosen, rejected and the user's column.
        user_column: Name of the column with the user of each comparison.
        cache: Folder to keep features in; None for one beside the file.
        model: Reward model or encoder that embeds text: folder or Hub id; None for `embedder`.
        prompt_column: Column that tells prompts apart; None for "prompt" where there is one.
        embedder: A backbone and its tokenizer.
        user: Only this user's comparisons; the user's column may be absent then.

    Raises:
        RewardModelError: If a column is missing, a row is empty, or nothing is there to embed text with.
    """
    table = open_rows(path)
    if user is not None and user_column not in table.column_names:
        table = table.add_column(user_column, [user] * len(table))  # pyright: ignore[reportCallIssue]
    _check_columns(table, user_column, prompt_column, path)
    _check_sides(table, path)
    if user is not None:
        rows = [row for row, name in enumerate(table[user_column]) if str(name) == user]
        if not rows:
            others = [str(name) for name in dict.fromkeys(table[user_column])]
            raise RewardModelError(
                f"{str(path)!r} has no comparisons of {user!r} in its column {user_column!r}, which names {len(others)} users: "
                f"{', '.join(map(repr, others[:5]))}{', ...' if len(others) > 5 else ''}. Name one of these, or leave the column "
                "out where all rows are this user's."
            )
        table = table.select(rows)
    users = user_ids(table, user_column, path=path)
    prompt_column = prompt_column or ("prompt" if "prompt" in table.column_names else None)
    prompts = None if prompt_column is None else [str(prompt) for prompt in table[prompt_column]]
    first = table[0]["chosen"]
    if isinstance(first, list) and first and isinstance(first[0], int | float):
        chosen, rejected = (feature_column(table, side, path) for side in ("chosen", "rejected"))
        return Comparisons(chosen, rejected, users, prompts)
    _check_texts(table, path)
    backbone, processing_class = embedder if model is None else _load(model)
    if backbone is None:
        raise RewardModelError(
            "The comparisons are text: name a reward model or an encoder to embed them with, --model."
            if user is None
            else "The comparisons are text, and this reward model was fitted on features and has no backbone to embed text with: "
            "give lists of numbers in chosen and rejected, or fit the model on text with `eigenpeft lore fit --model`."
        )
    place = cache or path.with_name(f"{path.stem}.features" + (f".{_file_name(user)}" if user else ""))
    features = embed_preferences(
        table, model=backbone, processing_class=processing_class, cache_dir=place, user_column=user_column
    )
    reference = None
    if model is not None and _is_reward_model(model):
        reference = reference_head(backbone)
    return Comparisons(features["chosen"], features["rejected"], users, prompts, reference, backbone, processing_class)


def _check_columns(table: Any, user_column: str, prompt_column: str | None, path: Path) -> None:
    """The message says which columns there are, which are expected, and what names each that is missing."""
    found = table.column_names
    if len(found) == 1 and path.suffix == ".csv" and (mark := next((one for one in "\t;|" if one in found[0]), None)):
        raise RewardModelError(
            f"{str(path)!r} has one column, {found[0]!r:.80}, since its columns are separated by {mark!r}; separate them by commas."
        )
    sides = [name for name in ("chosen", "rejected") if name not in found]
    remedies = []
    if sides:
        remedies.append(
            f"There is no column {' and no column '.join(map(repr, sides))}: rename the columns that hold what was preferred and "
            "what it was preferred to."
        )
    if sides and any("rating" in name.lower() for name in found):
        remedies.append("Ratings have to become comparisons first: see 'From ratings to a ranking' in docs/lore.md.")
    if user_column not in found:
        remedies.append(f"There is no column {user_column!r}: name the users' column with --user-column.")
    if prompt_column is not None and prompt_column not in found:
        remedies.append(f"There is no column {prompt_column!r}: --prompt-column must name one, or be left out.")
    if remedies:
        raise RewardModelError(
            f"{str(path)!r} has the columns {', '.join(map(repr, sorted(found)))}; comparisons need 'chosen', 'rejected' and the "
            f"user of each, here {user_column!r}. {' '.join(remedies)}"
        )


def _file_name(user: str) -> str:
    """A user's id as part of a file's name: what a path cannot hold is quoted, and a long one is its hash."""
    quoted = quote(user, safe=" @+,")
    return quoted if len(quoted) <= _LONGEST_NAME else hashlib.sha256(user.encode()).hexdigest()[:16]


def user_ids(table: Any, user_column: str, *, path: Path) -> list[str]:
    """The user of each row as text; a row without one is an error, as it would become a user of its own.

    Args:
        table: Rows with that column.
        user_column: Name of the column.
        path: Where the rows come from, for messages.

    Raises:
        RewardModelError: If a row has no user.
    """
    for row, name in enumerate(table[user_column]):
        if name is None or str(name) == "":
            raise RewardModelError(
                f"Row {row} of {str(path)!r} has no user in its column {user_column!r}; name the user of each comparison, or "
                "leave the row out."
            )
    return [str(name) for name in table[user_column]]


def _check_texts(table: Any, path: Path) -> None:
    """Every row must have text, or messages, on both sides, and a prompt of the same kind where it has one."""
    prompts = list(table["prompt"]) if "prompt" in table.column_names else [None] * len(table)
    for side in ("chosen", "rejected"):
        for row, (value, prompt) in enumerate(zip(table[side], prompts, strict=True)):
            if not isinstance(value, str | list) or not value:
                raise RewardModelError(
                    f"Row {row} of {str(path)!r} has {value!r:.60} in its column {side!r}; it must be text, a list of messages, "
                    "or a list of numbers."
                )
            if prompt and isinstance(prompt, str) != isinstance(value, str):
                raise RewardModelError(
                    f"Row {row} of {str(path)!r} has a prompt of {_kind(prompt)} and {side} of {_kind(value)}; both must be text, "
                    "or both lists of messages."
                )


def _check_sides(table: Any, path: Path) -> None:
    """A row whose two sides are equal prefers nothing."""
    equal = [
        row for row, sides in enumerate(zip(table["chosen"], table["rejected"], strict=True)) if sides[0] == sides[1]
    ]
    if equal:
        more = f" and {len(equal) - 1:,} more" if len(equal) > 1 else ""
        raise RewardModelError(
            f"Row {equal[0]}{more} of {str(path)!r} has the same in 'chosen' and 'rejected', which says nothing of what a user "
            "prefers. Leave ties out."
        )


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "messages"


def _is_reward_model(name: str) -> bool:
    with naming_the_base(name):
        config = AutoConfig.from_pretrained(name)
    return config.num_labels == 1 and any(
        "ForSequenceClassification" in architecture for architecture in config.architectures or ()
    )


def _load(name: str) -> tuple[Any, Any]:
    try:
        with naming_the_base(name), without_load_reports():  # a new head is expected where an encoder is named
            backbone = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
        head_module(backbone)
    except ValueError as error:  # the architecture is not a classifier, or its head lies elsewhere
        raise RewardModelError(
            f"--model {name!r} cannot be taken as a reward model or encoder ({str(error).splitlines()[0][:160]}); name one that "
            "AutoModelForSequenceClassification loads."
        ) from error
    return backbone.eval(), open_tokenizer(name)
