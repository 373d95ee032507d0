"""A merged adapter: one plain LoRA in memory, with its report and its sources' heads, and its folder on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from eigenpeft.combining.card import merged_card
from eigenpeft.combining.heads import head_files
from eigenpeft.combining.report import MergeReport
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.tuners.files.lora_files import MERGE_REPORT, LoraUpdate, lora_keys, write_lora
from eigenpeft.tuners.layers.kinds import factor_dicts

_TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True, eq=False, kw_only=True)
class MergedAdapter:
    """What `merge` gives: `ΔW = lora_B @ lora_A` of every module, all of one rank.

    Attributes:
        factors: `(lora_B (out_features, rank), lora_A (rank, in_features))` by module, float32; the scaling is 1.
        report: What the merge did.
        heads: Heads of the source adapters, by adapter and key of PEFT's state dict; never merged.
        shared: Copies of the base model's weights that all sources hold; written as they are.
        records: Records of the source adapters.
        base_model: Base model, if known.
        task_type: PEFT's task type, where all sources agree.
        embeddings: Modules that are embeddings.
        fan_in_fan_out: Whether base weights are stored transposed (GPT-2's Conv1D).
    """

    factors: Mapping[str, Factors]
    report: MergeReport
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    records: tuple[dict[str, Any], ...] = ()
    base_model: str | None = None
    task_type: str | None = None
    embeddings: frozenset[str] = frozenset()
    fan_in_fan_out: bool = False

    @property
    def rank(self) -> int:
        """Rank of every module."""
        return self.report.rank

    def scaled(self, scale: float) -> "MergedAdapter":
        """The same adapter, all updates times a number; the report keeps the numbers of the merge it came from.

        Args:
            scale: The number.
        """
        return replace(self, factors={name: (scale * B, A) for name, (B, A) in self.factors.items()})

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        head: str | None = None,
        overwrite: bool = False,
        inputs: Sequence[str | Path] = (),
    ) -> None:
        """Write a plain LoRA folder that PEFT alone loads: one rank and one alpha, a model card, and a report as JSON.

        Heads are written beside it, one per source adapter, as `heads/<name>/head.safetensors` (see `load_head`).

        Args:
            save_directory: Folder to make.
            head: Name of the source adapter whose head becomes the merged adapter's own; a merge of one adapter keeps its
                own without being asked.
            overwrite: Whether to replace an adapter that eigenpeft wrote there; one that was trained is never replaced.
            inputs: Paths that were read; the folder must not be one of them or lie inside one.

        Raises:
            AdapterConfigError: If there is no head of that name.
            ArtifactError: If the folder holds something that is not replaced, or cannot be written.
        """
        head = next(iter(self.heads)) if head is None and len(self.report.sources) == 1 and self.heads else head
        if head is not None and head not in self.heads:
            raise AdapterConfigError(f"head={head!r} is not one of {sorted(self.heads)}, whose heads were kept.")
        own = dict(self.heads[head]) if head is not None else {}
        updates = [
            LoraUpdate(lora_B, lora_A, 1.0, module, lora_keys(module, is_embedding=module in self.embeddings))
            for module, (lora_B, lora_A) in self.factors.items()
        ]
        # PEFT's models of these tasks ask for a trained head in the file, which is kept apart here.
        task_type = self.task_type if own or self.task_type not in _TASKS_WITH_HEADS else None
        fields = {
            "task_type": task_type,
            "base_model_name_or_path": self.base_model,
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": sorted({_module_of(key) for key in own}) or None,
        }
        report = json.dumps(self.report.to_dict(), indent=2, allow_nan=False) + "\n"
        files = {
            **head_files(self.heads),
            MERGE_REPORT: report.encode(),
            "README.md": merged_card(
                self.report, records=self.records, base_model=self.base_model, heads=tuple(self.heads)
            ).encode(),
        }
        write_lora(
            Path(save_directory),
            updates=updates,
            fields=fields,
            others=own | dict(self.shared),
            files=files,
            overwrite=overwrite,
            inputs=inputs,
        )

    @torch.no_grad()
    def add_to(self, model: PeftModel, *, adapter_name: str = "merged") -> None:
        """Put the merged adapter into a PEFT model of LoRA adapters, beside them; it becomes no adapter's head.

        Args:
            model: A PEFT model on the same base.
            adapter_name: Name it gets.

        Raises:
            AdapterConfigError: If the name is taken, or a module is not in the model.
        """
        if adapter_name in model.peft_config:
            raise AdapterConfigError(
                f"adapter_name={adapter_name!r} is taken; the model has {list(model.peft_config)}."
            )
        modules = dict(model.get_base_model().named_modules())
        places = {name: find_module(modules, name) for name in self.factors}
        names = [name for name, module in modules.items() if any(module is place for place in places.values())]
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=names,
            fan_in_fan_out=self.fan_in_fan_out,
            lora_dropout=0.0,
        )
        model.add_adapter(adapter_name, config)
        layers = dict(model.get_base_model().named_modules())
        for name, (lora_B, lora_A) in self.factors.items():
            for side, values in zip(factor_dicts(find_module(layers, name)), (lora_A, lora_B), strict=True):  # pyright: ignore[reportArgumentType]
                factor = side[adapter_name]
                getattr(factor, "weight", factor).data.copy_(values)

    @torch.no_grad()
    def apply_to(self, model: nn.Module, *, scale: float = 1.0) -> None:
        """Add the update to the weights of a base model, in place; `scale=-1` takes it away again, up to rounding.

        Args:
            model: The base model, its modules named as in the adapters.
            scale: Multiplier.

        Raises:
            AdapterConfigError: If a module is not in the model, or has another shape there.
        """
        modules = dict(model.named_modules())
        for name, (lora_B, lora_A) in self.factors.items():
            module: Any = find_module(modules, name)
            delta = (scale * lora_B @ lora_A).to(module.weight)
            turned = delta.mT if self.fan_in_fan_out or name in self.embeddings else delta
            if turned.shape != module.weight.shape:
                raise AdapterConfigError(
                    f"{name!r} is {tuple(module.weight.shape)} in the model and {tuple(turned.shape)} in the merged adapter; "
                    "pass the base model of the adapters."
                )
            module.weight += turned


def find_module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The module of a name, or the only one whose name ends in it (or that it ends in).

    Args:
        modules: `dict(model.named_modules())`.
        name: As in the adapters.

    Raises:
        AdapterConfigError: If there is none, or several.
    """
    if name in modules:
        return modules[name]
    fits = [other for other in modules if other.endswith(f".{name}") or (other and name.endswith(f".{other}"))]
    if len(fits) != 1:
        raise AdapterConfigError(
            f"{name!r} is {len(fits)} times in the model; pass the base model of the adapters, without adapters in it."
        )
    return modules[fits[0]]


def _module_of(key: str) -> str:
    return key.removeprefix("base_model.model.").rpartition(".")[0]
