"""Training without gradients: transformers' Trainer with two forward passes in the place of forward and backward."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.zeroth_order import direction, directions, slope_along

_logger = logging.getLogger(__name__)
# Noise grows with the number of trained values; beyond so many the first steps are noise alone.
_MANY = 20_000

Objective = Callable[[nn.Module, Mapping[str, Any]], Any]
"""From a model and a batch to a number that is made small; it needs no gradient."""


class ZerothOrderMixin:
    """Put before a Trainer's class, it lets the Trainer train by forward passes alone, in the memory of inference.

    Each step moves all trained values by ±ε along a random direction z and writes `g z` into their `.grad`, with g the slope
    along z (MeZO, arXiv 2305.17333, equation 1; SPSA, Spall 1992). So the optimizer, schedule, clipping and accumulation of the
    Trainer go on as they are. No activations are kept and nothing is back-propagated; any score of the model's outputs may be the
    objective.
    Noise grows with the number of trained values: it suits cores of K or K² numbers per module, not a LoRA of a million, and needs
    many more steps than gradients do (docs/zeroth-order.md has figures).

    Args:
        *args: The Trainer's own.
        epsilon: ε, the step to each side.
        n_directions: Directions per step, at right angles to one another, whose estimates are averaged; each costs two forward
            passes. As many as there are trained values give the gradient itself, up to O(ε²).
        objective: What is made small, as a function of the model and a batch on its device; None takes the Trainer's loss.
        **kwargs: The Trainer's own.

    Raises:
        AdapterConfigError: If an argument is out of range, the model has no trained values, or the Trainer's arguments scale or
            shard gradients.

    Examples:
        >>> from transformers import Seq2SeqTrainer
        >>> class ZerothOrderSeq2SeqTrainer(ZerothOrderMixin, Seq2SeqTrainer):
        ...     pass
        >>> ZerothOrderSeq2SeqTrainer.__mro__[1].__name__
        'ZerothOrderMixin'
    """

    def __init__(
        self,
        *args: Any,
        epsilon: float = 1e-3,
        n_directions: int = 1,
        objective: Objective | None = None,
        **kwargs: Any,
    ):
        if not epsilon > 0 or n_directions < 1:
            raise AdapterConfigError(
                f"epsilon={epsilon} must be above 0 and n_directions={n_directions} at least 1, such as 1e-3 and 1."
            )
        super().__init__(*args, **kwargs)
        self.epsilon, self.n_directions, self.objective = epsilon, n_directions, objective
        trainer: Any = self
        settings = trainer.args
        asked = {name: getattr(settings, name, None) for name in ("fp16", "deepspeed", "fsdp")}
        refused = {name: value for name, value in asked.items() if value}
        if refused:
            shown = ", ".join(f"{name}={value!r}" for name, value in refused.items())
            raise AdapterConfigError(
                f"{shown}: gradients are written here without a backward pass, and these scale or shard them. Leave them out; "
                "bf16=True works."
            )
        self._parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in self._parameters)
        if not count:
            raise AdapterConfigError(
                "The model has no trained values; wrap it with get_peft_model, or set requires_grad on what is to be trained."
            )
        if count > _MANY:
            _logger.warning(
                "%d values are trained without gradients; the noise of the estimate grows with their number. Fewer components, "
                "core='diagonal' or a frozen head would learn faster.",
                count,
            )
        self._at, self._part = -1, 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Estimate the gradient from forward passes; called by the Trainer.

        Args:
            model: The model.
            inputs: A batch.
            num_items_in_batch: As the Trainer counts them.

        Returns:
            The mean of the losses that were looked at.

        Raises:
            AdapterConfigError: If the objective is NaN or infinite.
        """
        trainer: Any = self
        model.eval()  # both passes must be of one function: dropout's noise would be divided by ε
        batch = trainer._prepare_inputs(inputs)
        values = [p.detach().clone() for p in self._parameters]
        share = self._share(num_items_in_batch) / self.n_directions
        losses = []

        def objective(moved: Sequence[Tensor]) -> float:
            self._set(moved)
            return self._loss(model, batch, num_items_in_batch)

        try:
            for moved in self._directions(values):
                slope, loss = slope_along(objective, values, moved, epsilon=self.epsilon)
                if not math.isfinite(slope):
                    raise AdapterConfigError(
                        f"The objective is {loss} at step {trainer.state.global_step}: no direction can be told from it. Lower the "
                        "learning rate or epsilon."
                    )
                losses.append(loss)
                for parameter, z in zip(self._parameters, moved, strict=True):
                    step = slope * share * z
                    parameter.grad = step if parameter.grad is None else parameter.grad + step
        finally:
            self._set(values)  # the very values, so that no rounding adds up
        self._part += 1
        return torch.tensor(sum(losses) / len(losses) * share * self.n_directions, device=trainer.args.device)

    def _loss(self, model: nn.Module, batch: Mapping[str, Any], num_items_in_batch: Any) -> float:
        trainer: Any = self
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if self.objective is None:
                found = trainer.compute_loss(model, dict(batch), num_items_in_batch=num_items_in_batch)
            else:
                found = self.objective(model, batch)
        found = torch.as_tensor(found, dtype=torch.float64, device=trainer.args.device).mean()
        return float(trainer.accelerator.reduce(found, reduction="mean"))

    def _share(self, num_items_in_batch: Any) -> float:
        """What the Trainer multiplies a loss by where gradients are accumulated."""
        trainer: Any = self
        known = getattr(trainer, "loss_is_scaled_for_ga", None)
        if known is None:
            known = (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
                trainer.compute_loss_func is not None
            )
        return 1.0 if known and self.objective is None else 1.0 / trainer.current_gradient_accumulation_steps

    def _directions(self, values: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
        if self.n_directions == 1:
            return [direction(values, seed=self._seed())]
        return directions(values, seed=self._seed(), n=self.n_directions)

    def _seed(self) -> int:
        """A seed for each part of each step, the same when a stopped run goes on."""
        trainer: Any = self
        if trainer.state.global_step != self._at:
            self._at, self._part = trainer.state.global_step, 0
        return hash((trainer.args.seed, self._at, self._part, 0)) % 2**63

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)


class ZerothOrderTrainer(ZerothOrderMixin, Trainer):
    """transformers' Trainer without gradients; see `ZerothOrderMixin`, which goes before other Trainers as well.

    Raises:
        AdapterConfigError: As `ZerothOrderMixin`.

    Examples:
        With a model and its rows, as on the page docs/zeroth-order.md:

        >>> trainer = ZerothOrderTrainer(model=model, args=args, train_dataset=rows, epsilon=1e-3)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
