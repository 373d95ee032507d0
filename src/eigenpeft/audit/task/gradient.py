"""Does a subspace suit a new task? The share of the task's gradient that lies in it, before any training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.audit.task.task_gradients import Loss, Tokens, gather_tokens
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.scores.token_gradients import SquaredNormSplit, split_squared_norm
from eigenpeft.subspace.controls import random_subspace
from eigenpeft.subspace.matching import match_modules
from eigenpeft.subspace.principal import PrincipalSubspace


@dataclass(frozen=True, kw_only=True)
class ModuleGradient:
    """Shares of the squared norm of one weight's gradient G.

    Attributes:
        module: Its name in the subspace.
        squared_norm: ‖G‖².
        share: In the subspace, `‖V_out G V_inᵀ‖² / ‖G‖²`: what the cores "low_rank" (r = K) and "full" can reach.
        diagonal: What the core "diagonal" can reach.
        optimum: In the best subspace of that size, the leading singular directions of G itself.
        random: In random subspaces of that size, one per seed.
        curve: `share` of the first 1, 2, ..., K components.
        random_curve: The same of the random subspaces, mean over the seeds; empty without seeds.
        optimum_curve: The same of the best subspaces.
    """

    module: str
    squared_norm: float
    share: float
    diagonal: float
    optimum: float
    random: tuple[float, ...]
    curve: tuple[float, ...]
    random_curve: tuple[float, ...]
    optimum_curve: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class GradientShare:
    """Shares over all modules, weighted by the squared norm of their gradients, and each module's own.

    Attributes:
        share: Share of the subspace.
        diagonal: Share of the core "diagonal" in it.
        optimum: Share of the best subspace of that size.
        random: Shares of random subspaces of that size, one per seed.
        curve: `share` with the first 1, 2, ..., K components of every module (all of a module that has fewer).
        random_curve: The same of the random subspaces, mean over the seeds; empty without seeds.
        optimum_curve: The same of the best subspaces.
        n_batches: Batches whose gradients were added.
        modules: One record per module.
    """

    share: float
    diagonal: float
    optimum: float
    random: tuple[float, ...]
    curve: tuple[float, ...]
    random_curve: tuple[float, ...]
    optimum_curve: tuple[float, ...]
    n_batches: int
    modules: tuple[ModuleGradient, ...]


def gradient_share(
    model: nn.Module,
    *,
    batches: Iterable[Any],
    subspace: PrincipalSubspace,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    loss: Loss | None = None,
) -> GradientShare:
    """The share of the gradient of each adapted weight that lies inside a subspace.

    For one weight `G = Σ_t δ_t x_tᵀ` over the tokens of all batches, x the input and δ the gradient by the output. G is
    what the first step of full fine-tuning would follow; the first steps of a subspace see only `V_out G V_inᵀ`. The share
    is `Σ ‖V_out G V_inᵀ‖² / Σ ‖G‖²` over the modules (a measure of eigenpeft's own; docs/audit.md). G (out_features,
    in_features) is kept as token factors. The subspace is worth having only where its share is above that of the random ones.

    A new head matters: gradients behind an untrained head are those of a random direction. Train the head first.

    Args:
        model: Base model with the task's head, such as a Transformers model. It is left as it was; dropout is off.
        batches: A few batches of the new task, as the loss takes them.
        subspace: The subspace to judge.
        seeds: Seeds of the random subspaces of the same size.
        loss: Takes the model and a batch; default: `model(**batch).loss`.

    Returns:
        A `GradientShare`.

    Raises:
        SubspaceError: If no module of the model is in the subspace, several fit one, widths differ, or there are no batches or no
            gradient.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from eigenpeft import PrincipalSubspace
        >>> from eigenpeft.audit import gradient_share
        >>> from eigenpeft.subspace import ModuleSubspace
        >>> eye, ones = torch.eye(2, 4), torch.ones(2)
        >>> spectra = {"singular_values_in": ones, "singular_values_out": ones, "explained_variance_ratio": ones / 2}
        >>> subspace = PrincipalSubspace({"0": ModuleSubspace(eye, torch.eye(2, 3), **spectra)})
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> found = gradient_share(
        ...     model, batches=[torch.eye(4)[:1]], subspace=subspace, loss=lambda model, x: model(x)[:, :2].sum()
        ... )
        >>> round(found.share, 6), round(found.optimum, 6)
        (1.0, 1.0)
    """
    tokens, n_batches = gather_tokens(model, targets=modules_in(model, subspace), batches=batches, loss=loss)
    return share_of_tokens(tokens, subspace, seeds=seeds, n_batches=n_batches)


def share_of_tokens(
    tokens: Tokens, subspace: PrincipalSubspace, *, seeds: Sequence[int], n_batches: int
) -> GradientShare:
    """What `gradient_share` finds, from gradients that are already gathered.

    Args:
        tokens: From `gather_tokens`.
        subspace: The subspace to judge.
        seeds: Seeds of the random subspaces of the same size.
        n_batches: Batches whose gradients were added.

    Raises:
        SubspaceError: If the gradient is zero in all modules, or widths differ.
    """
    controls = [random_subspace(like=subspace, seed=seed) for seed in seeds]
    splits = {name: _split(pair, subspace, name) for name, pair in tokens.items()}
    random = {name: [_split(pair, control, name).in_subspace for control in controls] for name, pair in tokens.items()}
    total = sum(split.total for split in splits.values())
    if not total > 0:
        raise SubspaceError(
            f"The gradient is {total} in all {len(tokens)} modules: the loss does not depend on them. Give rows whose labels the "
            "model does not fit perfectly, and a model in which these modules are used."
        )
    held = _summed([split.in_subspace for split in splits.values()]) / total
    best = _summed([split.best for split in splits.values()]) / total
    by_seed = [_summed([curves[i] for curves in random.values()]) / total for i in range(len(controls))]
    return GradientShare(
        share=float(held[-1]),
        diagonal=sum(split.diagonal for split in splits.values()) / total,
        optimum=float(best[-1]),
        random=tuple(float(curve[-1]) for curve in by_seed),
        curve=tuple(held.tolist()),
        random_curve=_mean(by_seed),
        optimum_curve=tuple(best.tolist()),
        n_batches=n_batches,
        modules=tuple(_module(name, split, random[name]) for name, split in splits.items()),
    )


def _module(name: str, split: SquaredNormSplit, random: Sequence[Tensor]) -> ModuleGradient:
    total = max(split.total, torch.finfo(torch.float64).tiny)  # a module the loss does not reach: all shares are 0
    return ModuleGradient(
        module=name,
        squared_norm=split.total,
        share=float(split.in_subspace[-1]) / total,
        diagonal=split.diagonal / total,
        optimum=float(split.best[-1]) / total,
        random=tuple(float(curve[-1]) / total for curve in random),
        curve=tuple((split.in_subspace / total).tolist()),
        random_curve=_mean([curve / total for curve in random]),
        optimum_curve=tuple((split.best / total).tolist()),
    )


def _summed(curves: Sequence[Tensor]) -> Tensor:
    """Energies by K over all modules; a module with fewer components keeps what its last one reached."""
    most = max(len(curve) for curve in curves)
    return torch.stack([torch.cat([curve, curve[-1:].expand(most - len(curve))]) for curve in curves]).sum(dim=0)


def _mean(curves: Sequence[Tensor]) -> tuple[float, ...]:
    return tuple(torch.stack(list(curves)).mean(dim=0).tolist()) if curves else ()


def _split(pair: tuple[Tensor, Tensor], subspace: PrincipalSubspace, name: str) -> SquaredNormSplit:
    bank = subspace[name]
    if (pair[0].shape[1], pair[1].shape[1]) != (bank.out_features, bank.in_features):
        raise SubspaceError(
            f"{name!r} maps {pair[1].shape[1]} features to {pair[0].shape[1]} in the model, {bank.in_features} to "
            f"{bank.out_features} in the subspace; use the base model of the adapters."
        )
    sides = {"components_out": bank.components_out, "components_in": bank.components_in}
    return split_squared_norm(*pair, **sides, paired=bank.paired)


def modules_in(model: nn.Module, subspace: PrincipalSubspace) -> dict[str, nn.Module]:
    """The model's modules that a subspace adapts, by their names in the subspace.

    Args:
        model: Base model, with PEFT layers or without.
        subspace: Bases whose names and shapes are looked for.

    Raises:
        SubspaceError: If no module of the subspace is in the model, or several modules of the model fit one of them.
    """
    shapes = {name: (bank.out_features, bank.in_features) for name, bank in subspace.items()}
    matches = match_modules(model, shapes, shapes=shapes)
    if matches.contested:
        name, fitting = next(iter(matches.contested.items()))
        raise SubspaceError(
            f"{', '.join(map(repr, fitting))} of the model all fit the subspace's module {name!r} ({len(matches.contested)} of its "
            f"{len(subspace)} modules fit several). Pass the part of the model that is meant."
        )
    # A base_layer comes after the PEFT layer around it, and takes its place.
    modules = {path.removesuffix(".base_layer"): module for path, module in model.named_modules()}
    targets = {known: modules[path] for path, known in matches.found.items()}
    if not targets:
        raise SubspaceError(
            f"None of the {len(subspace)} modules of the subspace, such as {subspace.modules[0]!r}, is in the model; use "
            "the base model of the adapters."
        )
    return targets
