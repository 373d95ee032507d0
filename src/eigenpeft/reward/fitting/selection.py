"""Choosing settings by held-out comparisons: the split, the judgement, the one-standard-error rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenpeft.linalg.preference.joint import JointFit
from eigenpeft.linalg.preference.objective import bradley_terry_nll, simplex
from eigenpeft.linalg.preference.users import fit_all_user_weights
from eigenpeft.linalg.scores.intervals import mean_error, share_error
from eigenpeft.reward.fitting.preparation import PreparedPairs
from eigenpeft.reward.fitting.splitting import draw_sides

# What a comparison is held out for.
TRAIN, SEEN, SHOTS, QUERIES, UNUSED = range(5)
_MIN_USERS_TO_HOLD_OUT = 10


@dataclass(frozen=True)
class Setting:
    """What a joint fit leaves open.

    Attributes:
        n_basis: Rows of the basis.
        shared_scale: Prior scale of the shared direction.
        deviation_scale: Prior scale of what differs between users.
        concentration: Dirichlet pseudo-counts of each user's weights.
    """

    n_basis: int
    shared_scale: float
    deviation_scale: float
    concentration: float


@dataclass(frozen=True, eq=False, kw_only=True)
class LoReCandidate:
    """One setting that was tried on held-out comparisons.

    Attributes:
        setting: The setting.
        strength: Sum of the concentration that served the held-out comparisons best.
        seen_nll: Mean negative log-likelihood of held-out comparisons of users the fit saw.
        seen_accuracy: Share of them in the right order.
        unseen_nll: The same for users it did not see, their weights fitted to the other half of their comparisons.
            NaN where there are too few users to hold some out.
        unseen_accuracy: Share of them in the right order.
        losses: (n_held_out,) negative log-likelihood of each held-out comparison, seen users first.
        n_seen: Held-out comparisons of users the fit saw.
    """

    setting: Setting
    strength: float
    seen_nll: float
    seen_accuracy: float
    unseen_nll: float
    unseen_accuracy: float
    losses: Tensor
    n_seen: int = 0

    @property
    def score(self) -> float:
        """What is compared: the mean loss over all held-out comparisons; NaN without any."""
        return float(self.losses.mean())

    @property
    def score_error(self) -> float:
        """Standard error of `score`; 0 with one comparison, NaN without any."""
        return _mean_and_error(self.losses)[1]

    @property
    def seen_accuracy_error(self) -> float:
        """Binomial standard error of `seen_accuracy`; NaN without such comparisons."""
        return share_error(self.seen_accuracy, self.n_seen)

    @property
    def unseen_accuracy_error(self) -> float:
        """Binomial standard error of `unseen_accuracy`; NaN without such comparisons."""
        return share_error(self.unseen_accuracy, len(self.losses) - self.n_seen)

    def worse_than(self, other: "LoReCandidate") -> tuple[float, float]:
        """Mean of the paired differences of the held-out losses, and its standard error; positive where `other` is better.

        Args:
            other: Tried on the same comparisons.
        """
        return _mean_and_error(self.losses - other.losses)

    def facts(self) -> dict[str, float | int | None]:
        """The candidate as JSON-able numbers."""
        numbers = {
            **vars(self.setting),
            "strength": self.strength,
            "n_held_out": len(self.losses),
            "loss": self.score,
            "loss_error": self.score_error,
            "seen_nll": self.seen_nll,
            "seen_accuracy": self.seen_accuracy,
            "unseen_nll": self.unseen_nll,
            "unseen_accuracy": self.unseen_accuracy,
        }
        return {name: value if value == value else None for name, value in numbers.items()}


def split_comparisons(
    rows: Tensor, n_users: int, *, text_ids: Tensor, prompt_ids: Sequence[Any] | None, held_out: float, seed: int
) -> Tensor:
    """Part of each comparison: train, held out of a seen user, or shots and queries of an unseen one.

    Args:
        rows: (n,) user of each comparison.
        n_users: Number of users; with fewer than ten none is held out.
        text_ids: (n, 2) of `same_texts`: no text stands on both sides.
        prompt_ids: Prompt of each comparison; those of one prompt are held out together. None: those that share texts.
        held_out: Share of prompts, and of users.
        seed: Seed of the draw.

    Returns:
        (n,) of TRAIN, SEEN, SHOTS, QUERIES or UNUSED.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = draw_sides(text_ids, prompt_ids=prompt_ids, share=held_out, generator=generator)
    held = sides.held
    split = torch.where(held, SEEN, TRAIN)
    if n_users >= _MIN_USERS_TO_HOLD_OUT:
        away = torch.randperm(n_users, generator=generator)[: max(1, round(held_out * n_users))]
        is_away = torch.zeros(n_users, dtype=torch.bool).index_fill_(0, away, True)[rows]
        # Queries of unseen users are on prompts or texts the fit did not train on, where any are shared.
        query = sides.draws < 0.5 if sides.by == "comparisons" else held
        split = torch.where(is_away, torch.where(query, QUERIES, SHOTS), split)
    split = torch.where(sides.used, split, UNUSED)
    trained = torch.zeros(n_users, dtype=torch.bool)
    trained[rows[split == TRAIN]] = True
    if not bool(trained.any()):
        return torch.full_like(split, TRAIN)
    # A user all of whose comparisons were held out is one without history.
    return torch.where((split == SEEN) & ~trained[rows], QUERIES, split)


def judge(
    setting: Setting,
    fit: Callable[[Setting, PreparedPairs, Tensor, int], JointFit],
    *,
    pairs: PreparedPairs,
    rows: Tensor,
    split: Tensor,
    strengths: Sequence[float],
) -> LoReCandidate:
    """Fit a setting to the training part and score it on the others.

    Args:
        setting: What to try.
        fit: `(setting, pairs, users, number of users) -> JointFit`.
        pairs: All comparisons.
        rows: (n,) user of each.
        split: (n,) part of each.
        strengths: Sums of the population's concentration to choose from, at least one.
    """
    n_users = int(rows.max()) + 1
    train = split == TRAIN
    known, compact = rows[train].unique(return_inverse=True)
    found = fit(setting, pairs.select(train), compact, len(known))
    by_basis = pairs.offsets[:, None] + pairs.differences @ found.deviations.mT
    population = simplex(found.user_logits).mean(dim=0)
    seen, queries, history = split == SEEN, split == QUERIES, train | (split == SHOTS)
    best = None
    for strength in strengths if len(population) > 1 else strengths[:1]:
        # As the finished model has them: the users' weights given the basis, under the population's prior.
        weights = fit_all_user_weights(
            by_basis[history], rows[history], n_users=n_users, concentration=population * strength
        ).float()
        parts = [_score(by_basis[mask], weights[rows[mask]]) for mask in (seen, queries)]
        losses = torch.cat([part[0] for part in parts])
        if best is None or float(losses.sum()) < float(best.losses.sum()):
            (seen_loss, seen_accuracy), (new_loss, new_accuracy) = parts
            best = LoReCandidate(
                setting=setting,
                strength=strength,
                seen_nll=float(seen_loss.mean()),
                seen_accuracy=seen_accuracy,
                unseen_nll=float(new_loss.mean()),
                unseen_accuracy=new_accuracy,
                losses=losses,
                n_seen=len(seen_loss),
            )
    assert best is not None
    return best


def choose(candidates: Sequence[LoReCandidate]) -> LoReCandidate:
    """The best candidate of the smallest basis that is not clearly worse than the best of all.

    A larger basis has to earn its rows: the one-standard-error rule of Breiman et al. (Classification and Regression
    Trees, 1984, section 3.4.3), on paired differences. One shared head is given two standard errors, as many candidates
    compete against it and the best of them is so by chance too.

    Args:
        candidates: At least one; those without held-out comparisons come last.
    """
    best = lowest_loss(candidates)
    if best is None:
        return candidates[0]
    scored = [candidate for candidate in candidates if len(candidate.losses)]
    good = []
    for candidate in scored:
        worse, error = candidate.worse_than(best)
        if worse <= (2 if candidate.setting.n_basis == 1 else 1) * error:
            good.append(candidate)
    smallest = min(candidate.setting.n_basis for candidate in good)
    return min((one for one in scored if one.setting.n_basis == smallest), key=lambda one: one.score)


def lowest_loss(candidates: Sequence[LoReCandidate]) -> LoReCandidate | None:
    """The candidate with the lowest mean loss over held-out comparisons; None where nothing was held out.

    Args:
        candidates: Tried on the same comparisons.
    """
    return min((one for one in candidates if len(one.losses)), key=lambda one: one.score, default=None)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error, which is 0 for a single value; both NaN without values."""
    if len(values) < 2:
        return (float(values[0]), 0.0) if len(values) else (float("nan"), float("nan"))
    return float(values.mean()), mean_error(values.tolist())


def _score(by_basis: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Negative log-likelihood of each comparison, and accuracy (ties count half)."""
    margins = (by_basis * weights).sum(dim=1)
    right = (margins > 0).float() + 0.5 * (margins == 0).float()
    return bradley_terry_nll(margins), float(right.mean())
