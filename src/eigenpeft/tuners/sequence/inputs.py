"""Rows of the inputs of adapted modules, and the start of InfLoRA that leaves earlier tasks' inputs alone."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.bases.sequences import inflora_start
from eigenpeft.tuners.sequence.history import SubspaceHistory, input_factors

logger = logging.getLogger(__name__)
_PREFIX = "base_model.model."


def collect_inputs(
    model: nn.Module,
    *,
    batches: Iterable[Mapping[str, Tensor]],
    n_rows: int = 512,
    adapter_name: str = "default",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Rows x that reach every adapted module, a random part of the tokens; padding is left out.

    Args:
        model: Adapted model, called as `model(**batch)`.
        batches: Batches of the task; `attention_mask` says what is padding.
        n_rows: Rows to keep of each module, at least 1.
        adapter_name: Adapter whose modules are looked at.
        seed: Seed of the choice of rows.

    Returns:
        Module to at most `n_rows` rows x, (rows, in_features), float32, on the CPU.

    Raises:
        AdapterConfigError: If the adapter has no input factors, there is no batch, or `n_rows` is less than 1.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        >>> inputs = collect_inputs(model, batches=[{"input": torch.randn(1, 5, 6)}])
        >>> {name: tuple(rows.shape) for name, rows in inputs.items()}
        {'0': (5, 6)}
    """
    if type(n_rows) is not int or n_rows < 1:
        raise AdapterConfigError(
            f"n_rows={n_rows!r} must be a whole number of at least 1: rows to keep of each module."
        )
    names = {name for name, _ in input_factors(model, adapter_name)}
    layers = {path.removeprefix(_PREFIX): layer for path, layer in model.named_modules()}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    mask: list[Tensor | None] = [None]

    def see(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            keep = mask[0]
            if keep is not None and keep.shape == x.shape[:-1]:
                x = x[keep.bool()]
            found[name].append(x.reshape(-1, x.shape[-1]).float().cpu())

        return hook

    hooks = [layers[name].register_forward_pre_hook(see(name)) for name in names]
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                model(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    empty = sorted(name for name, parts in found.items() if not parts)
    if empty:
        raise AdapterConfigError(
            f"No inputs reached {len(empty)} modules, such as {empty[0]!r}: pass at least one batch."
        )
    rows = {}
    for name in sorted(names):
        stacked = torch.cat(found[name])
        generator = torch.Generator().manual_seed(seed)
        rows[name] = stacked[torch.randperm(len(stacked), generator=generator)[:n_rows]]
    return rows


def init_lora_from_inputs(
    model: nn.Module, *, inputs: Mapping[str, Tensor], history: SubspaceHistory, adapter_name: str = "default"
) -> dict[str, int]:
    """InfLoRA's start: A spans the leading directions of the task's inputs outside the history, and is frozen.

    `A = top_r(X (I - MᵀM))` (InfLoRA, arXiv 2404.00228, section 3.3) with the inputs X (rows, in_features) and the
    history's orthonormal rows M (k, in_features). Then `ΔW x = 0` for every x in the history, whatever B becomes.
    Afterwards remember the task with `history.add_inputs(inputs)`.

    Args:
        model: Model with a fresh LoRA adapter.
        inputs: Module to inputs of the new task, (rows, in_features), as `collect_inputs` gives them.
        history: Inputs of earlier tasks.
        adapter_name: The adapter.

    Returns:
        Module to the number of directions that were found; the other rows of A are zero, and their part of B has no effect.

    Raises:
        AdapterConfigError: If inputs of a module are missing, its inputs or the history's rows have another width than its A, or
            no direction is left in any module.
        ValueError: If the history has more rows of a module than the module has inputs.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        >>> inputs = {"0": torch.eye(6)[:2]}
        >>> init_lora_from_inputs(model, inputs=inputs, history=SubspaceHistory())
        {'0': 2}
    """
    factors = dict(input_factors(model, adapter_name))
    missing = sorted(factors.keys() - inputs.keys())
    if missing:
        raise AdapterConfigError(
            f"There are no inputs of {len(missing)} modules, such as {missing[0]!r}; collect them first with collect_inputs."
        )
    for name, factor in factors.items():
        shapes = {"inputs": inputs[name].shape, "history": history.rows.get(name, inputs[name]).shape}
        for what, shape in shapes.items():
            if len(shape) != 2 or shape[1:] != factor.shape[1:]:
                raise AdapterConfigError(
                    f"The {what} of {name!r} has rows of the shape {tuple(shape)}, and its A is {tuple(factor.shape)}; both must "
                    "have as many columns: pass inputs and history of this model, on linear layers."
                )
    counts = {}
    with torch.no_grad():
        for name, factor in factors.items():
            rows = inputs[name]
            start = inflora_start(rows, history.rows.get(name, rows[:0]), rank=len(factor))
            factor.zero_()
            factor[: len(start)] = start.to(factor)
            factor.requires_grad_(False)
            counts[name] = len(start)
    if not any(counts.values()):
        raise AdapterConfigError(
            "The history holds all directions of the task's inputs, so that nothing is left to train. Keep less of each task: "
            "a smaller `held_share` in add_inputs, or a smaller `max_rows` of the SubspaceHistory."
        )
    short = [name for name, count in counts.items() if count < len(factors[name])]
    if short:
        logger.warning(
            "%d modules, such as %r, have fewer directions outside the history than the adapter's rank: %d. The other rows of A "
            "stay zero; pass a smaller r, or keep less of each task (a smaller `held_share` in add_inputs).",
            len(short),
            short[0],
            counts[short[0]],
        )
    return counts
