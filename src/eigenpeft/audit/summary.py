"""From the measures of all modules to the report: averages beside their nulls, intervals over adapters, a verdict."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from eigenpeft.audit.adapters.averages import by_adapter, by_pair
from eigenpeft.audit.adapters.compression import compress_answer
from eigenpeft.audit.adapters.groups import clusters
from eigenpeft.audit.adapters.measures import ModuleMeasures, Shares
from eigenpeft.audit.answers import Train
from eigenpeft.audit.report import AuditReport, Curve, ModuleAudit
from eigenpeft.audit.task.reuse import reuse_answer
from eigenpeft.audit.verdict import HeldOutCurves, judge
from eigenpeft.collection.diagnosis import Finding
from eigenpeft.linalg.scores.leave_one_out import choose_n_components

_N_BOOTSTRAP = 1000


@dataclass(frozen=True)
class _Averages:
    """Curves over adapters and modules.

    Attributes:
        names: The n adapters.
        modules: Measures of every module.
        resample: (draws, n), adapters drawn with replacement.
    """

    names: tuple[str, ...]
    modules: tuple[ModuleMeasures, ...]
    resample: Tensor

    def curve(self, which: str, *, nulls: str = "nulls") -> Curve:
        """The curve at an attribute path of `Shares`, such as "held_out.both", beside that of the draws named."""
        of: Callable[[Shares], Tensor] = attrgetter(which)
        draws: Callable[[ModuleMeasures], Sequence[Shares]] = attrgetter(nulls)
        means = [
            by_adapter(self.names, [(m.adapters, of(draws(m)[i])) for m in self.modules]).nanmean(dim=0)
            for i in range(min(len(draws(module)) for module in self.modules))
        ]
        return self.with_interval(self.shares(which), torch.stack(means))

    def shares(self, which: str) -> Tensor:
        """(n, K) of the real adapters."""
        of: Callable[[Shares], Tensor] = attrgetter(which)
        return by_adapter(self.names, [(module.adapters, of(module.real)) for module in self.modules])

    def with_interval(self, real: Tensor, nulls: Tensor) -> Curve:
        """The mean of (n, K) with its bootstrap interval, beside (draws, K)."""
        means = real[self.resample].nanmean(dim=1)
        low, high = means.nanquantile(0.05, dim=0), means.nanquantile(0.95, dim=0)
        return _curve(real.nanmean(dim=0), nulls, low=low, high=high)


def summarize(
    names: tuple[str, ...],
    *,
    groups: Mapping[str, Hashable],
    measured: Mapping[str, ModuleMeasures],
    similarity: Tensor,
    unrelated: Tensor | None,
    findings: Sequence[Finding],
    seed: int,
    train: Callable[[Curve], Train],
) -> AuditReport:
    """The report of the adapters alone, but for the gain of clusters.

    Args:
        names: Trained adapters.
        groups: Adapter to the label of those that it was left out with.
        measured: Module name to its measures.
        similarity: (n, n) mean cosines of ΔW.
        unrelated: (n, K) held-out shares without relatives, if these change anything.
        findings: What was noticed.
        seed: Seed of the bootstrap.
        train: The second answer, from the held-out shares.
    """
    generator = torch.Generator().manual_seed(seed)
    resample = torch.randint(len(names), (_N_BOOTSTRAP, len(names)), generator=generator)
    averages = _Averages(names, tuple(measured.values()), resample)
    held_out, alone = averages.curve("held_out.both"), averages.curve("held_out_alone.both")
    alone_in = averages.curve("held_out_alone.input")
    n_groups = len(set(groups.values()))
    together = averages.curve("held_out_alone.both", nulls="seed_nulls") if n_groups == 1 else held_out
    strangers = None
    if unrelated is not None:  # random adapters have no relatives: their null is the same
        strangers = averages.with_interval(unrelated, torch.tensor([held_out.null]))
        strangers = replace(strangers, null_high=held_out.null_high)
    n_components = choose_n_components(torch.tensor(together.real), chance=torch.tensor(together.null))
    judgement = judge(
        HeldOutCurves(together, alone, alone_in, grouped=n_groups < len(names), unrelated=strangers),
        n_components=n_components,
    )
    own = averages.shares("held_out.both")[:, n_components - 1]
    return AuditReport(
        compress=compress_answer(measured, n_adapters=len(names)),
        train=train(held_out),
        reuse=reuse_answer(None),
        verdict=judgement.verdict,
        advice=judgement.advice,
        n_components=n_components,
        adapters=names,
        groups=_larger_groups(names, groups),
        clusters=clusters(names, by_pair(names, [(m.adapters, m.overlap) for m in measured.values()])),
        cluster_gain=None,
        explained=_explained(averages.modules),
        held_out=held_out,
        held_out_alone=alone,
        held_out_unrelated=strangers,
        held_out_input=averages.curve("held_out.input"),
        held_out_alone_input=alone_in,
        held_out_output=averages.curve("held_out.output"),
        unshared={name: 1.0 - float(share) for name, share in zip(names, own, strict=True)},
        similarity=tuple(tuple(float(value) for value in row) for row in similarity),
        modules={name: _module(module) for name, module in measured.items()},
        findings=tuple(findings),
        weighting="equal",
        seed=seed,
    )


def _larger_groups(names: Sequence[str], groups: Mapping[str, Hashable]) -> tuple[tuple[str, ...], ...]:
    members: dict[Hashable, tuple[str, ...]] = {}
    for name in names:
        members[groups[name]] = (*members.get(groups[name], ()), name)
    return tuple(group for group in members.values() if len(group) > 1)


def _explained(modules: Sequence[ModuleMeasures]) -> Curve:
    draws = zip(*(module.nulls for module in modules), strict=True)
    nulls = [torch.stack([shares.explained for shares in draw]).mean(dim=0) for draw in draws]
    return _curve(torch.stack([module.real.explained for module in modules]).mean(dim=0), torch.stack(nulls))


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

    def plain(shares: Tensor) -> tuple[float, ...]:
        return tuple(float(share) for share in shares)

    return Curve(
        real=plain(real),
        low=plain(real if low is None else low),
        high=plain(real if high is None else high),
        null=plain(nulls.mean(dim=0)),
        null_high=plain(nulls.amax(dim=0)),
    )
