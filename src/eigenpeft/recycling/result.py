"""The winner on disk: one plain LoRA folder that holds the merged start and what was trained on top of it."""

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel

from eigenpeft.combining import MergedAdapter
from eigenpeft.tuners.files.export import contents_of_model
from eigenpeft.tuners.files.lora_files import LoraUpdate, lora_keys, write_lora


def write_result(model: PeftModel, merged: MergedAdapter | None, folder: Path, *, base_model: str | None) -> None:
    """Write a plain LoRA: `ΔW = s B A` of the trained adapter plus the merged update, exactly (their ranks add up).

    Args:
        model: The trained model; its head is written too.
        merged: What was put into the base's weights before training, if anything.
        folder: Folder to make.
        base_model: Name that the adapter's config gets.

    Raises:
        ArtifactError: If the folder holds something that is not replaced, or cannot be written.
    """
    updates, fields, others = contents_of_model(model, "default")
    if merged is not None:
        updates = _joined(updates, merged)
    write_lora(folder, updates, {**fields, "base_model_name_or_path": base_model}, others, overwrite=True)


def _joined(updates: list[LoraUpdate], merged: MergedAdapter) -> list[LoraUpdate]:
    found = {update.target: update for update in updates}
    for module, (lora_b, lora_a) in merged.factors.items():
        own = found.get(module)
        if own is None:
            keys = lora_keys(module, is_embedding=module in merged.embeddings)
            found[module] = LoraUpdate(lora_b, lora_a, 1.0, module, keys)
            continue
        columns, rows = (each.to(own.lora_B) for each in (lora_b, lora_a))
        found[module] = replace(
            own,
            lora_B=torch.cat([own.lora_B * own.scaling, columns], dim=1),
            lora_A=torch.cat([own.lora_A, rows]),
            scaling=1.0,
        )
    return list(found.values())
