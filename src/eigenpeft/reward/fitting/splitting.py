"""Which comparisons are held out: no prompt and no text stands on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eigenpeft.reward.artifact.pairs import Features, read_rows

# A group of comparisons that share texts is held out whole, up to this share of all; larger ones are split by text.
LARGEST_GROUP = 0.2
# Where single texts are drawn, this share of them: a comparison is held out where both its texts are, one in six.
SHARE_OF_TEXTS = 0.4
CHUNK_ROWS = 4096

By = Literal["comparisons", "prompts", "groups that share texts", "texts"]


@dataclass(frozen=True, eq=False)
class Split:
    """A split of comparisons.

    Attributes:
        held: (n,) held out.
        used: (n,) on either side; the others would put a text on both.
        draws: (n,) uniform in [0, 1), one draw for all comparisons of a unit, for a further split.
        by: What was drawn.
    """

    held: Tensor
    used: Tensor
    draws: Tensor
    by: By


def same_texts(chosen: Features, rejected: Features) -> Tensor:
    """(n, 2) numbers of the texts on either side: equal rows of features have one number, rows of zeros have -1.

    Args:
        chosen: (n, n_features).
        rejected: (n, n_features).
    """
    keys = []
    for side in (chosen, rejected):
        parts, multipliers = [torch.empty(0, dtype=torch.long)], None
        for start in range(0, len(side), CHUNK_ROWS):
            rows = read_rows(side, start, min(start + CHUNK_ROWS, len(side))).contiguous()
            if multipliers is None:
                generator = torch.Generator().manual_seed(0)
                multipliers = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) * 2 + 1
            # A random linear function of the bits, modulo 2^64: two different rows have one key with probability 2^-63.
            key = (rows.view(torch.int32).long() * multipliers).sum(dim=1)
            parts.append(torch.where(rows.any(dim=1), key, 0))
        keys.append(torch.cat(parts))
    both = torch.stack(keys, dim=1)
    numbers = torch.unique(both, return_inverse=True)[1]
    return torch.where(both == 0, -1, numbers)


def draw_sides(
    text_ids: Tensor, *, prompt_ids: Sequence[Any] | None, share: float, generator: torch.Generator
) -> Split:
    """Draw what is held out.

    Whole prompts where they are known and not all one; else the groups of comparisons that are connected by common texts, each
    comparison alone where none is shared. Where one group holds more than a fifth of all, the texts themselves are drawn, a
    comparison is held out where both of its texts are, and one with a text on either side is left out.

    Args:
        text_ids: (n, 2) of `same_texts`.
        prompt_ids: Prompt of each comparison, or None.
        share: Share of the units that is held out.
        generator: Random generator of the draws.
    """
    n = len(text_ids)
    if prompt_ids is not None and len(set(prompt_ids)) > 1:
        numbers: dict[Any, int] = {}
        units = torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in prompt_ids], dtype=torch.long)
        by: By = "prompts"
    else:
        units = _groups(text_ids)
        by = "comparisons" if n == 0 or int(units.max()) + 1 == n else "groups that share texts"
    largest = int(torch.bincount(units).max()) if n else 0
    if by == "groups that share texts" and largest > LARGEST_GROUP * n:
        away = torch.rand(int(text_ids.max()) + 1, generator=generator) < SHARE_OF_TEXTS
        known = text_ids.clamp(min=0)
        first, second = away[known[:, 0]], away[known[:, 1]]
        first, second = (
            torch.where(text_ids[:, i] < 0, other, own) for i, own, other in ((0, first, second), (1, second, first))
        )
        return Split(first & second, first == second, torch.rand(n, generator=generator), "texts")
    draws = torch.rand(2, int(units.max()) + 1 if n else 0, generator=generator)
    held = (draws[0] < share)[units]
    # Different prompts may still share a text, such as "I do not know".
    trained = torch.zeros(int(text_ids.max()) + 2 if n else 1, dtype=torch.bool)
    trained[text_ids[~held] + 1] = True
    trained[0] = False
    seen = trained[text_ids + 1].any(dim=1)
    return Split(held, ~held | ~seen, draws[1][units], by)


def _groups(text_ids: Tensor) -> Tensor:
    """(n,) group of each comparison, in order of first appearance: those that are connected by common texts."""
    known = text_ids[text_ids >= 0]
    if len(torch.unique(known)) == len(known):
        return torch.arange(len(text_ids))
    parent = list(range(len(text_ids)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[int, int] = {}
    for i, pair in enumerate(text_ids.tolist()):
        for text in pair:
            if text >= 0:
                first = root(owner.setdefault(text, i))
                mine = root(i)
                parent[max(first, mine)] = min(first, mine)
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(root(i), len(numbers)) for i in range(len(text_ids))], dtype=torch.long)
