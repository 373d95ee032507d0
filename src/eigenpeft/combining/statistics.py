"""Second moments of the inputs that each adapter's task gives to every module, from a few rows without labels."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from eigenpeft.artifacts.atomic import atomic_folder
from eigenpeft.artifacts.reading import read_json
from eigenpeft.artifacts.tensor_file import read_tensors
from eigenpeft.combining.merged import MergedAdapter, find_module
from eigenpeft.combining.sources import Adapters, Sources, open_sources
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.merging import input_directions, moments_on_axes

CONFIG_NAME, TENSORS_NAME = "input_statistics.json", "input_statistics.safetensors"
Batches = Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False, kw_only=True)
class InputStatistics:
    """Sums over the inputs x of one task, on the input directions Z of all adapters that it was collected for.

    They are what RegMean (arXiv 2212.09849, equation 2) keeps of a task, `Σ x xᵀ`, restricted to Z (R, in_features), R the sum of
    the adapters' ranks. Statistics of the same adapters add up: over rows, over machines.

    Attributes:
        name: Adapter whose task the rows are of.
        grams: `Σ (Z x)(Z x)ᵀ` by module, (R, R), float64.
        counts: Number of inputs (tokens) by module.
        layout: Adapters and their numbers of directions, in the order of the rows of Z, by module.
        sha256: SHA-256 of the weights file of each adapter on disk, by adapter.
    """

    name: str
    grams: Mapping[str, Tensor]
    counts: Mapping[str, int]
    layout: Mapping[str, tuple[tuple[str, int], ...]]
    sha256: Mapping[str, str]

    def __add__(self, other: "InputStatistics") -> "InputStatistics":
        """Statistics of both sets of rows.

        Raises:
            AdapterConfigError: If the two are of other tasks or adapters.
        """
        if (self.name, dict(self.layout), dict(self.sha256)) != (other.name, dict(other.layout), dict(other.sha256)):
            raise AdapterConfigError(
                f"Statistics of {self.name!r} and {other.name!r} were not collected for one task and the same adapters, so "
                "they cannot be added; collect both with the same adapters."
            )
        grams = {module: gram + other.grams[module] for module, gram in self.grams.items()}
        counts = {module: count + other.counts[module] for module, count in self.counts.items()}
        return replace(self, grams=grams, counts=counts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all numbers, so that a merge that is resumed knows them again."""
        digest = hashlib.sha256(json.dumps(dict(self.counts), sort_keys=True).encode())
        for module in sorted(self.grams):
            digest.update(self.grams[module].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def on_axes(self, module: str, *, updates: Mapping[str, Factors], components_in: Tensor) -> Tensor:
        """`V E[x xᵀ] Vᵀ` (K_in, K_in) on the input axes of some of the adapters.

        Args:
            module: Its name.
            updates: `(lora_B (out_features, r_t), lora_A (r_t, in_features))` of those that are merged, by adapter; the statistics
                were collected for all of them.
            components_in: V (K_in, in_features), the axes that they span.

        Raises:
            AdapterConfigError: If an adapter or the module is missing, or was another one then.
        """
        starts, start = {}, 0
        for name, size in self.layout.get(module, ()):
            starts[name] = start, size
            start += size
        directions = {name: input_directions(pair) for name, pair in updates.items()}
        other = [name for name, rows in directions.items() if starts.get(name, (0, -1))[1] != len(rows)]
        if other:
            raise AdapterConfigError(
                f"The statistics of {self.name!r} for {module!r} were collected without {other[0]!r} as it is now; they know "
                f"{list(starts) or 'no adapter there'}. Collect them again for the adapters that you merge."
            )
        places = torch.cat([torch.arange(starts[name][0], sum(starts[name])) for name in directions])
        gram = self.grams[module][places[:, None], places] / max(1, self.counts[module])
        return moments_on_axes(gram, directions=list(directions.values()), components_in=components_in)


def collect_statistics(
    model: nn.Module,
    *,
    batches: Mapping[str, Batches],
    adapters: Adapters,
    names: Sequence[str] | None = None,
    merged: MergedAdapter | None = None,
    progress: bool = True,
) -> dict[str, InputStatistics]:
    """Second moments of every adapted module's inputs on each task's own rows, each adapter at work on its rows.

    For `merge(..., rule="regmean", statistics=...)`: the inputs `E_t[x xᵀ]` of RegMean (arXiv 2212.09849, equation 2) without
    an n x n matrix, R x R numbers per module and task with `R = Σ r_t`. About 50 rows per task are enough.

    With `merged`, the merged adapter is at work on the rows of every task: a layer's inputs are those that the merged layers
    before it give, as in RegMean++ (arXiv 2508.03121: `X_l` comes from the merged layers 1 to l - 1). So merging and collecting in
    turns is RegMean++ after as many turns as there are layers; fewer come near it.

    Args:
        model: The base model, without adapters; left as it is.
        batches: Inputs by adapter: what `model(**batch)` takes, one or many. Positions that a batch's
            `attention_mask` hides do not count. Labels are not needed.
        adapters: As for `merge`.
        names: As for `merge`.
        merged: What is at work on the rows; None for each task's own adapter.
        progress: Show a progress bar.

    Returns:
        Statistics by adapter, to be merged as they are, saved (`save_statistics`) or added to others.

    Raises:
        AdapterConfigError: If the model has adapters in it or lacks a module, or batches are missing for an adapter.
        CollectionError: As `merge`.
        ArtifactError: If a member of a store cannot be read.
        OSError, ValueError: As `merge`.

    Examples:
        >>> import torch
        >>> from eigenpeft.combining import collect_statistics
        >>> from eigenpeft.demo import base_model, shipped_adapters
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained(base_model())
        >>> batches = {name: {"input_ids": torch.arange(2000, 2012)[None]} for name in ("cr", "mr")}  # your tokenized rows
        >>> statistics = collect_statistics(
        ...     model, batches=batches, adapters=[shipped_adapters() / name for name in batches], progress=False
        ... )
        >>> sorted(statistics)
        ['cr', 'mr']
    """
    if isinstance(model, PeftModel):
        raise AdapterConfigError(
            "model is a PEFT model; pass the base model without adapters, which are put in one by one."
        )
    sources = open_sources(adapters, names=names)
    if set(batches) != set(sources.names):
        raise AdapterConfigError(
            f"batches are of {sorted(batches)}, the adapters are {sorted(sources.names)}; pass batches of each, or names=."
        )
    factors = {module: sources.updates(module) for module in sources.modules}
    directions = {
        module: {name: input_directions(pair) for name, pair in pairs.items()} for module, pairs in factors.items()
    }
    digests = {record["name"]: record["sha256"] for record in sources.records if record.get("sha256")}
    found = {}
    for name in tqdm(sources.names, desc="Collecting", unit="task", disable=not progress):
        counters = {
            module: _Counter(torch.cat(list(own.values())), embedding=sources.is_embedding(module))
            for module, own in directions.items()
        }
        own = {module: pairs[name] for module, pairs in factors.items() if name in pairs}
        with _at_work(model, sources=sources, updates=own if merged is None else merged.factors, counters=counters):
            for batch in _as_batches(batches[name]):
                for counter in counters.values():
                    counter.mask = batch.get("attention_mask")
                model(**batch)
        found[name] = InputStatistics(
            name=name,
            grams={module: counter.gram for module, counter in counters.items()},
            counts={module: counter.count for module, counter in counters.items()},
            layout={
                module: tuple((other, len(rows_of)) for other, rows_of in own.items())
                for module, own in directions.items()
            },
            sha256=digests,
        )
    return found


def save_statistics(statistics: Mapping[str, InputStatistics], out_dir: str | Path, *, overwrite: bool = False) -> None:
    """Write statistics of several adapters into a folder, whole or not at all.

    Args:
        statistics: As `collect_statistics` gives them.
        out_dir: Folder to make.
        overwrite: Whether to replace other statistics that are there; writing the same again is allowed without it, and
            changes nothing.

    Raises:
        ArtifactError: If it cannot be written, or something else is there.

    Examples:
        >>> save_statistics(
        ...     {"mine": InputStatistics(name="mine", grams={}, counts={}, layout={}, sha256={})}, "statistics"
        ... )
        >>> list(load_statistics("statistics"))
        ['mine']
    """
    config = {
        name: {"counts": dict(one.counts), "layout": dict(one.layout), "sha256": dict(one.sha256)}
        for name, one in statistics.items()
    }
    tensors = {
        f"{i}.{module}": gram.contiguous()
        for i, one in enumerate(statistics.values())
        for module, gram in one.grams.items()
    }
    with atomic_folder(out_dir, kind="input statistics", overwrite=overwrite) as scratch:
        save_file(tensors, scratch / TENSORS_NAME)
        (scratch / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_statistics(folder: str | Path) -> dict[str, InputStatistics]:
    """Statistics that `save_statistics` wrote.

    Args:
        folder: Its folder.

    Raises:
        ArtifactError: If they are missing or damaged.

    Examples:
        >>> save_statistics({"mine": InputStatistics(name="mine", grams={}, counts={}, layout={}, sha256={})}, "kept")
        >>> load_statistics("kept")["mine"].name
        'mine'
    """
    try:
        config = read_json(Path(folder) / CONFIG_NAME)
        tensors, _ = read_tensors(Path(folder) / TENSORS_NAME)
        return {
            name: InputStatistics(
                name=name,
                grams={module: tensors[f"{i}.{module}"] for module in entry["layout"]},
                counts={module: int(count) for module, count in entry["counts"].items()},
                layout={
                    module: tuple((str(other), int(size)) for other, size in parts)
                    for module, parts in entry["layout"].items()
                },
                sha256=entry["sha256"],
            )
            for i, (name, entry) in enumerate(config.items())
        }
    except (ArtifactError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"No statistics can be read from {str(folder)!r} ({error}); collect them again with collect_statistics."
        ) from error


class _Counter:
    """Adds up `(Z x)(Z x)ᵀ` of the inputs that a module gets."""

    def __init__(self, directions: Tensor, *, embedding: bool):
        self.directions = directions  # (R, in_features)
        self.embedding = embedding
        self.gram = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        self.count = 0
        self.mask: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        tokens = x if self.embedding else x[..., 0]
        keep = self.mask.to(torch.bool) if self.mask is not None and self.mask.shape == tokens.shape else None
        x = (x[keep] if keep is not None else x).reshape(-1, *(() if self.embedding else x.shape[-1:]))
        directions = self.directions.to(x.device)
        seen = directions[:, x].mT if self.embedding else x.to(torch.float64) @ directions.mT  # (tokens, R)
        self.gram += (seen.mT @ seen).cpu()
        self.count += len(seen)


@contextmanager
def _at_work(
    model: nn.Module,
    *,
    sources: Sources,
    updates: Mapping[str, Factors],
    counters: Mapping[str, _Counter],
) -> Iterator[None]:
    """The model in evaluation mode with updates and all counters hooked in."""
    was_training, modules, hooks = model.training, dict(model.named_modules()), []
    model.eval()
    try:
        for module, counter in counters.items():
            place: Any = find_module(modules, module)
            hooks.append(place.register_forward_pre_hook(counter))
            if module in updates:
                add = partial(_add_update, updates[module], sources.is_embedding(module))
                hooks.append(place.register_forward_hook(add))
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)


def _add_update(
    factors: Factors, embedding: bool, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    lora_B, lora_A = (side.to(output) for side in factors)
    seen = lora_A.mT[inputs[0]] if embedding else inputs[0] @ lora_A.mT
    return output + seen @ lora_B.mT


def _as_batches(batches: Batches) -> Iterable[Mapping[str, Tensor]]:
    return [batches] if isinstance(batches, Mapping) or hasattr(batches, "input_ids") else batches  # pyright: ignore[reportReturnType]
