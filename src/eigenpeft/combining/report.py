"""What a merge did: the numbers of all modules together, as frozen plain data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from eigenpeft.linalg.merging import MergeMeasures
from eigenpeft.linalg.scores.update_cosines import update_cosines


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """One source adapter in a merge.

    Attributes:
        name: The adapter.
        source: Where it came from.
        license: License its README names.
        weight: Weight of its update.
        n_modules: Modules it adapts.
        norm: ‖ΔW_t‖ over all modules, Frobenius.
        relative_distance: ‖ΔW - ΔW_t‖ / ‖ΔW_t‖ over all modules: 0 where the merged update is this adapter's, 1 as far away
            as the base model is; None for an untrained adapter.
        cosine: Mean cosine of its update with those of the other sources.
    """

    name: str
    source: str | None
    license: str | None
    weight: float
    n_modules: int
    norm: float
    relative_distance: float | None
    cosine: float | None


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """A merge in numbers.

    Attributes:
        rule: Name of the rule.
        title: Its name in the literature.
        paper: Where the rule comes from.
        options: What it was called with.
        calibrate: Calibrations put around it.
        scale: The λ that was asked for: a number or "auto".
        scale_range: Least and largest λ of the modules ("auto" has one for each).
        rank: Rank of every module.
        full_rank: Largest rank that the merged updates had before they were cut off.
        n_modules: Modules of the merged adapter.
        sources: One entry per source adapter.
        cosines: Cosine of the updates of every pair of sources, over the modules that both have: how far apart they are.
        norm: ‖ΔW‖ of the merged update after the cut.
        kept_share: Share of ‖ΔW‖² that the cut to `rank` kept.
        stable_rank: Mean over the modules of ‖ΔW‖² / σ₁².
        over_counting: How often the merged update counts what the sources have along its directions, as SVC measures it; 1 is
            as strong as the sources are.
        grid: What was tried to choose λ: `{"scale": ..., "score": ...}` each; empty where nothing was.
    """

    rule: str
    title: str
    paper: str
    options: dict[str, Any]
    calibrate: tuple[str, ...]
    scale: float | str
    scale_range: tuple[float, float]
    rank: int
    full_rank: int
    n_modules: int
    sources: tuple[SourceReport, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    norm: float
    kept_share: float
    stable_rank: float
    over_counting: float
    grid: tuple[dict[str, Any], ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return asdict(self)


@dataclass
class MergeTotals:
    """Sums over modules from which the report is made.

    Args:
        names: Source adapters, T of them.

    Attributes:
        inner: (T, T) sums of `⟨ΔW_s, ΔW_t⟩` over the modules that both have, float64.
        squares: `Σ ‖ΔW_t‖²` by adapter.
        distances: `Σ ‖ΔW - ΔW_t‖²` by adapter.
        n_modules: Number of modules by adapter.
        pair_norms: (T, T) sums of `‖ΔW_s‖²` over the modules that t has as well, float64.
        kept_squared_norm: `Σ ‖ΔW‖²` of what the rank kept.
        squared_norm: `Σ ‖ΔW‖²` before the rank cut it off.
        counted: Sum of the modules' over-counting times their ‖ΔW‖².
        stable_ranks: Stable rank of every module.
    """

    names: Sequence[str]
    inner: Tensor = field(init=False)
    squares: dict[str, float] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    n_modules: dict[str, int] = field(default_factory=dict)
    pair_norms: Tensor = field(init=False)
    kept_squared_norm: float = 0.0
    squared_norm: float = 0.0
    counted: float = 0.0
    stable_ranks: list[float] = field(default_factory=list)

    def __post_init__(self):
        n = len(self.names)
        self.inner, self.pair_norms = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)

    def add(self, present: Sequence[str], measures: MergeMeasures) -> None:
        """Count one module.

        Args:
            present: Adapters that have it, in the order of the measures.
            measures: Its numbers.
        """
        places = torch.tensor([list(self.names).index(name) for name in present])
        self.inner[places[:, None], places] += measures.inner_products.cpu()
        squares = measures.inner_products.diagonal().cpu()
        self.pair_norms[places[:, None], places] += squares[:, None]  # ‖ΔW_s‖² over the modules that t has as well
        for name, square, distance in zip(present, squares.tolist(), measures.distances.tolist(), strict=True):
            self.squares[name] = self.squares.get(name, 0.0) + square
            self.distances[name] = self.distances.get(name, 0.0) + distance
            self.n_modules[name] = self.n_modules.get(name, 0) + 1
        for name in set(self.names) - set(present):  # there its update is zero
            self.distances[name] = self.distances.get(name, 0.0) + measures.kept_squared_norm
        self.kept_squared_norm += measures.kept_squared_norm
        self.squared_norm += measures.squared_norm
        self.counted += measures.over_counting * measures.kept_squared_norm
        if measures.largest:
            self.stable_ranks.append(measures.squared_norm / measures.largest**2)

    def cosines(self) -> tuple[tuple[float | None, ...], ...]:
        """Cosine of every pair of sources; None where one is zero or they share no module."""
        found = update_cosines(self.inner[None], self.pair_norms[None], self.pair_norms.mT[None]).tolist()
        return tuple(tuple(None if math.isnan(value) else value for value in row) for row in found)

    def sources(self, records: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> tuple[SourceReport, ...]:
        """One entry per source adapter.

        Args:
            records: Records of the adapters, in order.
            weights: Weights of the adapters, by name.
        """
        cosines = self.cosines()
        reports = []
        for i, (name, record) in enumerate(zip(self.names, records, strict=True)):
            others = [value for j, value in enumerate(cosines[i]) if j != i and value is not None]
            square = self.squares.get(name, 0.0)
            distance = self.distances.get(name, 0.0)
            reports.append(
                SourceReport(
                    name=name,
                    source=record.get("source"),
                    license=record.get("license") or record.get("licence"),
                    weight=float(weights[name]),
                    n_modules=self.n_modules.get(name, 0),
                    norm=square**0.5,
                    relative_distance=(max(distance, 0.0) / square) ** 0.5 if square > 0 else None,
                    cosine=sum(others) / len(others) if others else None,
                )
            )
        return tuple(reports)
