"""A callback that keeps the adapter in training off the directions of earlier tasks."""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.bases.sequences import overlap_gradient, project_off, span_of
from eigenpeft.linalg.orthogonal import random_complement
from eigenpeft.tuners.sequence.history import SubspaceHistory, input_factors

logger = logging.getLogger(__name__)


class OrthogonalSubspaceCallback(TrainerCallback):
    """Keep A off the span of a history, in any of transformers' or TRL's trainers.

    A (r, in_features) becomes `A (I - VᵀV)`, V (k, in_features) the history's orthonormal rows. The update of the new
    task then does nothing to inputs in that span, so that earlier tasks, whose adapters stay in the model frozen or
    merged, are disturbed less.

    Args:
        history: History of the tasks before; not changed here. Add the task when it has been trained: `history.add(model)`.
        mode: "project" (default): A starts, and stays after every step, orthogonal to the history, and so do the
            gradients that the optimizer sees. "penalty": O-LoRA's (arXiv 2310.14152, eq. 7), `weight · Σ_s Σ_ij |(A_s
            Aᵀ)_ij|` is added to the loss by its gradient.
        weight: Weight of the penalty; O-LoRA's paper has 0.5.
        adapter_name: Adapter that is trained.

    Raises:
        AdapterConfigError: If the mode is unknown, or the weight is negative.

    Examples:
        >>> history = SubspaceHistory()
        >>> callback = OrthogonalSubspaceCallback(history, mode="project")
        >>> trainer = Trainer(model, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train(), history.add(model)  # doctest: +SKIP
    """

    def __init__(
        self,
        history: SubspaceHistory,
        *,
        mode: str = "project",
        weight: float = 0.5,
        adapter_name: str = "default",
    ):
        if mode not in ("project", "penalty"):
            raise AdapterConfigError(f"mode={mode!r} must be 'project' or 'penalty'.")
        if not weight >= 0:
            raise AdapterConfigError(f"weight={weight} must be 0 or more.")
        self.history, self.mode, self.weight, self.adapter_name = history, mode, weight, adapter_name
        self._spans: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the start off the history, where that is the mode; called by the trainer, after a resume too.

        Args:
            args: The trainer's arguments; not used.
            state: The trainer's state; not used.
            control: The trainer's control; not used.
            model: Model that is trained.
            **kwargs: What else the trainer hands out.

        Raises:
            AdapterConfigError: If the model has no input factor of the adapter, the history has none of its modules, or leaves too
                few directions for A.
        """
        own = dict(input_factors(model, self.adapter_name))
        if self.history.rows and not self.history.rows.keys() & own.keys():
            raise AdapterConfigError(
                f"The history has {len(self.history.rows)} modules, such as {next(iter(self.history.rows))!r}, and the adapter "
                f"{self.adapter_name!r} others, such as {next(iter(own))!r}. Use a history of the same base model."
            )
        if self.mode == "project":
            self._spans = {name: span_of(rows) for name, rows in self.history.rows.items() if name in own}
            for name, span in self._spans.items():
                before = own[name].detach().flatten(1).clone()
                self._project(own[name], name)
                if float(own[name].detach().norm()) < 1e-6 * float(before.norm()):
                    self._draw_anew(own[name], before, span, name)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Change the gradients before the optimizer sees them; called by the trainer.

        Args:
            args: The trainer's arguments; not used.
            state: The trainer's state; not used.
            control: The trainer's control; not used.
            model: Model that is trained.
            **kwargs: What else the trainer hands out.

        Raises:
            AdapterConfigError: If the model has no input factor of the adapter.
        """
        for name, factor in input_factors(model, self.adapter_name):
            rows = self.history.rows.get(name)
            if factor.grad is None or rows is None:
                continue
            shape = factor.shape
            if self.mode == "project":
                factor.grad.copy_(project_off(factor.grad.flatten(1), self._span(name, factor)).view(shape))
            else:
                added = overlap_gradient(factor.detach().flatten(1), [rows.to(factor.device)])
                factor.grad.add_(added.view(shape).to(factor.grad), alpha=self.weight)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take off what the optimizer put into the span, whose step is not a projection of the gradient; called by the trainer.

        Args:
            args: The trainer's arguments; not used.
            state: The trainer's state; not used.
            control: The trainer's control; not used.
            model: Model that is trained.
            **kwargs: What else the trainer hands out.

        Raises:
            AdapterConfigError: If the model has no input factor of the adapter.
        """
        for name, factor in input_factors(model, self.adapter_name) if self.mode == "project" else ():
            self._project(factor, name)

    def _project(self, factor: torch.nn.Parameter, name: str) -> None:
        if name in self._spans:
            with torch.no_grad():
                factor.copy_(project_off(factor.flatten(1), self._span(name, factor)).view(factor.shape))

    def _draw_anew(self, factor: torch.nn.Parameter, before: Tensor, span: Tensor, name: str) -> None:
        """Random rows outside the history, as long as the old ones, for a start that lay in it, as with an earlier seed."""
        n_rows, width = before.shape
        if width - len(span) < n_rows:
            raise AdapterConfigError(
                f"The history spans {len(span)} of the {width} input directions of {name!r}, which leaves too few for an adapter "
                f"of rank {n_rows}. Use a smaller history (max_rows=...), or mode='penalty'."
            )
        logger.info("The start of %s lay in the history, as when two tasks have one seed; it is drawn anew", name)
        generator = torch.Generator().manual_seed(len(span))
        rows = random_complement(span.cpu().double(), n_pseudo_components=n_rows, generator=generator)
        with torch.no_grad():
            factor.copy_((rows * before.cpu().norm(dim=1, keepdim=True)).view(factor.shape))

    def _span(self, name: str, factor: Tensor) -> Tensor:
        span = self._spans[name]
        if span.device != factor.device:
            span = self._spans[name] = span.to(factor.device)
        return span
