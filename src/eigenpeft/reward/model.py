"""The low-rank reward model: one reward basis, a few numbers a user, ordinary heads for everything else."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eigenpeft.errors import RewardModelError
from eigenpeft.linalg.preference_users import fit_all_user_weights, fit_user_weights, laplace_covariance, next_pair
from eigenpeft.reward import storage
from eigenpeft.reward.backbone import with_head
from eigenpeft.reward.card import reward_card
from eigenpeft.reward.pairs import Features, index_users, pair_margins
from eigenpeft.reward.text import Text, TextReward, best_of_n
from eigenpeft.reward.users import UserId, UserTable

Unknown = Literal["error", "population"]


@dataclass(frozen=True, eq=False)
class UserPosterior:
    """What a history of comparisons says about its user.

    Attributes:
        weights: (n_basis,), the most probable ones.
        covariance: (n_basis, n_basis), of the Laplace approximation; its rows sum to zero.
        n_pairs: Size of the history.
    """

    weights: Tensor
    covariance: Tensor
    n_pairs: int


class LowRankRewardModel:
    """`r_u(x) = w_uᵀ R e(x)`: a reward basis R over features e(x), and weights w_u on the simplex for each user (LoRe).

    Made by `eigenpeft.reward.LoReFitter` from features or by `eigenpeft.trainers.LoReTrainer` from text; kept by
    `save_pretrained`. Adding, updating and deleting users touches the table of users alone.

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

    def __init__(
        self,
        reward_basis: Tensor,
        *,
        concentration: Tensor | None = None,
        users: UserTable | None = None,
        backbone: Any = None,
        processing_class: Any = None,
        info: Mapping[str, Any] | None = None,
    ):
        basis = reward_basis.detach().cpu().float()
        if basis.ndim != 2 or not len(basis) or not bool(torch.isfinite(basis).all()):
            raise RewardModelError(
                f"reward_basis of shape {tuple(basis.shape)} must be a finite matrix (n_basis, n_features)."
            )
        if concentration is None:
            concentration = torch.full((len(basis),), 1 / len(basis))
        concentration = concentration.detach().cpu().float()
        if concentration.shape != (len(basis),) or not bool((concentration > 0).all()):
            raise RewardModelError(
                f"concentration {concentration.tolist()} must be {len(basis)} positive numbers, one a basis row."
            )
        self.reward_basis = basis
        self.concentration = concentration
        self.users = users if users is not None else UserTable(len(basis))
        self.backbone = None if backbone is None else with_head(backbone, basis)
        self.processing_class = processing_class
        self.info = dict(info or {})

    def __repr__(self) -> str:
        return (
            f"LowRankRewardModel(n_basis={self.n_basis}, n_features={self.n_features}, users={len(self.users)}, "
            f"backbone={type(self.backbone).__name__ if self.backbone is not None else None})"
        )

    @property
    def n_basis(self) -> int:
        """Rows of the basis, and length of a user's weights."""
        return len(self.reward_basis)

    @property
    def n_features(self) -> int:
        """Width of the features."""
        return self.reward_basis.shape[1]

    @property
    def population_weights(self) -> Tensor:
        """(n_basis,) weights of a user without history."""
        return self.concentration / self.concentration.sum()

    def user_weights(self, user_ids: Sequence[UserId], *, unknown: Unknown = "error") -> Tensor:
        """Weights of users, in the order asked.

        Args:
            user_ids: Ids.
            unknown: "error", or "population" to give unknown users its weights.

        Returns:
            (n, n_basis).

        Raises:
            UnknownUserError: If one is unknown and `unknown` is "error".
        """
        if unknown not in ("error", "population"):
            raise RewardModelError(f'unknown={unknown!r} must be "error" or "population".')
        return self.users.weights(user_ids, default=self.population_weights if unknown == "population" else None)

    def reward_head(self, user_id: UserId | None = None) -> Tensor:
        """`Rᵀ w_u`, an ordinary scalar reward head.

        Args:
            user_id: A known user; None gives the population's head.

        Returns:
            (n_features,).

        Raises:
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
            RewardModelError: If lengths or widths do not fit.
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
        """
        candidates = pair_margins(chosen, rejected, self.reward_basis)
        return next_pair(posterior.weights, posterior.covariance, candidates=candidates).tolist()

    def add_user(self, user_id: UserId, *, chosen: Features, rejected: Features) -> UserPosterior:
        """Fit a new user's weights to comparisons and keep them.

        Args:
            user_id: Not yet known.
            chosen: (n, n_features); without rows the user gets the population's weights.
            rejected: (n, n_features).

        Raises:
            RewardModelError: If the user is known already, or the comparisons are not well-formed.
        """
        if user_id in self.users:
            raise RewardModelError(
                f"The user {user_id!r} is known already; call update_user with the whole history, or delete_user first."
            )
        return self._put(user_id, chosen, rejected)

    def update_user(self, user_id: UserId, *, chosen: Features, rejected: Features) -> UserPosterior:
        """Fit a known user's weights again, to the whole history.

        Args:
            user_id: A known user.
            chosen: (n, n_features), all comparisons, old and new.
            rejected: (n, n_features).

        Raises:
            UnknownUserError: If the user is not known.
        """
        self.user_weights([user_id])
        return self._put(user_id, chosen, rejected)

    def delete_user(self, user_id: UserId) -> None:
        """Forget a user; `save_users` or `save_pretrained` makes the file forget too.

        Args:
            user_id: A known user.

        Raises:
            UnknownUserError: If the user is not known.
        """
        self.users.delete(user_id)

    def fit_users(self, chosen: Features, rejected: Features, *, user_ids: Sequence[UserId]) -> "LowRankRewardModel":
        """Fit the weights of many users at once, replacing those of known ones; returns the model.

        Args:
            chosen: (n, n_features).
            rejected: (n, n_features).
            user_ids: User of each comparison, in any order.

        Raises:
            RewardModelError: If lengths disagree or values are not finite.
        """
        margins = pair_margins(chosen, rejected, self.reward_basis)
        names, rows = index_users(user_ids, n_pairs=len(margins))
        weights = fit_all_user_weights(margins, rows, n_users=len(names), concentration=self.concentration)
        self.users.put(names, weights, torch.bincount(rows, minlength=len(names)).tolist())
        return self

    def to_sequence_classification(self, user_id: UserId | None = None) -> Any:
        """A stock one-label sequence classifier that rewards as the user would; needs no eigenpeft to load.

        Args:
            user_id: A known user; None for the population.

        Raises:
            RewardModelError: If the model has no backbone.
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
    ) -> Callable[..., list[float]]:
        """A callable for TRL's `GRPOTrainer(reward_funcs=...)` that rewards each prompt as its own user would.

        Args:
            user_column: Column of the training set that names the user of each prompt.
            unknown: As in `rewards`.
            batch_size: Texts at a time.
            max_length: Longest text in tokens; longer ones lose their beginning. None: the tokenizer's own limit.

        Raises:
            RewardModelError: If the model has no backbone or no tokenizer.
        """
        return TextReward(
            self._backbone(),
            self.processing_class,
            lambda user_ids: self.user_weights(user_ids, unknown=unknown),
            user_column=user_column,
            batch_size=batch_size,
            max_length=max_length,
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
            RewardModelError: If lengths disagree, a prompt has no candidate, or the model has no backbone.
            UnknownUserError: If a user is not known and `unknown="error"`.
        """
        reward = self.reward_func(user_column="user", unknown=unknown, batch_size=batch_size, max_length=max_length)
        return best_of_n(reward, prompts, candidates, users=user_ids)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the model, its users and a card; with a backbone, as a stock classifier of n_basis labels besides.

        Args:
            save_directory: Folder to make or to update; whole or not at all.

        Raises:
            ArtifactError: If it cannot be written.
        """
        storage.write(
            save_directory,
            basis=self.reward_basis,
            concentration=self.concentration,
            users=self.users,
            backbone=self.backbone,
            processing_class=self.processing_class,
            info=self.info,
            card=self.card(),
        )

    def save_users(self, save_directory: str | Path) -> None:
        """Write the table of users alone into a folder that `save_pretrained` made; the model's files are not touched.

        Args:
            save_directory: The folder.

        Raises:
            ArtifactError: If the folder holds another basis, or cannot be written.
        """
        storage.write_users(save_directory, basis=self.reward_basis, users=self.users)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        load_backbone: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "LowRankRewardModel":
        """Read a model from a local folder or from the Hub; the table of users is mapped, not read.

        Args:
            path_or_id: Folder or Hub id.
            load_backbone: Load the classifier too, where there is one.
            revision: Hub branch, tag or commit.
            token: Hub token; None takes the logged-in one.
            cache_dir: Hub cache.
            local_files_only: Use the Hub cache alone.

        Raises:
            ArtifactError: If files are missing, truncated, altered or of different models.
        """
        parts = storage.read(
            path_or_id,
            load_backbone=load_backbone,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        model = cls(parts.basis, concentration=parts.concentration, users=parts.users, info=parts.info)
        model.backbone, model.processing_class = parts.backbone, parts.processing_class
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload low-rank reward model",
    ) -> str:
        """Upload to the Hub, users included; returns the commit's address.

        Args:
            repo_id: `owner/name`; made when it does not exist.
            private: Visibility of a new repository.
            token: Hub token; None takes the logged-in one.
            commit_message: Message of the commit.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save_pretrained(folder)
            return storage.push(folder, repo_id, private=private, token=token, message=commit_message)

    def card(self) -> str:
        """Text of the model card."""
        return reward_card(
            self.info,
            n_basis=self.n_basis,
            n_features=self.n_features,
            n_users=len(self.users),
            population=self.population_weights.tolist(),
            backbone=self.backbone is not None,
        )

    def _put(self, user_id: UserId, chosen: Features, rejected: Features) -> UserPosterior:
        found = self.posterior(chosen, rejected)
        self.users.put([user_id], found.weights[None], [found.n_pairs])
        return found

    def _backbone(self) -> Any:
        if self.backbone is None:
            raise RewardModelError(
                "This reward model has no backbone, only a basis on features: pass backbone= when making it, or load it "
                "with load_backbone=True from a folder that holds one."
            )
        return self.backbone
