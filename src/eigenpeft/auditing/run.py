"""The audit from end to end: group, measure every module beside its nulls, average, judge."""

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from eigenpeft.auditing.measures import ModuleMeasures, Shares, measure
from eigenpeft.auditing.report import AuditReport, Curve, ModuleAudit
from eigenpeft.auditing.verdict import HeldOutCurves, choose_n_components, judge
from eigenpeft.collection import AdapterCollection
from eigenpeft.collection.diagnosis import Finding
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace.seeding import seeded_generator

# Mean cosine of ΔW above which two adapters are told to be related; independent ones have about 1 / √(m n) of each other.
RELATED_COSINE = 0.2
_N_BOOTSTRAP = 1000


def audit(
    collection: AdapterCollection, *, n_components: int = 64, n_nulls: int = 3, seed: int = 0, progress: bool = True
) -> AuditReport:
    """Is there anything to recycle in these adapters? From their weights alone, beside matched nulls.

    For every module the share of each adapter's ‖ΔW‖² that lies in the subspace of the *others*, for every K, beside the
    same of random adapters with the same singular values and shapes. Adapters that started from one seed, or are nearly
    equal, are left out together, so that they cannot vouch for each other.

    Args:
        collection: At least three trained adapters.
        n_components: Largest K looked at.
        n_nulls: Draws of random adapters.
        seed: Of the nulls and the bootstrap.
        progress: Show a progress bar.

    Returns:
        `AuditReport`; its `verdict` and `advice` say it in words.

    Raises:
        SubspaceError: If an argument is out of range, or fewer than three adapters change anything.
        CollectionError: If a tensor cannot be read or is not finite.
    """
    for name, value in (("n_components", n_components), ("n_nulls", n_nulls)):
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
    groups = _groups(names, findings)
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
    similarity = _similarity(names, measured)
    findings += _related(names, similarity)
    return _report(names, groups, measured, similarity, findings, seed=seed)


def _groups(names: Sequence[str], findings: Sequence[Finding]) -> dict[str, Hashable]:
    """Adapter to a label, the same for those that share a start or a run."""
    label: dict[str, Hashable] = {name: name for name in names}
    for finding in findings:
        if finding.kind in ("same_start", "near_duplicate"):
            members = [name for name in finding.adapters if name in label]
            merged = {label[name] for name in members}
            for name in names:
                if label[name] in merged:
                    label[name] = label[members[0]]
    return label


def _report(
    names: tuple[str, ...],
    groups: dict[str, Hashable],
    measured: dict[str, ModuleMeasures],
    similarity: Tensor,
    findings: Sequence[Finding],
    *,
    seed: int,
) -> AuditReport:
    generator = torch.Generator().manual_seed(seed)
    resample = torch.randint(len(names), (_N_BOOTSTRAP, len(names)), generator=generator)
    modules = list(measured.values())

    def curve(of: Callable[[Shares], Tensor], draws: Callable[[ModuleMeasures], Sequence[Shares]]) -> Curve:
        real = _by_adapter(names, modules, lambda module: of(module.real))
        nulls = [
            _by_adapter(names, modules, lambda module, i=i: of(draws(module)[i])).nanmean(dim=0)
            for i in range(min(len(draws(module)) for module in modules))
        ]
        means = real[resample].nanmean(dim=1)
        low, high = means.nanquantile(0.05, dim=0), means.nanquantile(0.95, dim=0)
        return _curve(real.nanmean(dim=0), torch.stack(nulls), low=low, high=high)

    independent = attrgetter("nulls")
    held_out = curve(attrgetter("held_out.both"), independent)
    alone = curve(attrgetter("held_out_alone.both"), independent)
    alone_in = curve(attrgetter("held_out_alone.inside"), independent)
    one_group = len(set(groups.values())) == 1
    together = curve(attrgetter("held_out_alone.both"), attrgetter("seed_nulls")) if one_group else held_out
    n_components = choose_n_components(together.real)
    judgement = judge(HeldOutCurves(together, alone, alone_in), n_components=n_components)
    by_adapter = _by_adapter(names, modules, attrgetter("real.held_out.both"))[:, n_components - 1]
    members: dict[Hashable, tuple[str, ...]] = {}
    for name in names:
        members[groups[name]] = (*members.get(groups[name], ()), name)
    explained = [torch.stack([module.real.explained for module in modules]).mean(dim=0)]
    null_explained = torch.stack(
        [
            torch.stack([draw.explained for draw in draws]).mean(dim=0)
            for draws in zip(*(m.nulls for m in modules), strict=True)
        ]
    )
    return AuditReport(
        verdict=judgement.verdict,
        advice=judgement.advice,
        n_components=n_components,
        adapters=names,
        groups=tuple(group for group in members.values() if len(group) > 1),
        explained=_curve(explained[0], null_explained),
        held_out=held_out,
        held_out_alone=alone,
        held_out_in=curve(attrgetter("held_out.inside"), independent),
        held_out_alone_in=alone_in,
        outside={name: 1.0 - float(share) for name, share in zip(names, by_adapter, strict=True)},
        similarity=tuple(tuple(float(value) for value in row) for row in similarity),
        modules={name: _module(module) for name, module in measured.items()},
        findings=tuple(findings),
        weighting="equal",
        seed=seed,
    )


def _module(module: ModuleMeasures) -> ModuleAudit:
    ranks = torch.tensor([draw.effective_ranks for draw in module.nulls]).mean(dim=0)
    return ModuleAudit(
        shape=module.shape,
        n_adapters=len(module.adapters),
        effective_rank_in=module.real.effective_ranks[0],
        effective_rank_out=module.real.effective_ranks[1],
        null_effective_rank_in=float(ranks[0]),
        null_effective_rank_out=float(ranks[1]),
        explained=_curve(module.real.explained, torch.stack([draw.explained for draw in module.nulls])),
        held_out=_curve(
            module.real.held_out.both.mean(dim=0),
            torch.stack([draw.held_out.both.mean(dim=0) for draw in module.nulls]),
        ),
    )


def _curve(real: Tensor, nulls: Tensor, *, low: Tensor | None = None, high: Tensor | None = None) -> Curve:
    """`real` (K,), `nulls` (draws, K)."""
    ends = (real if low is None else low, real if high is None else high)
    values = (real, *ends, nulls.mean(dim=0), nulls.amax(dim=0))
    return Curve(*(tuple(float(share) for share in value) for value in values))


def _by_adapter(
    names: Sequence[str], modules: Sequence[ModuleMeasures], of: Callable[[ModuleMeasures], Tensor]
) -> Tensor:
    """(n, K): mean over the modules that an adapter has, NaN where it has none that was measured."""
    index = {name: i for i, name in enumerate(names)}
    width = of(modules[0]).shape[1]
    total, count = torch.zeros(len(names), width, dtype=torch.float64), torch.zeros(len(names), 1)
    for module in modules:
        where = torch.tensor([index[name] for name in module.adapters])
        total[where] += of(module)
        count[where] += 1
    return total / count


def _similarity(names: Sequence[str], measured: dict[str, ModuleMeasures]) -> Tensor:
    """(n, n): mean cosine over the modules that both adapters have; 0 where they have none in common."""
    index = {name: i for i, name in enumerate(names)}
    total, count = (torch.zeros(len(names), len(names), dtype=torch.float64) for _ in range(2))
    for module in measured.values():
        where = torch.tensor([index[name] for name in module.adapters])
        total[where[:, None], where[None, :]] += module.similarity
        count[where[:, None], where[None, :]] += 1
    return total / count.clamp(min=1)


def _related(names: Sequence[str], similarity: Tensor) -> list[Finding]:
    found = []
    for i, j in (similarity.triu(diagonal=1) > RELATED_COSINE).nonzero().tolist():
        cosine = float(similarity[i, j])
        message = (
            f"{names[i]!r} and {names[j]!r} have related updates (mean cosine {cosine:.2f} over the modules that both have), "
            "as runs on the same data have: what they share says little about other tasks."
        )
        found.append(Finding("related", (str(names[i]), str(names[j])), message, cosine))
    return found
