"""The audit from end to end: group, measure every module beside its nulls, average, judge."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from huggingface_hub.utils import tqdm
from torch import nn

from eigenpeft.audit.adapters.averages import by_pair
from eigenpeft.audit.adapters.measures import ModuleMeasures, measure
from eigenpeft.audit.adapters.relatives import cluster_gain, related_findings, without_relatives
from eigenpeft.audit.adapters.sharing import sharing_cost
from eigenpeft.audit.answers import Train
from eigenpeft.audit.report import AuditReport, Curve
from eigenpeft.audit.summary import summarize
from eigenpeft.audit.task.calibration import Calibration, load_calibration
from eigenpeft.audit.task.reuse import reuse_answer
from eigenpeft.audit.task.suitability import advice_on_task, components_at_hand, task_gradient
from eigenpeft.audit.task.training_answer import measures_of_adapters, measures_of_task, train_answer
from eigenpeft.audit.verdict import advice_on_clusters
from eigenpeft.building.sharing import group_of
from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.diagnosis import independent_groups
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace.seeding import seeded_generator


def audit_adapters(
    collection: AdapterCollection,
    *,
    model: nn.Module | None = None,
    rows: Any = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    n_rows: int = 64,
    n_train: int = 64,
    calibration: Calibration | None = None,
    n_components: int = 64,
    n_nulls: int = 3,
    share: str | Sequence[str] | Callable[[str], str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AuditReport:
    """What can be done with these adapters? Compress them, train a new task from them, reuse one: three answers.

    *Compress*: the error against the numbers per adapter, in a subspace fitted to all of them. *Train*: the probability that a
    new task gains over LoRA, from a calibration on collections and tasks that were trained, or "unknown" where it has seen nothing
    like these adapters. *Reuse*: the adapters nearest to the task, where its rows are given.

    Behind them are measures of the weights beside matched nulls.
    For every module the share of each adapter's ‖ΔW‖² that lies in the subspace of the *others*, for every K, beside the
    same of random adapters with the same singular values and shapes. Adapters that started from one seed, or are nearly
    equal, are left out together, so that none of them is measured against its own relatives.

    With `model` and `rows` also whether their subspace suits a new task: the share of that task's gradient in it before
    any training, beside random subspaces and the best of that size (`gradient_share`), which K, modules and core.

    Args:
        collection: At least three trained adapters.
        model: The base model with the new task's head, if it has one: trained, since gradients behind a fresh head are
            those of a random direction.
        rows: Rows of the new task as a `transformers.Trainer` takes them: tokenized, with labels.
        data_collator: Makes a batch of rows, as for a Trainer; default: `transformers.default_data_collator`, which needs
            rows of one length.
        n_rows: How many of the rows to use, from the first, in batches of 8.
        n_train: Training rows that the new task has, for the second answer: few rows gain more.
        calibration: Where the probabilities of the second answer come from; default: the one that ships (docs/regimes.md).
        n_components: Largest K looked at.
        n_nulls: Draws of random adapters.
        share: Also say what banks that modules share would cost, as `SubspaceBuilder(share=...)` makes them: "layers", patterns,
            or a function of a module's name. It takes about as long as the rest, and is left out by default.
        seed: Seed of the nulls and the bootstrap.
        progress: Show a progress bar.

    Returns:
        `AuditReport`; its `compress`, `train` and `reuse` say it in words.

    Raises:
        SubspaceError: If an argument is out of range, fewer than three adapters change anything, or the model has none of
            their modules.
        CollectionError: If a tensor cannot be read or is not finite.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> for name in ("legal", "medical", "sports"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        ...     config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        ...     get_peft_model(model, config).save_pretrained(f"adapters/{name}")
        >>> collection = AdapterCollection.from_pretrained("adapters")
        >>> report = audit_adapters(collection, n_components=2, n_nulls=1, progress=False)
        >>> sorted(report.unshared)
        ['legal', 'medical', 'sports']
    """
    sizes = {"n_components": n_components, "n_nulls": n_nulls, "n_rows": n_rows, "n_train": n_train}
    _check(model, rows, sizes, share)
    findings = list(collection.diagnose(progress=progress))
    untrained = {name for finding in findings if finding.kind == "untrained" for name in finding.adapters}
    names = _enough(collection, untrained)
    n_components = min(n_components, _most_components(collection))
    groups = independent_groups(names, findings)
    measured = _measured(
        collection, groups=groups, n_components=n_components, n_nulls=n_nulls, seed=seed, progress=progress
    )
    similarity = by_pair(names, [(module.adapters, module.similarity) for module in measured.values()])
    findings += related_findings(names, similarity)
    modules = tuple(measured)
    unrelated = without_relatives(
        collection, modules=modules, names=names, groups=groups, similarity=similarity, n_components=n_components
    )
    known = calibration or load_calibration()
    answer = partial(_train, known, similarity=similarity.tolist(), n_train=n_train, collection=collection)
    report = summarize(
        names,
        groups=groups,
        measured=measured,
        similarity=similarity,
        unrelated=unrelated,
        findings=findings,
        seed=seed,
        train=answer,
    )
    report = _with_cluster_gain(report, collection, modules=modules, names=names)
    if share is not None:
        at: dict[str, Any] = {"at": report.n_components, "n_nulls": n_nulls, "seed": seed}
        found = sharing_cost(collection, share=share, measured=measured, names=names, groups=groups, **at)
        report = replace(report, sharing=found)
    if model is None:
        return report
    return _with_task(
        report, collection.subset(names), model, rows, data_collator=data_collator, n_rows=n_rows, train=answer
    )


def _most_components(collection: AdapterCollection) -> int:
    """The largest number of components that the adapters' ranks and the widths allow in any module."""
    return max(min(sum(collection.ranks(module).values()), *collection.shapes[module]) for module in collection.modules)


def _with_cluster_gain(
    report: AuditReport, collection: AdapterCollection, *, modules: tuple[str, ...], names: tuple[str, ...]
) -> AuditReport:
    gain = cluster_gain(
        collection, modules=modules, names=names, clusters=report.clusters, n_components=report.n_components
    )
    return replace(report, cluster_gain=gain, advice=report.advice + advice_on_clusters(report.clusters, gain))


def _with_task(
    report: AuditReport,
    collection: AdapterCollection,
    model: nn.Module,
    rows: Any,
    *,
    data_collator: Callable[[list[Any]], Any] | None,
    n_rows: int,
    train: Callable[..., Train],
) -> AuditReport:
    """The report with the gradient of the new task, the adapters nearest to it, and the second answer in their light."""
    gradient, near = task_gradient(
        collection,
        model,
        rows,
        data_collator=data_collator,
        n_rows=n_rows,
        n_components=components_at_hand(report),
    )
    return replace(
        report,
        gradient=gradient,
        reuse=reuse_answer(near),
        train=train(report.held_out, task=measures_of_task(gradient, near)),
        advice=f"{report.advice} {advice_on_task(gradient)}",
    )


def _check(model: nn.Module | None, rows: Any, sizes: Mapping[str, int], share: Any) -> None:
    """The arguments, before anything is read."""
    group_of(share or "layers")
    if (model is None) != (rows is None):
        given, missing = ("rows", "model") if model is None else ("model", "rows")
        raise SubspaceError(f"audit got {given}= without {missing}=; the gradient of a new task needs both.")
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SubspaceError(f"{name}={value!r} must be a whole number of at least 1.")


def _enough(collection: AdapterCollection, untrained: set[str]) -> tuple[str, ...]:
    names = tuple(name for name in collection.names if name not in untrained)
    if len(names) < 3:
        raise SubspaceError(
            f"An audit leaves adapters out and needs at least 3 that change something; of the {len(collection)} given, "
            f"{len(names)} do. Add adapters of the same base model."
        )
    return names


def _measured(
    collection: AdapterCollection,
    *,
    groups: Mapping[str, Hashable],
    n_components: int,
    n_nulls: int,
    seed: int,
    progress: bool,
) -> dict[str, ModuleMeasures]:
    measured: dict[str, ModuleMeasures] = {}
    for module in tqdm(collection.modules, desc="Auditing", unit="module", disable=not progress):
        found = measure(
            collection.factors(module),
            n_components=n_components,
            groups=groups,
            n_nulls=n_nulls,
            generator=seeded_generator(seed, module, "null"),
        )
        if found is not None:
            measured[module] = found
    if not measured:
        raise SubspaceError(
            f"None of the {len(collection.modules)} modules is changed by two adapters, so there is nothing that they could "
            "share; audit adapters that were trained on the same target modules."
        )
    return measured


def _train(
    calibration: Calibration,
    held_out: Curve,
    *,
    similarity: list[list[float]],
    n_train: int,
    collection: AdapterCollection,
    task: Mapping[str, float] | None = None,
) -> Train:
    measures = measures_of_adapters(held_out.real, held_out.null, similarity, n_rows=n_train)
    return train_answer(
        calibration,
        {**measures, **(task or {})},
        base_model=collection.base_model,
        n_rows=n_train,
        with_task=task is not None,
    )
