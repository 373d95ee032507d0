"""Any folder of LoRA adapters, members of a store or adapters of a model, merged to one plain LoRA."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import nn

from eigenpeft.combining.merged import MergedAdapter
from eigenpeft.combining.modules import MergedModule, job, merge_modules
from eigenpeft.combining.report import MergeReport, MergeTotals
from eigenpeft.combining.sources import Adapters, Sources, open_sources
from eigenpeft.combining.statistics import InputStatistics
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.bases.stacking import Factors
from eigenpeft.linalg.merging import RULES, CoreSpace, check_options, core_space, find_rule, merge_updates
from eigenpeft.subspace.seeding import seeded_generator
from eigenpeft.version import __version__


def merge(
    adapters: Adapters,
    *,
    rule: str = "task_arithmetic",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    rank: int | None = None,
    scale: float | str | Sequence[float] | None = None,
    score: Callable[[MergedAdapter], float] | None = None,
    calibrate: Sequence[str] = (),
    statistics: Mapping[str, InputStatistics] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    work_dir: str | Path | None = None,
    allow_different_base_models: bool = False,
    progress: bool = True,
    **options: Any,
) -> MergedAdapter:
    """Merge LoRA adapters of one base model into one plain LoRA of one rank and one alpha.

    `ΔW = λ rule(w_1 ΔW_1, ..., w_T ΔW_T)`, cut off at `rank`; with "task_arithmetic" (arXiv 2212.04089, section 2) the
    rule is the sum. `RULES[rule].paper` names the paper of every other rule, whose function in `eigenpeft.linalg.rules`
    has its equation.

    Works on the updates `ΔW_t = s_t B_t A_t` (out_features, in_features) themselves: ranks, alphas, rsLoRA and adapted
    modules may differ, and how an update is split into factors does not matter. For every module the updates go into
    their core space (lossless, K x K instead of m x n), a published rule merges the cores, and the result is cut off
    optimally at `rank`. Heads are kept apart, one per task; biases and trained tokens are refused by name.

    Args:
        adapters: Folders of adapters, folders of such folders and Hub ids, one or many; an `AdapterCollection`; a store, whose
            members are merged; or a PEFT model, whose adapters are merged.
        rule: Name in `eigenpeft.linalg.merging.RULES`: "task_arithmetic" (default, the exact weighted sum), "mean",
            "ties", "dare", "dare_ties", "knots", "tsv", "iso_c", "iso_cts", "boosting", "svc", "pico", "wudi", "regmean" or
            "compress".
        weights: Number by adapter, or one per adapter in order; each scales that adapter's update, negative ones subtract
            it. None gives all the weight 1.
        rank: Rank of every module. None keeps everything: the largest rank that a module needs.
        scale: Final multiplier λ. A number; "auto" gives each module the (weighted) mean norm of its updates, without data
            (Pico's rule); several numbers are tried with `score`, and the best is kept; None takes the rule's own (1, or
            "auto" for "pico").
        score: Function of the merged adapter that is to be large, such as an accuracy on held-out rows; needed exactly when
            `scale` is several numbers.
        calibrate: "pico" (before) and "svc" (after) around any rule.
        statistics: Second moments of each task's inputs by adapter, from `collect_statistics`; "regmean" needs them.
        names: Merge these adapters alone.
        seed: Seed of DARE's draws.
        work_dir: Folder for finished modules, removed at the end: an interrupted merge goes on where it stopped, and the
            processes of a `torchrun` share the modules (each returns the whole merge; save it in one of them).
        allow_different_base_models: Take adapters whose configs name other base models, as long as shapes fit.
        progress: Show a progress bar.
        **options: Options of the rule, such as `density=0.2`.

    Returns:
        The merged adapter: `.save_pretrained(folder)`, `.report`, `.heads`.

    Raises:
        SubspaceError, ArtifactError, LostProcessError: If `work_dir` is of another merge, cannot be used or is damaged, a
            member of a store cannot be read, or another process of the launch is lost.
        CollectionError: If adapters cannot be read or merged together; one message names every problem.
        AdapterConfigError: If an argument is unknown or out of range, or weights or statistics do not fit.
        OSError, ValueError: If a file of an adapter is gone or was damaged since the collection was opened.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> for name in ("legal", "sports"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        ...     config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        ...     get_peft_model(model, config).save_pretrained(f"adapters/{name}")
        >>> merged = merge("adapters", rule="tsv", rank=3, progress=False)
        >>> merged.save_pretrained("merged")
        >>> merged.rank, sorted(path.name for path in Path("merged").glob("adapter*"))
        (3, ['adapter_config.json', 'adapter_model.safetensors'])
    """
    settings = _Settings(rule, scale, rank, tuple(calibrate), dict(options), seed, statistics, work_dir)
    settings.check(score=score)
    sources = open_sources(adapters, names=names, allow_different_base_models=allow_different_base_models)
    given = weights_by_name(sources.names, weights)
    _check_rank(sources, rank)
    _check_statistics(sources, settings)
    if score is None or not isinstance(scale, Sequence):
        return _merge(sources, given, settings, progress=progress)
    # λ multiplies the result of every rule, so that one merge serves the whole grid.
    settings = replace(settings, work_dir=None)
    unscaled = _merge(sources, given, replace(settings, scale=1.0), progress=progress)
    grid = []
    for factor in tqdm(scale, desc="Scoring", unit="scale", disable=not progress):
        grid.append({"scale": float(factor), "score": float(score(unscaled.scaled(float(factor))))})
    best = max(grid, key=lambda entry: (entry["score"], -entry["scale"]))
    merged = _merge(sources, given, replace(settings, scale=best["scale"]), progress=False)
    return replace(merged, report=replace(merged.report, grid=tuple(grid)))


def weights_by_name(names: Sequence[str], weights: Mapping[str, float] | Sequence[float] | None) -> dict[str, float]:
    """One finite weight for each adapter.

    Args:
        names: The adapters.
        weights: By name or in order; None for 1.

    Raises:
        AdapterConfigError: If they do not fit.
    """
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, Mapping):
        missing, foreign = (
            [name for name in names if name not in weights],
            [name for name in weights if name not in names],
        )
        if missing or foreign:
            raise AdapterConfigError(
                f"weights name {list(weights)}, the adapters are {list(names)}: "
                + (f"{missing} have none" if missing else f"{foreign} are not among them")
                + ". Pass one for each, and names= to merge fewer."
            )
        values = [weights[name] for name in names]
    else:
        values = list(weights)
        if len(values) != len(names):
            raise AdapterConfigError(
                f"{len(values)} weights do not fit {len(names)} adapters, {', '.join(map(repr, names))}; pass one for each."
            )
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterConfigError(f"The weight {value!r} of {name!r} is not a finite number; give one such as 1.0.")
    return dict(zip(names, map(float, values), strict=True))


_KINDS = {float: "number", int: "whole number", str: "word"}


@dataclass(frozen=True)
class _Settings:
    """How to merge, the same for every module."""

    rule: str
    scale: float | str | Sequence[float] | None
    rank: int | None
    calibrate: tuple[str, ...]
    options: dict[str, Any]
    seed: int
    statistics: Mapping[str, InputStatistics] | None
    work_dir: str | Path | None

    def plan(self, weights: Mapping[str, float]) -> list[tuple[str, Any]]:
        """What a merged module depends on besides the adapters, JSON-able."""
        digests = {name: one.fingerprint for name, one in (self.statistics or {}).items()}
        return [
            ("rule", self.rule),
            ("options", self.typed_options()),
            ("calibrate", list(self.calibrate)),
            ("scale", self.scale),
            ("rank", self.rank),
            ("seed", self.seed),
            ("weights", dict(weights)),
            ("statistics", digests),
            ("versions", {"eigenpeft": __version__, "torch": torch.__version__}),
        ]

    def check(self, *, score: Callable[[MergedAdapter], float] | None) -> None:
        """Find what is wrong before anything is read."""
        several = isinstance(self.scale, Sequence) and not isinstance(self.scale, str)
        if several != (score is not None):
            raise AdapterConfigError(
                f"scale={self.scale!r} with score={score!r}: several scales and a score to choose by go together; pass both, "
                "or one number or 'auto'."
            )
        for value in self.scale if isinstance(self.scale, Sequence) and several else [self.scale]:
            known = value in ("auto", None) and not several
            if not known and (
                not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value)
            ):
                raise AdapterConfigError(
                    f"scale={value!r} must be a finite number, 'auto', or None for the rule's own."
                )
        if several and not self.scale:
            raise AdapterConfigError("scale=[] names no multiplier to try; pass at least one.")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise AdapterConfigError(f"rank={self.rank!r} must be None or a whole number of at least 1.")
        for name, value in self.options.items():
            default = find_rule(self.rule).options.get(name) if self.rule in RULES else None
            kinds = (int, float) if isinstance(default, float) else (type(default),)
            if default is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise AdapterConfigError(f"{name}={value!r} must be a {_KINDS[type(default)]}, such as {default!r}.")
        try:
            check_options(self.rule, calibrate=self.calibrate, **self.typed_options())
        except ValueError as error:
            raise AdapterConfigError(str(error)) from error

    def typed_options(self) -> dict[str, Any]:
        """The rule's options, whole numbers as floats where it takes floats."""
        defaults = RULES[self.rule].options if self.rule in RULES else {}
        return {
            name: float(value) if isinstance(defaults.get(name), float) else value
            for name, value in self.options.items()
        }

    def arguments(self, module: str, updates: Mapping[str, Factors], space: CoreSpace) -> dict[str, Any]:
        """What `merge_updates` gets for one module besides the weights."""
        needs, extra = find_rule(self.rule).needs, {}
        if "seeds" in needs:
            extra["seeds"] = [seeded_generator(self.seed, module, f"dare {name}").initial_seed() for name in updates]
        if "statistics" in needs and self.statistics is not None and space.axes_in is not None:
            rows = space.axes_in.rows()
            extra["grams"] = torch.stack(
                [self.statistics[name].on_axes(module, updates=updates, components_in=rows) for name in updates]
            )
        if self.rule == "compress" and self.rank is not None:
            extra["n_components"] = self.rank
        options = {**extra, **self.typed_options()}
        settings = {"rule": self.rule, "rank": self.rank, "calibrate": self.calibrate, "scale": self.scale}
        return {**settings, "dtype": torch.float32, **options}


def _merge(sources: Sources, weights: Mapping[str, float], settings: _Settings, *, progress: bool) -> MergedAdapter:
    def merge_one(module: str) -> MergedModule:
        updates = sources.updates(module)
        space = core_space(list(updates.values()))
        try:
            arguments = settings.arguments(module, updates, space)
            return tuple(updates), merge_updates(space, weights=[weights[name] for name in updates], **arguments)
        except ValueError as error:
            raise AdapterConfigError(f"Cannot merge {module!r}: {error}") from error

    plan = {} if settings.work_dir is None else job(sources, settings.plan(weights))
    modules = merge_modules(sources, merge_one, work_dir=settings.work_dir, plan=plan, progress=progress)
    totals = MergeTotals(sources.names)
    for present, merged in modules.values():
        totals.add(present, merged.measures)
    factors = {module: (merged.lora_B, merged.lora_A) for module, (_, merged) in modules.items()}
    scales = [merged.scale for _, merged in modules.values()]
    ranks = [merged.rank for _, merged in modules.values()]
    rank = settings.rank or max(1, *ranks)
    rule = find_rule(settings.rule)
    options = {name: settings.options.get(name, value) for name, value in rule.options.items()}
    scale = rule.scale if settings.scale is None else settings.scale
    report = MergeReport(
        rule=settings.rule,
        title=rule.title,
        paper=rule.paper,
        options=options | ({"n_components": rank} if settings.rule == "compress" and settings.rank else {}),
        calibrate=settings.calibrate,
        scale=scale if isinstance(scale, str) else float(scale),  # pyright: ignore[reportArgumentType]
        scale_range=(min(scales), max(scales)),
        rank=rank,
        full_rank=max(ranks),
        n_modules=len(factors),
        sources=totals.sources(sources.records, weights),
        cosines=totals.cosines(),
        norm=math.sqrt(totals.kept_squared_norm),
        kept_share=totals.kept_squared_norm / totals.squared_norm if totals.squared_norm else 1.0,
        stable_rank=sum(totals.stable_ranks) / len(totals.stable_ranks) if totals.stable_ranks else 0.0,
        over_counting=totals.counted / totals.kept_squared_norm if totals.kept_squared_norm else 0.0,
    )
    return MergedAdapter(
        factors={module: _padded(pair, rank) for module, pair in factors.items()},
        report=report,
        heads=sources.parts.heads,
        shared=sources.parts.shared,
        records=sources.records,
        base_model=sources.base_model,
        task_type=sources.task_type,
        embeddings=frozenset(module for module in sources.modules if sources.is_embedding(module)),
        fan_in_fan_out=any(sources.fan_in_fan_out(module) for module in sources.modules),
    )


def _padded(factors: Factors, rank: int) -> Factors:
    """The same update at a larger rank: readers that know one rank for a whole adapter exist."""
    lora_B, lora_A = factors
    missing = rank - len(lora_A)
    if not missing:
        return factors
    return nn.functional.pad(lora_B, (0, missing)), nn.functional.pad(lora_A, (0, 0, 0, missing))


def _check_rank(sources: Sources, rank: int | None) -> None:
    most = max(sources.largest_rank(module) for module in sources.modules)
    if rank is not None and rank > most:
        raise AdapterConfigError(
            f"rank={rank} is too large: no module's merged update can have more than {most}, the ranks of the "
            f"{len(sources.names)} adapters together or its smaller side. Pass at most {most}, or leave rank out."
        )


def _check_statistics(sources: Sources, settings: _Settings) -> None:
    if "statistics" not in find_rule(settings.rule).needs:
        return
    known = settings.statistics or {}
    missing = [name for name in sources.names if name not in known]
    if missing:
        raise AdapterConfigError(
            f"rule={settings.rule!r} needs statistics of each task's inputs, and {', '.join(map(repr, missing[:5]))} "
            f"({len(missing)} of {len(sources.names)}) have none. Pass statistics=collect_statistics(model, batches=..., "
            "adapters=...), or choose a rule without data."
        )
    digests = {record["name"]: record.get("sha256") for record in sources.records}
    for name, digest in digests.items():
        for one in known.values():
            if digest and one.sha256.get(name, digest) != digest:
                raise AdapterConfigError(
                    f"The statistics of {one.name!r} were collected when {name!r} had other weights; collect them again."
                )
