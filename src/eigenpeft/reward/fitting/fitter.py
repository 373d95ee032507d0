"""Fit a low-rank reward model to many users' comparisons: preparation, choice by held-out comparisons, restarts."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from eigenpeft.errors import RewardModelError
from eigenpeft.linalg.preference.joint import JointFit, fit_joint
from eigenpeft.linalg.preference.objective import JointPrior, simplex
from eigenpeft.reward.artifact.model import LowRankRewardModel
from eigenpeft.reward.artifact.pairs import Features, index_users
from eigenpeft.reward.artifact.users import UserId
from eigenpeft.reward.fitting.preparation import Preparation, PreparedPairs, prepare
from eigenpeft.reward.fitting.selection import LoReCandidate, Setting, choose, judge, lowest_loss, split_comparisons
from eigenpeft.reward.fitting.splitting import same_texts

logger = logging.getLogger(__name__)

AUTO_N_BASIS = (1, 2, 3, 5, 8)
AUTO_SHARED_SCALE = (0.5, 1.0, 2.0, 4.0, 8.0)
AUTO_DEVIATION_SCALE = (0.5, 1.0, 2.0, 4.0)
AUTO_CONCENTRATION = (1.0, 5.0, 20.0)
AUTO_STRENGTH = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class LoReFitter:
    """Maximum a posteriori fit of basis and user weights together, by the log posterior of `linalg.preference.joint_gradient`.

    The problem that LoRe calls collaborative ranking (Bose et al., arXiv 2504.14439):
    `min_{R, W} Σ_i -log σ(w_{u(i)}ᵀ R x_i)` with one basis R
    (n_basis, n_features) for all users and a row of W on the simplex for each. The abstract calls such rewards
    `r_u = w_uᵀ R e(x)` "weighted combinations of shared basis functions". The priors are ours.

    What `"auto"` settings leave open is chosen by held-out comparisons, of users the fit saw and of users it did not;
    then everything is fitted again on all comparisons. The same inputs and seed give the same model.

    Args:
        n_basis: Rows of the basis, or several to choose from; "auto" tries 1, 2, 3, 5 and 8. One row is one shared
            Bradley-Terry head: when that wins, personalisation does not pay.
        shared_scale: Prior standard deviation, in logits, of what the shared direction adds to a margin; "auto" tries
            0.5, 1, 2, 4 and 8 on a fit of one row.
        deviation_scale: The same for what each row adds to the shared direction, or several to choose from; "auto"
            tries 0.5, 1, 2 and 4.
        concentration: Dirichlet pseudo-counts of each user's weights during the fit; "auto" takes 1 while the others
            are chosen, then tries 5 and 20.
        strength: Sum of the population's concentration for new users; "auto" chooses it by held-out comparisons.
        n_components: Keep only this many leading directions of the differences; None keeps all. What makes features
            larger than memory, or very wide ones, feasible. The reference head is kept whole.
        standardize: Whether the prior is isotropic after each feature is divided by its root mean square.
        n_restarts: Starts of each fit; the most probable end is kept.
        max_iter: L-BFGS iterations of each fit.
        held_out: Share of comparisons, and of users, held out to choose by.
        prune: Drop rows that no known user weighs above this; 0 drops none.
        seed: Seed of everything random.

    Examples:
        >>> import torch
        >>> from eigenpeft.reward import LoReFitter
        >>> generator = torch.Generator().manual_seed(0)
        >>> chosen, rejected = torch.randn(2, 400, 4, generator=generator)
        >>> users = [f"user {i % 8}" for i in range(400)]
        >>> taste = torch.tensor([1.0 if i % 2 else -1.0 for i in range(400)])
        >>> swap = (chosen[:, 0] - rejected[:, 0]) * taste < 0  # odd users like feature 0, even ones dislike it
        >>> chosen[swap], rejected[swap] = rejected[swap], chosen[swap]
        >>> fitter = LoReFitter(n_basis=2, deviation_scale=2.0, strength=1.0).fit(chosen, rejected, user_ids=users)
        >>> heads = [fitter.model_.reward_head(user)[0] for user in ("user 1", "user 2")]
        >>> bool(heads[0] > 1 and heads[1] < -1)
        True
    """

    model_: LowRankRewardModel
    candidates_: list[LoReCandidate]
    chosen_: LoReCandidate | None

    def __init__(
        self,
        n_basis: int | Sequence[int] | Literal["auto"] = "auto",
        *,
        shared_scale: float | Literal["auto"] = "auto",
        deviation_scale: float | Sequence[float] | Literal["auto"] = "auto",
        concentration: float | Literal["auto"] = "auto",
        strength: float | Literal["auto"] = "auto",
        n_components: int | None = None,
        standardize: bool = True,
        n_restarts: int = 1,
        max_iter: int = 100,
        held_out: float = 0.2,
        prune: float = 0.0,
        seed: int = 0,
    ):
        self.n_basis = n_basis
        self.shared_scale = shared_scale
        self.deviation_scale = deviation_scale
        self.concentration = concentration
        self.strength = strength
        self.n_components = n_components
        self.standardize = standardize
        self.n_restarts = n_restarts
        self.max_iter = max_iter
        self.held_out = held_out
        self.prune = prune
        self.seed = seed

    def fit(
        self,
        chosen: Features,
        rejected: Features,
        *,
        user_ids: Sequence[UserId],
        prompt_ids: Sequence[Any] | None = None,
        text_ids: Tensor | None = None,
        reference_head: Tensor | None = None,
        backbone: Any = None,
        processing_class: Any = None,
        base_model: str | None = None,
    ) -> "LoReFitter":
        """Fit to comparisons; `model_` is the reward model, `candidates_` what was tried, `chosen_` the one taken. Returns self.

        Args:
            chosen: (n, n_features): tensor, array, memory map or `datasets` column; read in parts.
            rejected: (n, n_features).
            user_ids: User of each comparison.
            prompt_ids: Prompt of each comparison: those of one prompt are held out together. None: those that share texts.
            text_ids: (n, 2) numbers of the chosen and the rejected text; no text stands on both sides of the split by which
                settings are chosen. None: equal rows of features are one text.
            reference_head: (n_features,) of a scalar reward model on these features, which the basis is regularised
                towards (its scale is fitted). None: zero.
            backbone: The classifier the features come from, to be kept in the model.
            processing_class: Its tokenizer.
            base_model: Name of the backbone for the card.

        Raises:
            RewardModelError: If a setting, a shape or a value cannot be used; the message names it.
        """
        self._check()
        if not len(chosen):
            raise RewardModelError("There are no comparisons to fit to; pass at least one pair.")
        names, rows = index_users(user_ids, n_pairs=len(chosen))
        if prompt_ids is not None and len(prompt_ids) != len(chosen):
            raise RewardModelError(
                f"{len(prompt_ids)} prompt_ids for {len(chosen)} pairs; give the prompt of each pair."
            )
        self._check_sizes(len(names))
        pairs = prepare(
            chosen,
            rejected,
            reference_head=reference_head,
            n_components=self.n_components,
            standardize=self.standardize,
            seed=self.seed,
        )
        text_ids = same_texts(chosen, rejected) if text_ids is None else text_ids
        setting, strength = self._choose(pairs, rows, n_users=len(names), text_ids=text_ids, prompt_ids=prompt_ids)
        found = self._fit_joint(setting, pairs, rows, len(names))
        kept, weights = self._pruned(simplex(found.user_logits))
        reward_basis = pairs.preparation.restore(found.deviations[kept])
        info = {
            "base_model": base_model,
            "n_pairs": len(chosen),
            "n_users_fitted": len(names),
            **vars(setting),
            "strength": strength,
            "n_components": self.n_components,
            "seed": self.seed,
            "converged": found.converged,
            "candidates": [{**one.facts(), "chosen": one is self.chosen_} for one in self.candidates_],
        }
        model = LowRankRewardModel(
            reward_basis,
            concentration=weights.mean(dim=0) * strength,
            backbone=backbone,
            processing_class=processing_class,
            info=info,
        )
        margins = pairs.offsets[:, None] + pairs.differences @ found.deviations[kept].mT
        self.model_ = model.fit_users_by_margins(margins, names=names, rows=rows)
        return self

    def fit_users(self, chosen: Features, rejected: Features, *, user_ids: Sequence[UserId]) -> "LoReFitter":
        """Fit the weights of new users, or of known ones anew, with the basis as it is; returns self.

        Args:
            chosen: (n, n_features).
            rejected: (n, n_features).
            user_ids: User of each comparison.

        Raises:
            RewardModelError: If `fit` was not called, shapes do not fit, values are not finite, or an id is empty, too long or of
                another type.
        """
        if not hasattr(self, "model_"):
            raise RewardModelError("There is no basis yet: call fit on the known users' comparisons first.")
        self.model_.fit_users(chosen, rejected, user_ids=user_ids)
        return self

    def _check(self) -> None:
        positive = {
            "n_restarts": self.n_restarts,
            "max_iter": self.max_iter,
        }
        for name in ("strength", "shared_scale", "concentration"):
            if getattr(self, name) != "auto":
                positive[name] = getattr(self, name)
        for name, value in positive.items():
            if not _is_number(value) or not value > 0:
                raise RewardModelError(f"{name}={value!r} must be positive.")
        if not _is_number(self.held_out) or not 0 < self.held_out < 1:
            raise RewardModelError(f"held_out={self.held_out!r} must be a share between 0 and 1, such as 0.2.")
        if not _is_number(self.prune) or not 0 <= self.prune < 1:
            raise RewardModelError(f"prune={self.prune!r} must be 0 or a weight below 1, such as 0.01.")
        for name in ("n_restarts", "max_iter", "seed"):
            if not _is_whole(getattr(self, name)):
                raise RewardModelError(f"{name}={getattr(self, name)!r} must be a whole number.")
        if self.n_components is not None and not (_is_whole(self.n_components) and self.n_components > 0):
            raise RewardModelError(f"n_components={self.n_components!r} must be None or a whole number of at least 1.")
        sizes = [self.n_basis] if _is_whole(self.n_basis) else self.n_basis
        if sizes != "auto" and (
            isinstance(sizes, str) or not isinstance(sizes, Sequence) or not all(map(_is_whole, sizes))
        ):
            raise RewardModelError(
                f'n_basis={self.n_basis!r} must be a whole number such as 5, several of them, or "auto".'
            )
        scales = [self.deviation_scale] if _is_number(self.deviation_scale) else self.deviation_scale
        if scales != "auto" and (
            isinstance(scales, str) or not isinstance(scales, Sequence) or not all(map(_is_number, scales))
        ):
            raise RewardModelError(
                f'deviation_scale={self.deviation_scale!r} must be a positive number, several of them, or "auto".'
            )

    def _check_sizes(self, n_users: int) -> None:
        sizes, scales = self._sizes(n_users), self._scales()
        if not sizes or min(sizes) < 1 or max(sizes) > n_users:
            raise RewardModelError(
                f"n_basis={self.n_basis!r} must be from 1 to the number of users, {n_users} here: a basis with more rows "
                'than users is not determined. Pass n_basis=1 for one shared head, or "auto".'
            )
        if not scales or min(scales) <= 0:
            raise RewardModelError(f"deviation_scale={self.deviation_scale!r} must be positive.")

    def _sizes(self, n_users: int) -> list[int]:
        if self.n_basis == "auto":
            return [size for size in AUTO_N_BASIS if size <= n_users]
        return (
            [self.n_basis]
            if isinstance(self.n_basis, int)
            else [size for size in self.n_basis if isinstance(size, int)]
        )

    def _scales(self) -> list[float]:
        if self.deviation_scale == "auto":
            return list(AUTO_DEVIATION_SCALE)
        if isinstance(self.deviation_scale, int | float):
            return [float(self.deviation_scale)]
        return [float(scale) for scale in self.deviation_scale]

    def _choose(
        self, pairs: PreparedPairs, rows: Tensor, *, n_users: int, text_ids: Tensor, prompt_ids: Sequence[Any] | None
    ) -> tuple[Setting, float]:
        """The setting and the strength of the population: as given, or by held-out comparisons."""
        self.candidates_, self.chosen_ = [], None
        sizes, scales = self._sizes(n_users), self._scales()
        counts = AUTO_CONCENTRATION if self.concentration == "auto" else (float(self.concentration),)
        strengths = AUTO_STRENGTH if self.strength == "auto" else (float(self.strength),)
        split = split_comparisons(
            rows, n_users, text_ids=text_ids, prompt_ids=prompt_ids, held_out=self.held_out, seed=self.seed
        )

        def tried(settings: list[Setting]) -> list[LoReCandidate]:
            bar = tqdm(settings, desc="Choosing by held-out comparisons", disable=len(settings) < 5)
            return [
                judge(one, self._fit_joint, pairs=pairs, rows=rows, split=split, strengths=strengths) for one in bar
            ]

        if self.shared_scale == "auto":
            self.candidates_ = tried([Setting(1, shared, scales[0], counts[0]) for shared in AUTO_SHARED_SCALE])
            best = lowest_loss(self.candidates_) or self.candidates_[0]
            shared_scale = best.setting.shared_scale
            self.candidates_ = [best] if 1 in sizes else []
        else:
            shared_scale = float(self.shared_scale)
            self.candidates_ = (
                tried([Setting(1, shared_scale, scales[0], counts[0])]) if 1 in sizes and len(sizes) > 1 else []
            )
        settings = [Setting(size, shared_scale, scale, counts[0]) for size in sizes if size > 1 for scale in scales]
        open_too = bool(settings) and (self.strength == "auto" or len(counts) > 1)
        if not open_too and len(self.candidates_) + len(settings) < 2:
            return settings[0] if settings else Setting(1, shared_scale, scales[0], counts[0]), strengths[0]
        self.candidates_ += tried(settings)
        best = choose(self.candidates_)
        if best.setting.n_basis > 1:
            more = tried([replace(best.setting, concentration=count) for count in counts[1:]])
            self.candidates_ += more
            best = lowest_loss([best, *more]) or best
        self.chosen_ = best
        return best.setting, best.strength

    def _prior(self, preparation: Preparation, setting: Setting) -> JointPrior:
        # A direction drawn from the prior makes margins of the given standard deviation on these differences.
        return JointPrior(
            preparation.total_variance / setting.shared_scale**2,
            preparation.total_variance / setting.deviation_scale**2,
            setting.concentration,
        )

    def _fit_joint(self, setting: Setting, pairs: PreparedPairs, rows: Tensor, n_users: int) -> JointFit:
        generator = torch.Generator().manual_seed(self.seed)
        fits = [
            fit_joint(
                pairs.differences,
                rows,
                n_users=n_users,
                n_basis=setting.n_basis,
                offsets=pairs.offsets,
                prior=self._prior(pairs.preparation, setting),
                generator=generator,
                max_iter=self.max_iter,
            )
            for _ in range(self.n_restarts if setting.n_basis > 1 else 1)
        ]
        best = min(fits, key=lambda fit: fit.value)
        if not best.converged:
            logger.info("The fit stopped at max_iter=%d before it converged.", self.max_iter)
        return best

    def _pruned(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        largest = weights.amax(dim=0)
        kept = largest >= min(self.prune, float(largest.max()))
        if not bool(kept.all()):
            logger.info(
                "Dropped %d of %d basis rows: no user weighs them %g.", int((~kept).sum()), len(kept), self.prune
            )
        left = weights[:, kept]
        return kept, left / left.sum(dim=1, keepdim=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # not NaN


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
