"""A reward model as an artifact: what it consists of, saving and loading it, its card, the way to the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from eigenpeft.artifacts.pushing import Pushable
from eigenpeft.errors import RewardModelError
from eigenpeft.reward.artifact import storage
from eigenpeft.reward.artifact.card import reward_card
from eigenpeft.reward.artifact.users import UserTable
from eigenpeft.reward.text.backbone import with_head

Model = TypeVar("Model", bound="RewardModelArtifact")


class RewardModelArtifact(Pushable):
    """Basis, population, users and backbone of a `LowRankRewardModel`, which describes the arguments.

    Raises:
        RewardModelError: If `reward_basis` is not a finite matrix, or `concentration` is not one positive number per row of it.

    Attributes:
        reward_basis: (n_basis, n_features), float32 on the CPU.
        concentration: (n_basis,) Dirichlet pseudo-counts of the population.
        users: Weights of the known users.
        backbone: Sequence classifier whose head is the basis, or None.
        processing_class: Its tokenizer, or None.
        info: Where the basis comes from.
    """

    label = "low-rank reward model"

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
        reward_basis = reward_basis.detach().cpu().float()
        if reward_basis.ndim != 2 or not len(reward_basis) or not bool(torch.isfinite(reward_basis).all()):
            raise RewardModelError(
                f"reward_basis of shape {tuple(reward_basis.shape)} must be a finite matrix (n_basis, n_features)."
            )
        if concentration is None:
            concentration = torch.full((len(reward_basis),), 1 / len(reward_basis))
        concentration = concentration.detach().cpu().float()
        if concentration.shape != (len(reward_basis),) or not bool((concentration > 0).all()):
            raise RewardModelError(
                f"concentration {concentration.tolist()} must be {len(reward_basis)} positive numbers, one per basis row."
            )
        self.reward_basis = reward_basis
        self.concentration = concentration
        self.users = users if users is not None else UserTable(len(reward_basis))
        self.backbone = None if backbone is None else with_head(backbone, reward_basis)
        self.processing_class = processing_class
        self.info = dict(info or {})

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n_basis={self.n_basis}, n_features={self.n_features}, users={len(self.users)}, "
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

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the model, its users and a card; with a backbone, as a stock classifier of n_basis labels besides.

        Args:
            save_directory: Folder to make; whole or not at all.
            overwrite: Whether to replace another reward model there, its users included; eigenpeft must have written it.
                Saving the same model again changes nothing and needs no permission.

        Raises:
            ArtifactError: If it cannot be written, or the folder holds something that is not replaced.
        """
        self._write_to(Path(save_directory), overwrite=overwrite)
        self.users.settle(self.users, path=Path(save_directory) / storage.USERS)

    def _write_to(self, folder: Path, *, overwrite: bool = False) -> None:
        storage.write(
            folder,
            reward_basis=self.reward_basis,
            concentration=self.concentration,
            users=self.users,
            backbone=self.backbone,
            processing_class=self.processing_class,
            info=self.info,
            card=self.card(),
            overwrite=overwrite,
        )

    def save_users(self, out_dir: str | Path) -> None:
        """Write the changes of the table of users into a folder that `save_pretrained` made, and nothing else of the model.

        Users that other processes have saved there meanwhile stay, and are known to this model afterwards.

        Args:
            out_dir: The folder.

        Raises:
            ArtifactError: If the folder holds another basis, or cannot be written.
        """
        storage.write_users(out_dir, reward_basis=self.reward_basis, users=self.users)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path_or_id: str | Path,
        *,
        load_backbone: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Model:
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
            RewardModelError: If its numbers are those of no reward model.
        """
        parts = storage.read(
            path_or_id,
            load_backbone=load_backbone,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        model = cls(parts.reward_basis, concentration=parts.concentration, users=parts.users, info=parts.info)
        model.backbone, model.processing_class = parts.backbone, parts.processing_class
        return model

    def card(self) -> str:
        """Text of the model card."""
        return reward_card(
            self.info,
            n_basis=self.n_basis,
            n_features=self.n_features,
            population=self.population_weights.tolist(),
            backbone=self.backbone is not None,
        )
