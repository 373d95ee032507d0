"""Does personalisation pay: a low-rank reward model beside its controls, on users and prompts it did not see."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eigenpeft.linalg.preference.calibration import ReliabilityCurve, calibration
from eigenpeft.linalg.preference.users import fit_all_user_weights
from eigenpeft.reward.artifact.model import LowRankRewardModel
from eigenpeft.reward.artifact.pairs import Features, difference_chunks, index_users
from eigenpeft.reward.artifact.users import UserId
from eigenpeft.reward.evaluation.controls import choose_scale, user_heads
from eigenpeft.reward.evaluation.intervals import Bootstrap, Share
from eigenpeft.reward.evaluation.parts import Parts
from eigenpeft.reward.evaluation.user_encoder import encoded_heads
from eigenpeft.reward.evaluation.verdict import verdict
from eigenpeft.reward.fitting.fitter import LoReFitter
from eigenpeft.reward.fitting.selection import lowest_loss
from eigenpeft.reward.fitting.splitting import same_texts

SHOTS = (0, 1, 2, 5, 10, 20, 50)
_PERSONAL = ("head per user", "head per user, from the shared one", "user encoder")
QUADRANTS = ("seen users, training comparisons", "seen users, new prompts", "new users, new prompts")


@dataclass(frozen=True, kw_only=True)
class LoReEvaluation:
    """What `evaluate_lore` found.

    Where the fit chose one shared head among bases of several sizes, "LoRe" and "shared head" are the same, and what
    personalisation would bring is in `best_personal`.

    Attributes:
        accuracy: Share by quadrant, by method.
        gain_over_shared: LoRe minus the shared head, by quadrant.
        gain_over_population: LoRe minus LoRe with everybody's weights the population's, by quadrant: what a better shared
            direction brings is not counted as personalisation.
        few_shot: Share by number of comparisons a new user gave, by method.
        few_shot_gain: LoRe minus LoRe's population, by number of comparisons.
        calibration: Predicted against observed shares for new users and prompts, by method that predicts probabilities.
        n_basis: Size of the basis.
        split: What was held out: "comparisons", "prompts", "groups that share texts" or "texts".
        n_unused: Comparisons left out because a text of theirs stands on both sides.
        verdict: The findings in a few sentences.
        best_personal: Where the fit chose one shared head among others: the same evaluation of the candidate with several
            rows whose held-out loss was lowest, which the verdict judges then. Else None.
    """

    accuracy: dict[str, dict[str, Share]]
    gain_over_shared: dict[str, Share]
    gain_over_population: dict[str, Share]
    few_shot: dict[str, dict[int, Share]]
    few_shot_gain: dict[int, Share]
    calibration: dict[str, ReliabilityCurve]
    n_basis: int
    split: str
    n_unused: int
    verdict: str
    best_personal: "LoReEvaluation | None" = None

    @property
    def held_out(self) -> str:
        """What no fit saw, in a word: "prompts", "comparisons" or "texts"."""
        return self.split if self.split in ("prompts", "comparisons") else "texts"

    @property
    def gain(self) -> dict[str, Share]:
        """By quadrant the smaller of both gains: what personalisation adds to the better population."""
        return {
            quadrant: min(share, self.gain_over_population[quadrant], key=lambda one: one.mean)
            for quadrant, share in self.gain_over_shared.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able numbers."""
        return asdict(self)


def evaluate_lore(
    chosen: Features,
    rejected: Features,
    *,
    user_ids: Sequence[UserId],
    prompt_ids: Sequence[Any] | None = None,
    reference_head: Tensor | None = None,
    true_margins: Tensor | None = None,
    fitter: LoReFitter | None = None,
    shots: Sequence[int] = SHOTS,
    held_out_users: float = 0.3,
    held_out_prompts: float = 0.3,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> LoReEvaluation:
    """Fit LoRe and its controls to some users' comparisons on some prompts, and ask about the others.

    Controls: the reference head; one Bradley-Terry head shared by all; a head for each user alone, from the reference
    and from the shared head (scales chosen by held-out comparisons, as LoRe's settings are); an encoder that reads a
    user's comparisons (VPL-style, on the shared head). New users are fitted from
    their comparisons on the training prompts, and asked about the held-out prompts.

    Args:
        chosen: (n, n_features).
        rejected: (n, n_features).
        user_ids: User of each comparison.
        prompt_ids: Prompt of each comparison; None: each its own.
        reference_head: (n_features,) of a scalar reward model, or None.
        true_margins: (n,) where the true reward is known: the oracle's row.
        fitter: Settings of the fit; None chooses everything.
        shots: Numbers of comparisons of the few-shot curve; its users are those who have the most of them.
        held_out_users: Share of users held out.
        held_out_prompts: Share of prompts held out.
        n_bootstrap: Draws of users for the intervals.
        seed: Seed of split, shots and bootstrap.

    Raises:
        RewardModelError: If there are too few users or comparisons to hold any out.

    Examples:
        >>> from eigenpeft.reward import SimulatedUsers
        >>> users = SimulatedUsers(n_users=30, n_features=8, n_basis=2, seed=0)
        >>> pairs = users.pairs(20, seed=1)
        >>> fitter = LoReFitter(n_basis=2, max_iter=20, n_restarts=1)
        >>> found = evaluate_lore(pairs.chosen, pairs.rejected, user_ids=pairs.user_ids, fitter=fitter, n_bootstrap=20)
        >>> found.n_basis
        2
    """
    names, rows = index_users(user_ids, n_pairs=len(chosen))
    differences = torch.cat([part for _, part in difference_chunks(chosen, rejected)])
    text_ids = same_texts(chosen, rejected)
    parts = Parts.draw(
        rows,
        n_users=len(names),
        text_ids=text_ids,
        prompt_ids=prompt_ids,
        users=held_out_users,
        prompts=held_out_prompts,
        seed=seed,
    )
    nothing = torch.zeros(1, 1).expand_as(differences)
    fitter = fitter if fitter is not None else LoReFitter(seed=seed)
    train = parts.train
    keywords = {
        "user_ids": rows[train].tolist(),
        "prompt_ids": None if prompt_ids is None else [prompt_ids[i] for i in train.nonzero()[:, 0].tolist()],
        "text_ids": text_ids[train],
        "reference_head": reference_head,
    }
    pairs = (differences[train], nothing[train])
    lore = fitter.fit(*pairs, **keywords).model_
    shared = LoReFitter(n_basis=1, seed=seed).fit(*pairs, **keywords).model_.reward_basis[0]
    controls = _control_margins(
        differences, rows=rows, parts=parts, shared=shared, reference_head=reference_head, n_users=len(names), seed=seed
    )
    oracle = {} if true_margins is None else {"oracle": true_margins}
    draws = Bootstrap(rows, n_users=len(names), n_bootstrap=n_bootstrap, seed=seed)

    def judged(model: LowRankRewardModel) -> LoReEvaluation:
        margins = controls | _lore_margins(differences, rows=rows, parts=parts, lore=model, n_users=len(names)) | oracle
        curve = _few_shot(
            differences, rows=rows, parts=parts, lore=model, shared=shared, shots=shots, draws=draws, seed=seed
        )
        return _evaluation(margins, parts=parts, draws=draws, curve=curve, n_basis=model.n_basis, chosen=lore.n_basis)

    found, personal = judged(lore), _best_personal(fitter)
    if personal is None:
        return found
    best = judged(personal.fit(*pairs, **keywords).model_)
    return replace(found, best_personal=best, verdict=best.verdict)


def _best_personal(fitter: LoReFitter) -> LoReFitter | None:
    """A fitter of the best candidate with several rows, where the fit chose one row among others; else None."""
    several = [one for one in fitter.candidates_ if one.setting.n_basis > 1]
    if fitter.model_.n_basis > 1 or not several:
        return None
    best = lowest_loss(several) or several[0]
    fixed = copy.copy(fitter)
    for name, value in {**vars(best.setting), "strength": best.strength}.items():
        setattr(fixed, name, value)
    return fixed


def _evaluation(
    margins: dict[str, Tensor],
    *,
    parts: Parts,
    draws: Bootstrap,
    curve: tuple[dict[str, dict[int, Share]], dict[int, Share]],
    n_basis: int,
    chosen: int,
) -> LoReEvaluation:
    """Shares, gains, calibration and verdict from the margins of every method."""
    masks = dict(zip(QUADRANTS, (parts.train, parts.seen, parts.queries), strict=True))
    accuracy = {
        method: {quadrant: draws.share(values, mask=mask) for quadrant, mask in masks.items()}
        for method, values in margins.items()
    }
    over_shared, over_population = (
        {quadrant: draws.gain(margins["LoRe"], others=margins[other], mask=mask) for quadrant, mask in masks.items()}
        for other in ("shared head", "LoRe, population")
    )
    calibrated = {
        method: calibration(margins[method], parts.queries) for method in ("shared head", "LoRe, population", "LoRe")
    }
    n_unused = len(draws.rows) - sum(int(mask.sum()) for mask in parts.masks.values())
    few_shot, few_shot_gain = curve
    found = LoReEvaluation(
        accuracy=accuracy,
        gain_over_shared=over_shared,
        gain_over_population=over_population,
        few_shot=few_shot,
        few_shot_gain=few_shot_gain,
        calibration=calibrated,
        n_basis=n_basis,
        split=parts.by,
        n_unused=n_unused,
        verdict="",
    )
    known, new = (found.gain[quadrant] for quadrant in QUADRANTS[1:])
    other = max(_PERSONAL, key=lambda name: accuracy[name][QUADRANTS[1]].mean)
    said = verdict(
        known,
        new,
        n_basis=n_basis,
        chosen=chosen,
        split=found.split,
        n_unused=n_unused,
        other=(other, draws.gain(margins[other], others=margins["LoRe"], mask=parts.seen)),
    )
    return replace(found, verdict=said)


def _control_margins(
    differences: Tensor,
    *,
    rows: Tensor,
    parts: Parts,
    shared: Tensor,
    reference_head: Tensor | None,
    n_users: int,
    seed: int,
) -> dict[str, Tensor]:
    """Margins of every comparison under every control; users are fitted to `train` and `pool`."""
    fitted = parts.train | parts.pool
    margins = {} if reference_head is None else {"reference head": differences @ reference_head.float()}
    margins["shared head"] = differences @ shared
    total_variance = float(differences[parts.train].square().mean(dim=0).sum())
    start = torch.zeros_like(shared) if reference_head is None else reference_head.float()
    for name, head in (("head per user", start), ("head per user, from the shared one", shared)):
        options = {"n_users": n_users, "start": head, "total_variance": total_variance}
        scale = choose_scale(differences[parts.train], rows[parts.train], seed=seed, **options)
        heads = user_heads(differences[fitted], rows[fitted], scale=scale, **options)
        margins[name] = (differences * heads[rows]).sum(dim=1)
    heads = encoded_heads(
        differences, rows, train=parts.train, fitted=fitted, shared=shared, n_users=n_users, seed=seed
    )
    margins["user encoder"] = (differences * heads[rows]).sum(dim=1)
    return margins


def _lore_margins(
    differences: Tensor, *, rows: Tensor, parts: Parts, lore: LowRankRewardModel, n_users: int
) -> dict[str, Tensor]:
    """Margins of every comparison under LoRe and its population; users are fitted to `train` and `pool`."""
    fitted = parts.train | parts.pool
    by_basis = differences @ lore.reward_basis.mT
    weights = fit_all_user_weights(
        by_basis[fitted], rows[fitted], n_users=n_users, concentration=lore.concentration
    ).float()
    return {
        "LoRe, population": differences @ lore.reward_head(),
        "LoRe": (by_basis * weights[rows]).sum(dim=1),
    }


def _few_shot(
    differences: Tensor,
    *,
    rows: Tensor,
    parts: Parts,
    lore: LowRankRewardModel,
    shared: Tensor,
    shots: Sequence[int],
    draws: Bootstrap,
    seed: int,
) -> tuple[dict[str, dict[int, Share]], dict[int, Share]]:
    """Accuracy on the queries of new users by number of comparisons, on the users who have the largest number."""
    n_users = draws.n_users
    generator = torch.Generator().manual_seed(seed + 1)
    order = torch.rand(len(rows), generator=generator)
    pool = parts.pool.nonzero()[:, 0]
    pool = pool[order[pool].argsort()]
    pool = pool[rows[pool].argsort(stable=True)]  # by user, in random order
    counts = torch.bincount(rows[pool], minlength=n_users)
    first = (counts.cumsum(0) - counts)[rows[pool]]
    rank = torch.arange(len(pool)) - first
    usable = [n for n in shots if n <= int(counts.max())]
    enough = counts >= max(usable, default=0)
    asked = parts.queries & enough[rows]
    by_basis = differences @ lore.reward_basis.mT
    curve: dict[str, dict[int, Share]] = {"shared head": {}, "LoRe": {}}
    gain: dict[int, Share] = {}
    for n in usable:
        mine = pool[rank < n]
        weights = fit_all_user_weights(
            by_basis[mine], rows[mine], n_users=n_users, concentration=lore.concentration
        ).float()
        personal, common = (by_basis * weights[rows]).sum(dim=1), differences @ shared
        curve["LoRe"][n] = draws.share(personal, mask=asked)
        curve["shared head"][n] = draws.share(common, mask=asked)
        gain[n] = draws.gain(personal, others=differences @ lore.reward_head(), mask=asked)
    return curve, gain
