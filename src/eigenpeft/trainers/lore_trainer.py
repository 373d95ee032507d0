"""LoReTrainer: TRL's RewardTrainer for a basis of rewards and the users who mix them, backbone included."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_trainer import RewardTrainer

from eigenpeft.errors import RewardModelError
from eigenpeft.linalg.preference.objective import batch_prior, simplex, simplex_logits
from eigenpeft.reward import LowRankRewardModel
from eigenpeft.reward.text.backbone import score_head, with_head
from eigenpeft.trainers.collator import DataCollatorForUserPreference
from eigenpeft.trainers.lore_config import LoReConfig
from eigenpeft.trainers.user_mixing import (
    USER_LOGITS,
    UserMixing,
    bare_copy,
    keep_head_precise,
    population_of,
    release_head,
    user_logits,
)

# A weight of zero would start a user's logit where no gradient reaches it.
LEAST_START_WEIGHT = 1e-3


class LoReTrainer(RewardTrainer):
    """Trains backbone (or its adapter), reward basis and user weights together on comparisons of many users.

    The data are TRL's preference format, conversational or not, with a column that names the user. The model is a stock
    sequence classifier with `n_basis` labels; a scalar reward model is the start of every row of the basis. Users of the
    evaluation sets who are not in the training set are given the population's weights. Besides RewardTrainer's metrics:
    `population_accuracy`, of one mean weighting for everybody, and `gain_over_population`. Pass
    `eval_dataset={"seen_users": ..., "new_users": ...}` to have them apart.

    With few comparisons, fit `LoReFitter` to features of the untrained backbone first and pass the model it makes: basis
    and users then start where that fit ended, and training has only to improve on it.

    Args:
        model: Name or path, or an `AutoModelForSequenceClassification` model with 1 or n_basis labels, or a
            `LowRankRewardModel` with a backbone and n_basis rows, of which nothing is changed.
        args: Settings; None takes the defaults.
        train_dataset: Comparisons with `chosen`, `rejected` and the user column.
        eval_dataset: The same, or a dictionary of such.
        processing_class: Tokenizer; None loads the model's.
        peft_config: Adapter of the backbone; basis and users are trained beside it.
        user_ids: The users, for streaming data sets; None collects them from `train_dataset`.
        **options: What `trl.RewardTrainer` takes besides.

    Raises:
        RewardModelError: If the training set or its user column is missing, a streaming one comes without `user_ids`, the
            model's head or basis does not fit, or it is PEFT-wrapped already.
    """

    _tag_names = ["trl", "lore", "eigenpeft"]
    _name = "LoRe"
    args: LoReConfig

    def __init__(
        self,
        model: Any,
        args: LoReConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        user_ids: Sequence[str | int] | None = None,
        **options: Any,
    ):
        args = (
            copy.copy(args) if args is not None else LoReConfig("LoRe")
        )  # what is used up below stays in the caller's
        fitted: LowRankRewardModel | None = model if isinstance(model, LowRankRewardModel) else None
        if train_dataset is None:
            raise RewardModelError("LoReTrainer needs a train_dataset with chosen, rejected and a user column.")
        names, counts = _users_of(train_dataset, args.user_column, user_ids)
        if processing_class is None:
            processing_class = _processing_class_of(model)
        model = _basis_model(model, args) if fitted is None else _of_fitted(fitted, args)
        self._user_ids, self._counts = names, counts
        self._mixing = UserMixing(model, n_users=len(names), n_basis=args.n_basis)
        head_name, _ = score_head(model)
        keep_head_precise(model)
        if fitted is not None:
            _start_from(fitted, model, names)
        if args.freeze_backbone:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith((head_name, USER_LOGITS)))
        if peft_config is not None:
            peft_config = copy.copy(peft_config)
            kept = set(peft_config.modules_to_save or ()) | {head_name.split(".")[0], USER_LOGITS}
            peft_config.modules_to_save = sorted(kept)
        # RewardTrainer takes one-label models alone, and after the hooks this is one: it returns one logit per text.
        model.config.num_labels = 1
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        super().__init__(
            model=model,
            args=args,
            data_collator=DataCollatorForUserPreference(
                pad_token_id=processing_class.pad_token_id,
                pad_to_multiple_of=cast(int | None, args.pad_to_multiple_of),  # resolved by the config
                user_rows={name: row for row, name in enumerate(names)},
                user_column=args.user_column,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **options,
        )
        self._classifier().config.num_labels = args.n_basis

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.user_column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self.args.user_column]

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        """The optimizer of the Trainer, with a group of their own for the user logits.

        Args:
            *arguments: The Trainer's.
            **keywords: The Trainer's.
        """
        optimizer = super().create_optimizer(*arguments, **keywords)
        users = user_logits(self._classifier())
        if any(users is parameter for group in optimizer.param_groups for parameter in group["params"]):
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter is not users]
            optimizer.add_param_group({"params": [users], "lr": self.args.user_learning_rate, "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """RewardTrainer's loss of the mixed rewards, and the users' share of the Dirichlet prior.

        Args:
            model: The (wrapped) model.
            inputs: A batch with `user_rows`.
            return_outputs: Whether to return the model's outputs too.
            num_items_in_batch: As the Trainer passes it.
        """
        rows = inputs["user_rows"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        classifier = self._classifier()
        mode = "train" if model.training else "eval"
        with torch.no_grad():
            by_basis = self._mixing.basis_logits
            chosen, rejected = torch.chunk(by_basis @ population_of(classifier).to(by_basis), chunks=2)
            of_population = self._mean((chosen > rejected).float().mean())
            self._metrics[mode]["population_accuracy"].append(of_population)
            self._metrics[mode]["gain_over_population"].append(self._metrics[mode]["accuracy"][-1] - of_population)
        if mode == "train" and self.args.concentration > 0:
            logs = getattr(classifier, USER_LOGITS)(rows).log_softmax(dim=-1)
            counts = torch.tensor(self._counts, device=rows.device)[rows]
            loss = loss + batch_prior(logs, counts, pseudo_count=self.args.concentration / self.args.n_basis)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the metrics of each of several evaluation sets under its own name.

        Args:
            logs: What is logged; the metrics are added to it.
            start_time: As the Trainer passes it.
        """
        runtime = next((key for key in logs if key.startswith("eval_") and key.endswith("_runtime")), "eval_runtime")
        if runtime != "eval_runtime":  # TRL calls them eval_accuracy, whichever set they are of
            prefix = runtime.removesuffix("_runtime")
            metrics = self._metrics["eval"]
            logs.update({f"{prefix}_{key}": sum(values) / len(values) for key, values in metrics.items()})
            metrics.clear()
        super().log(logs, start_time)

    def reward_model(self) -> LowRankRewardModel:
        """The trained model with its users, adapters merged: save it, export a user, reward texts with it.

        Raises:
            RewardModelError: If what was trained is not finite.
        """
        model = self.accelerator.unwrap_model(self.model)
        classifier = self._classifier()
        weights = simplex(user_logits(classifier).detach().float().cpu())
        merged = bare_copy(model)
        reward_basis = score_head(merged)[1].weight.detach().float().cpu()
        release_head(merged)
        made = LowRankRewardModel(
            reward_basis,
            concentration=weights.mean(dim=0) * self.args.strength,
            backbone=merged,
            processing_class=self.processing_class,
            info={
                "base_model": getattr(classifier.config, "_name_or_path", None) or None,
                "n_pairs": int(sum(self._counts)),
                "n_users_fitted": len(self._user_ids),
                "trainer": "LoReTrainer",
                "seed": self.args.seed,
            },
        )
        made.users.put(self._user_ids, user_weights=weights, n_pairs=[int(count) for count in self._counts])
        return made

    def _classifier(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _mean(self, value: Tensor) -> float:
        return cast(Tensor, self.accelerator.gather_for_metrics(value)).mean().item()


def _users_of(dataset: Any, column: str, user_ids: Sequence[str | int] | None) -> tuple[list[str], list[float]]:
    """Users in order of first appearance, and how many comparisons each has."""
    streaming = isinstance(dataset, IterableDataset)
    names = dataset.column_names
    if names is not None and column not in names:
        raise RewardModelError(
            f"The training set has no column {column!r}, only {sorted(names)}: name the user of each comparison there, or "
            "set user_column."
        )
    if streaming and user_ids is None:
        raise RewardModelError("A streaming training set does not tell its users in advance: pass user_ids.")
    counts: dict[str, float] = {str(user): 0.0 for user in user_ids or ()}
    if streaming:
        return list(counts), [1.0] * len(counts)
    for user in dataset[column]:
        counts[str(user)] = counts.get(str(user), 0.0) + 1.0
    return list(counts), [max(count, 1.0) for count in counts.values()]


def _processing_class_of(model: Any) -> Any:
    """The tokenizer that a model, a name or a reward model comes with."""
    if isinstance(model, LowRankRewardModel):
        if model.processing_class is not None or model.backbone is None:
            return model.processing_class
        model = model.backbone
    return AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.config._name_or_path)


def _of_fitted(fitted: LowRankRewardModel, args: LoReConfig) -> Any:
    """A copy of a reward model's backbone, its basis as the head."""
    if fitted.backbone is None:
        raise RewardModelError(
            "The reward model to start from has no backbone: pass backbone= and processing_class= to LoReFitter.fit."
        )
    if fitted.n_basis != args.n_basis:
        raise RewardModelError(
            f"The reward model to start from has a basis of {fitted.n_basis}, and n_basis={args.n_basis}; they must agree."
        )
    return with_head(fitted.backbone, fitted.reward_basis)


@torch.no_grad()
def _start_from(fitted: LowRankRewardModel, model: Any, names: list[str]) -> None:
    """Basis in full precision, and the users' weights; users whom the fit did not know start as its population."""
    score_head(model)[1].weight.copy_(fitted.reward_basis)
    weights = fitted.user_weights(names, unknown="population").clamp(min=LEAST_START_WEIGHT)
    user_logits(model).copy_(simplex_logits(weights))


def _basis_model(model: Any, args: LoReConfig) -> Any:
    """A classifier with n_basis labels; the rows of a one-label head start as that head and noise that tells them apart."""
    if isinstance(model, str):
        options: dict[str, Any] = dict(cast(dict[str, Any], args.model_init_kwargs or {}))
        options.setdefault("dtype", torch.float32)
        options.setdefault("trust_remote_code", args.trust_remote_code)
        known = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
        config = AutoConfig.from_pretrained(model, **known)
        if not any("ForSequenceClassification" in name for name in config.architectures or ()):
            options["num_labels"] = args.n_basis  # a backbone without a head gets a new one
        model = AutoModelForSequenceClassification.from_pretrained(model, **options)
        args.model_init_kwargs = None  # used up: RewardTrainer would warn that it ignores them
    if hasattr(model, "peft_config"):
        raise RewardModelError("The model is PEFT-wrapped already; pass the plain model and peft_config=.")
    _, head = score_head(model)
    if head.out_features == args.n_basis and (args.n_basis > 1 or model.config.num_labels == 1):
        return model
    if head.out_features != 1:
        raise RewardModelError(
            f"The model has {head.out_features} labels; LoReTrainer takes 1 (a scalar reward model, the start of every "
            f"row) or n_basis={args.n_basis}."
        )
    weight = head.weight.detach().float().cpu()
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(args.n_basis, weight.shape[1], generator=generator)
    return with_head(model, weight + weight.norm() / weight.shape[1] ** 0.5 * noise).train(model.training)
