"""Training on top of a merge with any PEFT method: the base at W + λ ΔW, the multiplier λ, and one export of both."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from eigenpeft.combining.merged import MergedAdapter, find_module
from eigenpeft.combining.merging import merge
from eigenpeft.combining.scoring import HeldOutTask, held_out_score
from eigenpeft.combining.sources import Adapters
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.files.base_start import remember_start, start_of

logger = logging.getLogger(__name__)
GRID = (0.5, 1.0, 2.0, 3.0)
"""Multipliers that `choose_scale` tries."""


class _MergedStartConfig(LoraConfig):
    """LoRA's configuration, which says once what a folder of such an adapter does not hold."""

    _has_said = False

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's.

        Args:
            save_directory: Folder of the adapter.
            **kwargs: PEFT's own.
        """
        super().save_pretrained(save_directory, **kwargs)
        if not self._has_said:
            logger.warning(
                "%s holds what was trained on top of the merged start, and not the start itself, which is in the base model's "
                "weights. eigenpeft.export_lora(model, folder) writes one LoRA that contains both.",
                save_directory,
            )
        self._has_said = True


def init_lora_from_merge(
    model: nn.Module,
    *,
    adapters: Adapters | MergedAdapter,
    rule: str = "mean",
    scale: float | str | None = None,
    options: Mapping[str, Any] | None = None,
    r: int = 8,
    adapter_name: str = "default",
    **lora: Any,
) -> PeftModel:
    """A plain LoRA trained on top of base plus a merge; `eigenpeft.export_lora` writes one LoRA that contains both.

    The model computes `(W + λ ΔW_merged + (lora_alpha / r) B A) x`, with lora_B (out_features, r) zero and lora_A (r,
    in_features) random at the start. The merge goes into the model's weights (`merged_start`): `save_pretrained` holds
    what was trained on top of it alone, and goes on from there only on a model that was made the same way.

    Args:
        model: Base model, unquantised, without adapters; its weights are changed in place.
        adapters: What is merged, as `eigenpeft.merge` takes it; or a merge that is done.
        rule: Rule of the merge.
        scale: λ: a number, "auto" (Pico's norm, without data) or None for the rule's own; see `choose_scale` for rows.
        options: Options of the rule, such as {"density": 0.2}.
        r: Rank of what is trained.
        adapter_name: Name of the adapter.
        **lora: Further fields of `peft.LoraConfig`; `target_modules` defaults to the merge's modules, `lora_alpha` to 2 r.

    Returns:
        The adapted model. Its exports have the rank of the merge plus r.

    Raises:
        AdapterConfigError: If the model has adapters, quantised weights or a merged start already, or lacks a module or has one of
            another shape; the rule or an option is unknown; or `scale` is "auto" and the merge is finished.
        CollectionError: If the adapters cannot be read together.
        SubspaceError, ArtifactError, LostProcessError, OSError, ValueError: As `merge`.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> for name in ("legal", "sports"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        ...     config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        ...     get_peft_model(model, config).save_pretrained(f"adapters/{name}")
        >>> model = init_lora_from_merge(torch.nn.Sequential(torch.nn.Linear(8, 4)), adapters="adapters", scale=2.0, r=3)
        >>> model.peft_config["default"].r, model.peft_config["default"].lora_alpha
        (3, 6)
    """
    merged = merged_start(model, adapters=adapters, rule=rule, scale=scale, options=options)
    modules = dict(model.named_modules())
    placed = {id(find_module(modules, name)) for name in merged.factors}
    names = [name for name, module in modules.items() if id(module) in placed]
    given = {"target_modules": names, "lora_alpha": 2 * r, "fan_in_fan_out": merged.fan_in_fan_out} | lora
    adapted = get_peft_model(model, _MergedStartConfig(r=r, **given), adapter_name=adapter_name)  # pyright: ignore[reportArgumentType]
    assert isinstance(adapted, PeftModel)
    return adapted


def merged_start(
    model: nn.Module,
    *,
    adapters: Adapters | MergedAdapter,
    rule: str = "mean",
    scale: float | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> MergedAdapter:
    """Put λ times a merge into a base model's weights, to train any PEFT method on top; exports of its adapters contain it.

    `W := W + λ rule(ΔW_1, ..., ΔW_T)`, all (out_features, in_features); with the rules "task_arithmetic" and "mean" that is task
    arithmetic's (arXiv 2212.04089, section 2) `W + λ Σ ΔW_t` and `W + λ Σ ΔW_t / T`.

    Args:
        model: Base model, unquantised, without adapters; its weights are changed in place.
        adapters: What is merged, as `eigenpeft.merge` takes it; or a merge that is done.
        rule: Rule of the merge.
        scale: λ: a number, "auto" (Pico's norm, without data) or None for the rule's own.
        options: Options of the rule.

    Returns:
        The merge, λ included.

    Raises:
        AdapterConfigError: If the model has adapters, quantised weights or a merged start already, or lacks a module or has one of
            another shape; the rule or an option is unknown; or `scale` is "auto" and the merge is finished.
        CollectionError: If the adapters cannot be read together.
        SubspaceError, ArtifactError, LostProcessError, OSError, ValueError: As `merge`.

    Examples:
        >>> import eigenpeft
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> for name in ("legal", "sports"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        ...     config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        ...     get_peft_model(model, config).save_pretrained(f"adapters/{name}")
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> merged_start(base, adapters="adapters", scale=2.0).rank
        4
        >>> model = get_peft_model(base, LoraConfig(r=3, target_modules=["0"]))  # any PEFT method; train it
        >>> eigenpeft.export_lora(model, "exported")  # one LoRA of rank 4 + 3
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterConfigError("The model has adapters already; pass the base model, and adapt it afterwards.")
    if start_of(model) is not None:
        raise AdapterConfigError("The model starts at a merge already; load the base model anew for another one.")
    if isinstance(adapters, MergedAdapter):
        if isinstance(scale, str):
            raise AdapterConfigError(
                f"scale={scale!r} compares a merge with what was merged, and this merge is done; pass it to eigenpeft.merge."
            )
        merged = adapters if scale is None else adapters.scaled(scale)
    else:
        merged = merge(adapters, rule=rule, scale=scale, progress=False, **(options or {}))
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    placed: dict[str, Any] = {name: find_module(modules, name) for name in merged.factors}
    for name, module in placed.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise AdapterConfigError(
                f"{name!r} is a {type(module).__name__} whose weight cannot be added to, such as a quantised one. Start "
                "EigenLoRA at the merge instead (EigenLoraConfig(init_from='mean', init_adapters=...)), which leaves it as it is."
            )
    with torch.no_grad():
        merged.apply_to(model)
    own = {name: names[id(module)] for name, module in placed.items()}
    remember_start(
        model,
        {own[name]: factors for name, factors in merged.factors.items()},
        embeddings={own[name] for name in merged.embeddings if name in own},
    )
    return merged


def choose_scale(
    model: nn.Module,
    *,
    adapters: Adapters,
    batches: Sequence[Mapping[str, Tensor]],
    grid: Sequence[float] = GRID,
    rule: str = "mean",
    metric: str = "accuracy",
    options: Mapping[str, Any] | None = None,
) -> float:
    """The multiplier λ with which a merge does best on held-out rows: the best score of `W + λ ΔW_merged` over the grid.

    Task arithmetic (arXiv 2212.04089, section 2) chooses its λ in this way.

    Args:
        model: Base model with a head that knows the task (a head trained on the base, or a language model's own); it is left as
            it was.
        adapters: What is merged, as `eigenpeft.merge` takes it.
        batches: Held-out rows as the model takes them, `labels` included.
        grid: Multipliers to try; of equally good ones the smallest is taken.
        rule: Rule of the merge.
        metric: "accuracy" or "loss", as for `held_out_score`; "loss" for language models.
        options: Options of the rule.

    Returns:
        λ, for `scale=` or `init_scale=`.

    Raises:
        CollectionError: If the adapters cannot be read or merged together.
        AdapterConfigError: If the metric, the rule or an option is unknown, the grid is empty, the model lacks a module, or it
            gives something else than a row of logits per example.
        SubspaceError, ArtifactError, LostProcessError, OSError, ValueError: As `merge`.

    Examples:
        >>> import torch
        >>> from eigenpeft.demo import base_model, shipped_adapters
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=2)
        >>> rows = {"input_ids": torch.tensor([[101, 2204, 102], [101, 2919, 102]]), "labels": torch.tensor([1, 0])}
        >>> adapters = [shipped_adapters() / "cr", shipped_adapters() / "mr"]
        >>> choose_scale(model, adapters=adapters, batches=[rows], grid=[0.5, 1.0], metric="loss") in (0.5, 1.0)
        True
    """
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        score = held_out_score([HeldOutTask("the new task", model, batches)], metric=metric)
        merged = merge(adapters, rule=rule, scale=list(grid), score=score, progress=False, **(options or {}))
    finally:
        for module, training in was.items():
            module.training = training
    return float(merged.report.scale)
