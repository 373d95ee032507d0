"""Whether the adapters' subspace suits a new task, and which K, modules and core, from a few batches before training."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from eigenpeft.audit.report import AuditReport
from eigenpeft.audit.task.gradient import GradientShare, modules_in, share_of_tokens
from eigenpeft.audit.task.reuse import Downhill, downhill
from eigenpeft.audit.task.task_gradients import gather_tokens
from eigenpeft.building.module_fitter import ModuleFitter
from eigenpeft.collection import AdapterCollection
from eigenpeft.linalg.scores.leave_one_out import choose_n_components
from eigenpeft.subspace.principal import PrincipalSubspace

_BATCH_SIZE = 8
_SEEDS = (0, 1, 2, 3, 4)
# A diagonal core has K numbers per module where low_rank has 2 r K: it is named where it reaches at least this part.
_DIAGONAL_ENOUGH = 0.5
_NAMED = 3
# What is missing to this share of ‖ΔW‖² is rounding: the module has no further components.
_WHOLE = 1.0 - 1e-6


def task_gradient(
    collection: AdapterCollection,
    model: nn.Module,
    rows: Any,
    *,
    data_collator: Callable[[list[Any]], Any] | None,
    n_rows: int,
    n_components: Mapping[str, int],
) -> tuple[GradientShare, Downhill]:
    """The share of a new task's gradient in the subspace of a collection, and how far its adapters point downhill.

    Args:
        collection: Trained adapters.
        model: Base model with the task's head.
        rows: Tokenized rows with labels.
        data_collator: Makes batches; default: `transformers.default_data_collator`.
        n_rows: Rows used.
        n_components: Module to its number of components.

    Raises:
        SubspaceError: If the model has no module of the collection, or no gradient reaches one.
        KeyError: If no adapter adapts a module.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    subspace = PrincipalSubspace(
        {name: _fitter(count).fit(name, collection).bank for name, count in n_components.items()}
    )
    used: Any = list(islice(iter(rows), n_rows))
    loader = DataLoader(used, batch_size=_BATCH_SIZE, collate_fn=data_collator or default_data_collator)
    device = next(model.parameters()).device
    batches = ({name: value.to(device) for name, value in batch.items()} for batch in loader)
    tokens, n_batches = gather_tokens(model, targets=modules_in(model, subspace), batches=batches)
    found = share_of_tokens(tokens, subspace, seeds=_SEEDS, n_batches=n_batches)
    return found, downhill(collection, tokens=tokens)


def components_at_hand(report: AuditReport) -> dict[str, int]:
    """For each module the components that explain its adapters whole, or as many as the audit looked at.

    Args:
        report: Report of the collection.
    """
    return {name: _first_whole(module.explained.real) for name, module in report.modules.items()}


def _first_whole(curve: Sequence[float]) -> int:
    return next((n_components for n_components, share in enumerate(curve, start=1) if share > _WHOLE), len(curve))


def _fitter(n_components: int) -> ModuleFitter:
    return ModuleFitter(
        n_components=n_components,
        method="balanced",
        weighting="equal",
        n_pseudo_components=0,
        seed=0,
        tol=1e-4,
        memory_limit=None,
    )


def advice_on_task(found: GradientShare) -> str:
    """Sentences: better than random or not, which K, which modules, which core.

    Args:
        found: Figures of the adapters' subspace.
    """
    chance, n_components = max(found.random), len(found.curve)
    numbers = (
        f"Of the new task's gradient, before any training, {found.share:.1%} lies in their subspace of {n_components} components "
        f"per module, {chance:.1%} at most in one of {len(found.random)} random subspaces of that size, and {found.optimum:.1%} "
        "in the best one."
    )
    if found.share <= chance:
        return f"{numbers} It suits this task no better than a random one: train a plain LoRA, or in a random subspace."
    best_n_components = choose_n_components(torch.tensor(found.curve), chance=torch.tensor(found.random_curve))
    worse = [module.module for module in found.modules if module.share <= max(module.random)]
    where = "in every module"
    if worse:
        named = ", ".join(worse[:_NAMED]) + (", ..." if len(worse) > _NAMED else "")
        where = f"in {len(found.modules) - len(worse)} of {len(found.modules)} modules (not in {named})"
    part = found.diagonal / found.share
    core = (
        f"the core 'diagonal' reaches {part:.0%} of that with the fewest numbers"
        if part >= _DIAGONAL_ENOUGH
        else f"the core 'diagonal' would reach {part:.0%} of that: take 'low_rank' or 'full'"
    )
    return (
        f"{numbers} It suits this task better than a random one, {where}; most of the advantage is there with "
        f"K = {best_n_components}, and {core}. Within a task such shares rank subspaces much as training does; across tasks "
        "they do less."
    )
