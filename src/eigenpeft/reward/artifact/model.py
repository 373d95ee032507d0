"""The low-rank reward model: rewards by user, new users from their comparisons, ordinary heads for everything else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eigenpeft.errors import RewardModelError
from eigenpeft.linalg.preference.users import fit_all_user_weights, fit_user_weights, laplace_covariance, next_pair
from eigenpeft.reward.artifact.pairs import Features, index_users, pair_margins
from eigenpeft.reward.artifact.pretrained import RewardModelArtifact
from eigenpeft.reward.artifact.users import UserId
from eigenpeft.reward.text.backbone import with_head
from eigenpeft.reward.text.rewards import Text, TextReward, best_of_n

Unknown = Literal["error", "population"]


@dataclass(frozen=True, eq=False)
class UserPosterior:
    """What a history of comparisons says about its user.

    Attributes:
        user_weights: (n_basis,), the most probable ones.
        covariance: (n_basis, n_basis), of the Laplace approximation; its rows sum to zero.
        n_pairs: Size of the history.
    """

    user_weights: Tensor
    covariance: Tensor
    n_pairs: int


class LowRankRewardModel(RewardModelArtifact):
    """`r_u(x) = w_uᵀ R e(x)`: a reward basis R over features e(x), and weights w_u on the simplex for each user (LoRe).

    Made by `eigenpeft.reward.LoReFitter` from features or by `eigenpeft.trainers.LoReTrainer` from text; kept by
    `save_pretrained`. Adding, updating and removing users touches the table of users alone.

    Args:
        reward_basis: (n_basis, n_features).
        concentration: (n_basis,) Dirichlet pseudo-counts of the population: their direction is the weights of a user
            without history, their sum how many comparisons' worth that guess weighs. None: one pseudo-count, evenly.
        users: Weights of the known users; None starts without any.
        backbone: Sequence classifier (any number of labels) whose features the basis takes; None for features alone.
        processing_class: The backbone's tokenizer.
        info: Where the basis comes from, for the card; JSON-able.

    Raises:
        RewardModelError: If shapes disagree or values are not finite or not positive.

    Examples:
        >>> import torch
        >>> from eigenpeft import LowRankRewardModel
        >>> model = LowRankRewardModel(torch.eye(2))
        >>> chosen, rejected = torch.tensor([[9.0, 0.0]] * 3), torch.tensor([[0.0, 9.0]] * 3)
        >>> model.add_user("ada", chosen=chosen, rejected=rejected).n_pairs
        3
        >>> bool(model.rewards(chosen[:1], "ada") > model.rewards(rejected[:1], "ada"))
        True
        >>> model.reward_head()
        tensor([0.5000, 0.5000])
    """

    def user_weights(self, user_ids: Sequence[UserId], *, unknown: Unknown = "error") -> Tensor:
        """Weights of users, in the order asked.

        Args:
            user_ids: Ids.
            unknown: "error", or "population" to give unknown users its weights.

        Returns:
            (n, n_basis).

        Raises:
            UnknownUserError: If one is unknown and `unknown` is "error".
            RewardModelError: If `unknown` is neither "error" nor "population", or an id is empty, too long or of another type.
        """
        if unknown not in ("error", "population"):
            raise RewardModelError(f'unknown={unknown!r} must be "error" or "population".')
        return self.users.user_weights(user_ids, unknown=self.population_weights if unknown == "population" else None)

    def reward_head(self, user_id: UserId | None = None) -> Tensor:
        """`Rᵀ w_u`, an ordinary scalar reward head.

        Args:
            user_id: A known user; None gives the population's head.

        Returns:
            (n_features,).

        Raises:
            RewardModelError: If the id is empty, too long or of another type.
            UnknownUserError: If the user is not known.
        """
        weights = self.population_weights if user_id is None else self.user_weights([user_id])[0]
        return weights @ self.reward_basis

    def basis_rewards(self, features: Tensor) -> Tensor:
        """Reward of every text under every row of the basis.

        Args:
            features: (n, n_features).

        Returns:
            (n, n_basis).

        Raises:
            RewardModelError: If the width is another, or values are not finite.
        """
        features = torch.as_tensor(features).float().cpu()
        if features.ndim != 2 or features.shape[1] != self.n_features:
            raise RewardModelError(
                f"features of shape {tuple(features.shape)} must be (n, {self.n_features}), as the basis was fitted on."
            )
        if not bool(torch.isfinite(features).all()):
            bad = (~torch.isfinite(features).all(dim=1)).nonzero()[:, 0]
            raise RewardModelError(
                f"features of {len(bad)} texts are NaN or infinite, the first in row {int(bad[0])}; embed them again."
            )
        return features @ self.reward_basis.mT

    def rewards(
        self, features: Tensor, user_ids: UserId | Sequence[UserId] | None = None, *, unknown: Unknown = "error"
    ) -> Tensor:
        """Reward of each text to its user.

        Args:
            features: (n, n_features).
            user_ids: One id for all, or one for each; None for the population.
            unknown: "error", or "population" to reward unknown users' texts as the population would.

        Returns:
            (n,).

        Raises:
            UnknownUserError: If a user is unknown and `unknown` is "error".
            RewardModelError: If lengths or widths do not fit, values are not finite, `unknown` is neither "error" nor "population",
                or an id is empty, too long or of another type.
        """
        by_basis = self.basis_rewards(features)
        if user_ids is None:
            return by_basis @ self.population_weights
        if isinstance(user_ids, str | int):
            return by_basis @ self.user_weights([user_ids], unknown=unknown)[0]
        if len(user_ids) != len(by_basis):
            raise RewardModelError(
                f"{len(user_ids)} user_ids for {len(by_basis)} texts; give one each, or one for all."
            )
        return (by_basis * self.user_weights(user_ids, unknown=unknown)).sum(dim=1)

    def preference_probability(
        self,
        chosen: Tensor,
        rejected: Tensor,
        *,
        user_ids: UserId | Sequence[UserId] | None = None,
        unknown: Unknown = "error",
    ) -> Tensor:
        """Bradley-Terry probability that the user prefers the first of each pair.

        Args:
            chosen: (n, n_features).
            rejected: (n, n_features).
            user_ids: One id for all, or one for each; None for the population.
            unknown: As in `rewards`.

        Returns:
            (n,), between 0 and 1.

        Raises:
            RewardModelError: As `rewards`; `UnknownUserError` for users that are not known.
        """
        first, second = (self.rewards(side, user_ids, unknown=unknown) for side in (chosen, rejected))
        return torch.sigmoid(first - second)

    def posterior(self, chosen: Features, rejected: Features) -> UserPosterior:
        """Weights and their uncertainty from one user's comparisons; nothing is stored.

        Args:
            chosen: (n, n_features), n may be 0: the population.
            rejected: (n, n_features).

        Raises:
            RewardModelError: If shapes disagree or values are not finite.
        """
        margins = pair_margins(chosen, rejected, self.reward_basis)[None]
        present = torch.ones(margins.shape[:2], dtype=torch.bool)
        weights = fit_user_weights(margins, present, concentration=self.concentration)
        covariance = laplace_covariance(weights, margins, present, concentration=self.concentration)
        return UserPosterior(weights[0].float(), covariance[0].float(), margins.shape[1])

    def next_pair(self, posterior: UserPosterior, *, chosen: Features, rejected: Features) -> list[int]:
        """Candidate comparisons in the order in which an answer would teach most about the user.

        Args:
            posterior: From `posterior` on what the user answered so far.
            chosen: (n, n_features), first texts of the candidates.
            rejected: (n, n_features), second texts.

        Returns:
            Rows, best first.

        Raises:
            RewardModelError: If the candidates have another width than the basis, their two sides differ in number, or values are
                not finite.
        """
        candidates = pair_margins(chosen, rejected, self.reward_basis)
        return next_pair(posterior.user_weights, posterior.covariance, candidates=candidates).tolist()

    def add_user(self, user_id: UserId, *, chosen: Features, rejected: Features) -> UserPosterior:
        """Fit a new user's weights to comparisons and keep them.

        Args:
            user_id: Not yet known.
            chosen: (n, n_features); without rows the user gets the population's weights.
            rejected: (n, n_features).

        Raises:
            RewardModelError: If the user is known already, the comparisons are not well-formed, or the id is empty, too long or of
                another type.
        """
        if user_id in self.users:
            raise RewardModelError(
                f"The user {user_id!r} is known already; call update_user with the whole history, or remove_user first."
            )
        return self._put(user_id, chosen, rejected)

    def update_user(self, user_id: UserId, *, chosen: Features, rejected: Features) -> UserPosterior:
        """Fit a known user's weights again, to the whole history.

        Args:
            user_id: A known user.
            chosen: (n, n_features), all comparisons, old and new.
            rejected: (n, n_features).

        Raises:
            RewardModelError: If the comparisons are not well-formed, or the id is empty, too long or of another type.
            UnknownUserError: If the user is not known.
        """
        self.user_weights([user_id])
        return self._put(user_id, chosen, rejected)

    def remove_user(self, user_id: UserId) -> None:
        """Forget a user; `save_users` or `save_pretrained` makes the file forget too.

        Args:
            user_id: A known user.

        Raises:
            RewardModelError: If the id is empty, too long or of another type.
            UnknownUserError: If the user is not known.
        """
        self.users.remove(user_id)

    def fit_users(self, chosen: Features, rejected: Features, *, user_ids: Sequence[UserId]) -> "LowRankRewardModel":
        """Fit the weights of many users at once, replacing those of known ones; returns the model.

        Args:
            chosen: (n, n_features).
            rejected: (n, n_features).
            user_ids: User of each comparison, in any order.

        Raises:
            RewardModelError: If lengths or widths disagree, values are not finite, or an id is empty, too long or of another type.
        """
        margins = pair_margins(chosen, rejected, self.reward_basis)
        names, rows = index_users(user_ids, n_pairs=len(margins))
        return self.fit_users_by_margins(margins, names=names, rows=rows)

    def fit_users_by_margins(self, margins: Tensor, *, names: Sequence[UserId], rows: Tensor) -> "LowRankRewardModel":
        """`fit_users` where the margins of the comparisons under every row of the basis are known already.

        Args:
            margins: (n, n_basis).
            names: The users.
            rows: (n,) number of the user of each comparison.

        Raises:
            RewardModelError: If a user is named twice, or an id is empty, too long or of another type.
        """
        weights = fit_all_user_weights(margins, rows, n_users=len(names), concentration=self.concentration)
        self.users.put(names, user_weights=weights, n_pairs=torch.bincount(rows, minlength=len(names)).tolist())
        return self

    def to_sequence_classification(self, user_id: UserId | None = None) -> Any:
        """A stock one-label sequence classifier that rewards as the user would; needs no eigenpeft to load.

        Args:
            user_id: A known user; None for the population.

        Raises:
            RewardModelError: If the model has no backbone, or its head has another width.
            UnknownUserError: If the user is not known.
        """
        return with_head(self._backbone(), self.reward_head(user_id)[None])

    def reward_func(
        self,
        *,
        user_column: str = "user_id",
        unknown: Unknown = "error",
        batch_size: int = 8,
        max_length: int | None = None,
        end_token: bool = False,
    ) -> Callable[..., list[float]]:
        """A callable for TRL's `GRPOTrainer(reward_funcs=...)` that rewards each prompt as its own user would.

        Args:
            user_column: Column of the training set that names the user of each prompt.
            unknown: As in `rewards`.
            batch_size: Texts at a time.
            max_length: Longest text in tokens; longer ones lose their beginning. None: the tokenizer's own limit.
            end_token: Whether completions that are plain text get the tokenizer's end token, as `LoReTrainer` ends the
                texts that it trains on; `GRPOTrainer` passes them without.

        Raises:
            RewardModelError: If the model has no backbone or no tokenizer, or `unknown` is neither "error" nor "population".
        """
        return TextReward(
            self._backbone(),
            self.processing_class,
            lambda user_ids: self.user_weights(user_ids, unknown=unknown),
            user_column=user_column,
            batch_size=batch_size,
            max_length=max_length,
            end_token=end_token,
        )

    def best_of_n(
        self,
        prompts: Sequence[Text],
        candidates: Sequence[Sequence[Text]],
        *,
        user_ids: Sequence[UserId],
        unknown: Unknown = "error",
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> list[int]:
        """Re-rank sampled answers: which candidate of each prompt its user would like best.

        Args:
            prompts: Texts, or conversations.
            candidates: Completions of each prompt, at least one; their numbers may differ.
            user_ids: User of each prompt.
            unknown: As in `rewards`.
            batch_size: Texts at a time.
            max_length: As in `reward_func`.

        Returns:
            Index of the best candidate of each prompt; the first of equals.

        Raises:
            RewardModelError: If lengths disagree, a prompt has no candidate, the model has no backbone, or `unknown` is neither
                "error" nor "population".
            UnknownUserError: If a user is not known and `unknown="error"`.
        """
        reward = self.reward_func(user_column="user", unknown=unknown, batch_size=batch_size, max_length=max_length)
        return best_of_n(reward, prompts, candidates, users=user_ids)

    def _put(self, user_id: UserId, chosen: Features, rejected: Features) -> UserPosterior:
        found = self.posterior(chosen, rejected)
        self.users.put([user_id], user_weights=found.user_weights[None], n_pairs=[found.n_pairs])
        return found

    def _backbone(self) -> Any:
        if self.backbone is None:
            raise RewardModelError(
                "This reward model has no backbone, only a basis on features: pass backbone= when making it, or load it "
                "with load_backbone=True from a folder that holds one."
            )
        return self.backbone
