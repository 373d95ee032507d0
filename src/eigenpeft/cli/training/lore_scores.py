"""Rewards of a file's rows to their users: who is known, what is scored, the best of each user, and the table of it."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.table import Table

from eigenpeft.cli.row_results import SHOWN, shortened
from eigenpeft.cli.rows import feature_column
from eigenpeft.cli.training.comparisons import user_ids
from eigenpeft.errors import RewardModelError, UnknownUserError
from eigenpeft.report.markup import escape
from eigenpeft.reward import LowRankRewardModel
from eigenpeft.reward.artifact.model import Unknown

ALL_ALIKE = (
    "This model has one shared head: all users' rewards are the same. A fit with --n-basis 2 or more tells users apart."
)


def users_of(table: Dataset, user: str | None, user_column: str, *, path: Path) -> list[str]:
    """The user of each row.

    Args:
        table: Rows.
        user: One for all of them; None for their column.
        user_column: That column.
        path: Where the rows come from, for messages.

    Raises:
        RewardModelError: If there is no such column, or a row has no user.
    """
    if user is not None:
        return [user] * len(table)
    if user_column not in table.column_names:
        raise RewardModelError(
            f"{str(path)!r} has no column {user_column!r}, only {sorted(table.column_names)}; name one user for all rows with "
            "--user, or the users' column with --user-column."
        )
    return user_ids(table, user_column, path=path)


def check_known(model: LowRankRewardModel, users: list[str], *, otherwise: str) -> list[str]:
    """The users that the model does not know, each once; with a remedy, one is enough to refuse.

    Args:
        model: The reward model.
        users: User of each row.
        otherwise: What a command does for an unknown user, as the end of the message; empty where unknown users are taken.

    Raises:
        UnknownUserError: If one is unknown and `otherwise` is not empty.
    """
    unknown = [name for name in dict.fromkeys(users) if name not in model.users]
    if unknown and otherwise:
        more = f" (nor {'is' if len(unknown) == 2 else 'are'} {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UnknownUserError(
            f"{unknown[0]!r} is not among the {len(model.users)} users of this reward model{more}. Fit the weights from a few "
            f"comparisons with `eigenpeft lore add-user`, or {otherwise}."
        )
    return unknown


def rewards_of(
    model: LowRankRewardModel, table: Dataset, users: list[str], *, unknown: Unknown, path: Path
) -> list[float]:
    """The reward of each row's text, or features, to its user.

    Args:
        model: The reward model.
        table: Rows with completion, and perhaps prompt, or with features.
        users: User of each row.
        unknown: What an unknown user is.
        path: Where the rows come from, for messages.

    Raises:
        RewardModelError: If the rows have neither, or the model cannot embed text.
    """
    if "features" in table.column_names:
        features = torch.as_tensor(feature_column(table, "features", path)[:])
        return model.rewards(features, users, unknown=unknown).tolist()
    if "completion" not in table.column_names:
        raise RewardModelError(
            f"{str(path)!r} has the columns {sorted(table.column_names)}; texts to score are in one called completion, or "
            "embedded in one called features."
        )
    if model.backbone is None or model.processing_class is None:
        raise RewardModelError(
            "This model was fitted on features and has no backbone to embed text with: give rows with a column features, or fit "
            "it on text with `eigenpeft lore fit --model`."
        )
    completions = list(table["completion"])
    for row, value in enumerate(completions):
        if not isinstance(value, str | list) or not value:
            raise RewardModelError(
                f"Row {row} of {str(path)!r} has {value!r:.60} in its column 'completion'; it must be text or a list of messages."
            )
    prompts = (
        [
            prompt or ("" if isinstance(text, str) else [])
            for prompt, text in zip(table["prompt"], completions, strict=True)
        ]
        if "prompt" in table.column_names
        else None
    )
    reward = model.reward_func(user_column="user_id", unknown=unknown)
    return reward(completions=completions, prompts=prompts, user_id=users)


def best_of_each(rows: list[dict[str, Any]], top_k: int) -> list[dict[str, Any]]:
    """The rows with the highest rewards of each user, best first; users in the order in which they come.

    Args:
        rows: With user and reward.
        top_k: Rows per user.
    """
    by_user: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_user.setdefault(row["user"], []).append(row)
    return [row for own in by_user.values() for row in sorted(own, key=lambda one: -one["reward"])[:top_k]]


def score_table(rows: list[dict[str, Any]]) -> Table:
    """The first rows as a table.

    Args:
        rows: With row, user and reward, and completion where text was scored.
    """
    shown = Table(title=f"{len(rows)} rows, {len({row['user'] for row in rows})} users")
    for title in ("row", "text", "user", "reward"):
        shown.add_column(title, justify="right" if title in ("row", "reward") else "left")
    for row in rows[:SHOWN]:
        text = shortened(str(row["completion"])) if "completion" in row else "features"
        shown.add_row(str(row["row"]), text, escape(row["user"]), f"{row['reward']:.3f}")
    return shown
