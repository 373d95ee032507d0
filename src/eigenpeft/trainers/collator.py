"""TRL's preference collator, which also carries the user of each comparison."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.trainer.reward_trainer import DataCollatorForPreference

UNKNOWN_ROW = -1


@dataclass
class DataCollatorForUserPreference(DataCollatorForPreference):
    """Pads as TRL does and adds `user_rows` (batch,): the number of each comparison's user, -1 for unknown ones.

    Args:
        pad_token_id: Token to pad with.
        user_rows: Number of each known user, by id as text.
        user_column: Column of the examples that holds the id.

    Examples:
        >>> from eigenpeft.trainers import DataCollatorForUserPreference
        >>> collator = DataCollatorForUserPreference(pad_token_id=0, user_rows={"ada": 0, "7": 1})
        >>> batch = collator([
        ...     {"chosen_ids": [1, 2], "rejected_ids": [3], "user_id": 7},
        ...     {"chosen_ids": [1], "rejected_ids": [4], "user_id": "eve"},
        ... ])
        >>> batch["user_rows"]
        tensor([ 1, -1])
    """

    user_rows: Mapping[str, int] = field(default_factory=dict)
    user_column: str = "user_id"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A padded batch.

        Args:
            examples: Tokenized comparisons with their users.
        """
        batch = super().torch_call(examples)
        rows = [self.user_rows.get(str(example[self.user_column]), UNKNOWN_ROW) for example in examples]
        batch["user_rows"] = torch.tensor(rows, dtype=torch.long)
        return batch
