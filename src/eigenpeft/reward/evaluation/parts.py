"""Which comparisons an evaluation fits to, and which it asks about: some users and some prompts are held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenpeft.errors import RewardModelError
from eigenpeft.reward.fitting.splitting import By, draw_sides


@dataclass(frozen=True, eq=False)
class Parts:
    """Masks over the comparisons.

    Attributes:
        train: (n,) of known users, to fit to.
        seen: (n,) of known users, to ask about.
        pool: (n,) of new users, to fit their weights to.
        queries: (n,) of new users, to ask about.
        by: What was held out.
    """

    train: Tensor
    seen: Tensor
    pool: Tensor
    queries: Tensor
    by: By

    @property
    def masks(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {"train": self.train, "seen": self.seen, "pool": self.pool, "queries": self.queries}

    @staticmethod
    def draw(
        rows: Tensor,
        *,
        n_users: int,
        text_ids: Tensor,
        prompt_ids: Sequence[Any] | None,
        users: float,
        prompts: float,
        seed: int,
    ) -> "Parts":
        """Draw users and prompts.

        Args:
            rows: (n,) user of each comparison.
            n_users: How many there are.
            text_ids: (n, 2) of `same_texts`.
            prompt_ids: Prompt of each comparison, or None.
            users: Share of users held out.
            prompts: Share of prompts held out.
            seed: Seed of the draw.

        Raises:
            RewardModelError: If a part is empty.
        """
        generator = torch.Generator().manual_seed(seed)
        sides = draw_sides(text_ids, prompt_ids=prompt_ids, share=prompts, generator=generator)
        new = torch.zeros(n_users, dtype=torch.bool)
        new[torch.randperm(n_users, generator=generator)[: round(users * n_users)]] = True
        new_user, held, trained = new[rows], sides.held & sides.used, ~sides.held & sides.used
        parts = Parts(~new_user & trained, ~new_user & held, new_user & trained, new_user & held, sides.by)
        for what, mask in parts.masks.items():
            if not bool(mask.any()):
                raise RewardModelError(
                    f"Nothing is left for the part {what!r} of {len(rows)} comparisons by {n_users} users, with shares of "
                    f"{users:g} of the users and {prompts:g} of the {sides.by} held out; evaluation needs a few dozen users "
                    "with a few dozen comparisons each, on texts that are not all the same."
                )
        return parts
