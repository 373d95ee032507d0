"""The audit from end to end: group, measure every module beside its nulls, average, judge."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from huggingface_hub.utils import tqdm
from torch import nn

from eigenpeft.audit.averages import by_pair
from eigenpeft.audit.measures import ModuleMeasures, measure
from eigenpeft.audit.relatives import cluster_gain, related_findings, without_relatives
from eigenpeft.audit.report import AuditReport
from eigenpeft.audit.suitability import advice_on_task, components_at_hand, task_gradient
from eigenpeft.audit.summary import summarise
from eigenpeft.audit.verdict import advice_on_clusters
from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.diagnosis import independent_groups
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace.seeding import seeded_generator


def audit_adapters(
    collection: AdapterCollection,
    *,
    model: nn.Module | None = None,
    dataset: Any = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    n_rows: int = 64,
    n_components: int = 64,
    n_nulls: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> AuditReport:
    """Is there anything to recycle in these adapters? From their weights alone, beside matched nulls.

    For every module the share of each adapter's ‖ΔW‖² that lies in the subspace of the *others*, for every K, beside the
    same of random adapters with the same singular values and shapes. Adapters that started from one seed, or are nearly
    equal, are left out together, so that they cannot vouch for each other.

    With `model` and `dataset` also whether their subspace suits a new task: the share of that task's gradient in it before
    any training, beside random subspaces and the best of that size (`gradient_share`), which K, modules and core.

    Args:
        collection: At least three trained adapters.
        model: The base model with the new task's head, if it has one: trained, since gradients behind a fresh head are
            those of a random direction.
        dataset: Rows of the new task as a `transformers.Trainer` takes them: tokenised, with labels.
        data_collator: Makes a batch of rows, as for a Trainer; default: `transformers.default_data_collator`, which needs
            rows of one length.
        n_rows: Rows of the data set to use, from the first, in batches of 8.
        n_components: Largest K looked at.
        n_nulls: Draws of random adapters.
        seed: Of the nulls and the bootstrap.
        progress: Show a progress bar.

    Returns:
        `AuditReport`; its `verdict` and `advice` say it in words.

    Raises:
        SubspaceError: If an argument is out of range, fewer than three adapters change anything, or the model has none of
            their modules.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    if (model is None) != (dataset is None):
        given, missing = ("dataset", "model") if model is None else ("model", "dataset")
        raise SubspaceError(f"audit got {given}= without {missing}=; the gradient of a new task needs both.")
    for name, value in (("n_components", n_components), ("n_nulls", n_nulls), ("n_rows", n_rows)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SubspaceError(f"{name}={value!r} must be a whole number of at least 1.")
    findings = list(collection.diagnose(progress=progress))
    untrained = {name for finding in findings if finding.kind == "untrained" for name in finding.adapters}
    names = tuple(name for name in collection.names if name not in untrained)
    if len(names) < 3:
        raise SubspaceError(
            f"An audit leaves adapters out and needs at least 3 that change something; of the {len(collection)} given, "
            f"{len(names)} do. Add adapters of the same base model."
        )
    groups = independent_groups(names, findings)
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
        raise SubspaceError("No module is changed by two adapters; there is nothing that they could share.")
    similarity = by_pair(names, [(module.adapters, module.similarity) for module in measured.values()])
    findings += related_findings(names, similarity)
    modules = tuple(measured)
    unrelated = without_relatives(
        collection, modules=modules, names=names, groups=groups, similarity=similarity, n_components=n_components
    )
    report = summarise(
        names,
        groups=groups,
        measured=measured,
        similarity=similarity,
        unrelated=unrelated,
        findings=findings,
        seed=seed,
    )
    gain = cluster_gain(
        collection, modules=modules, names=names, clusters=report.clusters, n_components=report.n_components
    )
    report = replace(report, cluster_gain=gain, advice=report.advice + advice_on_clusters(report.clusters, gain))
    if model is None:
        return report
    found = task_gradient(
        collection.subset(names),
        model,
        dataset,
        data_collator=data_collator,
        n_rows=n_rows,
        n_components=components_at_hand(report),
    )
    return replace(report, gradient=found, advice=f"{report.advice} {advice_on_task(found)}")
