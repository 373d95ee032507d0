"""The merged modules of one merge: made here, by another process of the launch, or before an interruption."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from eigenpeft.building.team import Team
from eigenpeft.building.work_folder import Shards
from eigenpeft.combining.sources import Sources
from eigenpeft.errors import AdapterConfigError, CollectionError
from eigenpeft.linalg.merging import MergedUpdate, MergeMeasures

logger = logging.getLogger(__name__)
MergedModule = tuple[tuple[str, ...], MergedUpdate]
"""Adapters that have a module, and their merged update."""
_NAMES = ("lora_B", "lora_A", "numbers", "inner_products", "distances", "present")


def merge_modules(
    sources: Sources,
    merge_one: Callable[[str], MergedModule],
    *,
    work_dir: str | Path | None,
    plan: Mapping[str, Any],
    progress: bool,
) -> dict[str, MergedModule]:
    """Merge every module once, whatever the number of processes and interruptions.

    Args:
        sources: What is merged.
        merge_one: Merges one module.
        work_dir: Folder for finished modules, removed at the end; None keeps them in memory, in this process alone.
        plan: Everything the result depends on, JSON-able.
        progress: Show a progress bar.

    Returns:
        Merged modules by name, in every process.

    Raises:
        ArtifactError, LostProcessError: If `work_dir` cannot be used or is damaged, or another process of the launch is lost.
        CollectionError: If an adapter cannot be read.
        AdapterConfigError: If a module cannot be merged as asked.
        SubspaceError: If the work folder belongs to another job.
    """
    if work_dir is None:
        bar = tqdm(sources.modules, desc="Merging", unit="module", disable=not progress)
        return {module: merge_one(module) for module in bar}
    team, shards = Team.of_this_launch(), Shards(work_dir, {**plan, "modules": list(sources.modules)})
    team.gather([], doing="opening the work folder")  # what others are writing is not of a killed process
    if team.is_main:
        shards.forget_damaged()
    team.gather([], doing="looking at what was finished before")
    left = [module for module in sources.modules if module not in shards]
    if len(left) < len(sources.modules) and team.is_main:
        logger.info("%d of %d modules were finished before", len(sources.modules) - len(left), len(sources.modules))
    team.gather([], doing="starting")  # everybody has seen what is left before anybody finishes a module
    problems: list[CollectionError | AdapterConfigError] = []
    own = team.part({module: float(sources.largest_rank(module)) for module in left})
    for module in tqdm(own, desc="Merging", unit="module", disable=not progress or not team.is_main):
        try:
            present, merged = merge_one(module)
        except (CollectionError, AdapterConfigError) as error:
            problems.append(error)
            break
        places = [sources.names.index(name) for name in present]
        shards.save_tensors(module, _tensors(merged) | {"present": torch.tensor(places)})
    problems = team.gather(problems, doing="merging modules")
    if problems:
        raise problems[0]
    merged = {}
    for module in sources.modules:
        tensors = shards.load_tensors(module, names=_NAMES)
        present = tuple(sources.names[place] for place in tensors["present"].tolist())
        merged[module] = present, _merged_update(tensors)
    team.gather([], doing="reading the merged modules")
    if team.is_main:
        shards.remove()
    return merged


def _tensors(merged: MergedUpdate) -> dict[str, torch.Tensor]:
    measures = merged.measures
    numbers = [
        merged.scale,
        merged.rank,
        measures.squared_norm,
        measures.kept_squared_norm,
        measures.largest,
        measures.over_counting,
    ]
    tensors = {
        "lora_B": merged.lora_B,
        "lora_A": merged.lora_A,
        "numbers": torch.tensor(numbers, dtype=torch.float64),
        "inner_products": measures.inner_products,
        "distances": measures.distances,
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _merged_update(tensors: Mapping[str, torch.Tensor]) -> MergedUpdate:
    scale, rank, squared_norm, kept, largest, over_counting = tensors["numbers"].tolist()
    measures = MergeMeasures(
        inner_products=tensors["inner_products"],
        distances=tensors["distances"],
        squared_norm=squared_norm,
        kept_squared_norm=kept,
        largest=largest,
        over_counting=over_counting,
    )
    return MergedUpdate(
        lora_B=tensors["lora_B"], lora_A=tensors["lora_A"], scale=scale, rank=int(rank), measures=measures
    )


def job(sources: Sources, settings: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Everything that a merged module depends on, JSON-able.

    Args:
        sources: What is merged: adapters on disk.
        settings: Names and values.

    Raises:
        AdapterConfigError: If the sources are not files, which alone can be known again later.
    """
    digests = {record["name"]: record.get("sha256") for record in sources.records}
    if not all(digests.values()):
        raise AdapterConfigError(
            "work_dir is for adapters on disk; members of a store and adapters of a model need none."
        )
    return {"job": "merge", "adapters": digests, **dict(settings)}
