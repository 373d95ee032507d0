"""What spoils a subspace without being an error: untrained, diverged and repeated adapters, shared random starts."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import torch
from torch import Tensor

from eigenpeft.collection.adapter import AdapterFactors
from eigenpeft.linalg.factored import frobenius_norm

# Adapters are compared pairwise on this many modules each: enough to tell a shared start or run from chance, few enough
# for hundreds of adapters.
MODULES_COMPARED = 4
# Independent random starts have cosines of about 0.01 (8192 entries); training moves lora_A little.
SAME_START_COSINE = 0.5
NEAR_DUPLICATE_COSINE = 0.9
# Both rules must hold: far from the others' spread (Iglewicz and Hoaglin's modified z-score of the log norms), and far
# in plain numbers, for collections whose norms hardly spread at all.
OUTLIER_Z_SCORE = 3.5
OUTLIER_RATIO = 10.0
_ENTRIES_COMPARED = 8192
_SKETCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something noticed about adapters that is not an error.

    Attributes:
        kind: "untrained", "outlier_norm", "same_start", "near_duplicate", "kept_aside", "missing_modules",
            "aligned_names", "unknown_fields", "adapters_below" or "fewer_components".
        adapters: Names of the adapters concerned.
        message: One sentence, complete by itself.
        value: The number behind it: a norm, a cosine, a count.
    """

    kind: str
    adapters: tuple[str, ...]
    message: str
    value: float | None = None


class Diagnosis:
    """Gathers findings while somebody reads a collection module by module, so that nothing is read twice.

    - "untrained": ΔW = 0 in every module.
    - "outlier_norm": an adapter's ‖ΔW‖ (over all modules) is more than 10 times the median and its log more than 3.5
      scaled median absolute deviations above the median log; of trained adapters, if there are at least three.
    - "same_start": adapters whose lora_A have a mean cosine above 0.5: trained from one random start (one seed), whose
      directions they share without having learnt them. Compared between equal ranks, on up to 8192 evenly spaced
      entries per module.
    - "near_duplicate": adapters whose ΔW have a mean cosine above 0.9, such as checkpoints of one run. Estimated from
      random projections of ΔW to 64 x 64 numbers (exact for modules no larger than that); the standard error is about
      0.02 per module near the threshold, less elsewhere.

    The two pairwise rules look at a few modules only. They skip a module when each of its adapters has already been
    compared on 4 modules. Groups are connected components: each member is close to at least one other.

    Example:
        >>> import torch
        >>> diagnosis = Diagnosis()
        >>> zero = AdapterFactors("untouched", lora_A=torch.ones(2, 8), lora_B=torch.zeros(8, 2))
        >>> diagnosis.observe("layer.0.query", factors=[zero])
        >>> [finding.kind for finding in diagnosis.findings()]
        ['untrained']
    """

    def __init__(self):
        self._squares: dict[str, float] = {}
        self._times_compared: dict[str, int] = {}
        self._starts = _PairMeans()
        self._updates = _PairMeans()

    @property
    def norms(self) -> dict[str, float]:
        """Adapter to ‖ΔW‖ over all modules observed, Frobenius, scaling included."""
        return {name: math.sqrt(square) for name, square in self._squares.items()}

    def observe(self, module: str, *, factors: Sequence[AdapterFactors]) -> None:
        """Take note of one module; call it once per module.

        Args:
            module: Name of the module.
            factors: What `AdapterCollection.factors` gives for it.
        """
        del module  # The rules ask how often adapters were compared, not where.
        names = [read.adapter for read in factors]
        self.observe_norms(names, norms=[float(frobenius_norm(read.lora_B, read.lora_A)) for read in factors])
        if self.compares(names):
            self.compare(factors)

    def observe_norms(self, names: Sequence[str], *, norms: Sequence[float]) -> None:
        """The part of `observe` that needs no factors, for somebody who knows the norms.

        Args:
            names: Adapters that have the module.
            norms: Their ‖ΔW‖ on it.

        Raises:
            ValueError: If there is not one norm for each name.
        """
        for name, norm in zip(names, norms, strict=True):
            self._squares[name] = self._squares.get(name, 0.0) + norm**2

    def compares(self, names: Sequence[str]) -> bool:
        """Whether the pairwise rules want to see a module that these adapters have.

        Args:
            names: Adapters that have the module.
        """
        return any(self._times_compared.get(name, 0) < MODULES_COMPARED for name in names)

    def compare(self, factors: Iterable[AdapterFactors]) -> None:
        """The part of `observe` for the pairwise rules; for modules that `compares` asks for.

        Args:
            factors: Those of all adapters that have the module; looked at once, one after another.
        """
        starts: dict[int, dict[str, Tensor]] = {}
        sketches: dict[str, Tensor] = {}
        for read in factors:
            self._times_compared[read.adapter] = self._times_compared.get(read.adapter, 0) + 1
            starts.setdefault(len(read.lora_A), {})[read.adapter] = _start(read)
            sketches[read.adapter] = _sketch(read)
        for rows in [*starts.values(), sketches]:
            comparison = self._updates if rows is sketches else self._starts
            if rows:
                comparison.add(list(rows), torch.stack(list(rows.values())))

    def findings(self) -> tuple[Finding, ...]:
        """All findings so far, in a fixed order: untrained, outlier_norm, same_start, near_duplicate."""
        return (*self._untrained(), *self._outliers(), *self._same_starts(), *self._near_duplicates())

    def _untrained(self) -> Iterator[Finding]:
        for name, norm in self.norms.items():
            if norm == 0:
                message = f"{name!r} changes nothing: its update is zero in every module, as before training."
                message += " Leave it out, or look for the trained file."
                yield Finding(kind="untrained", adapters=(name,), message=message, value=0.0)

    def _outliers(self) -> Iterator[Finding]:
        logs = {name: math.log(norm) for name, norm in self.norms.items() if norm > 0}
        if len(logs) < 3:
            return
        center = median(logs.values())
        spread = median(abs(log - center) for log in logs.values()) / 0.6745  # 1 for a standard normal distribution.
        for name, log in logs.items():
            if log - center > max(OUTLIER_Z_SCORE * spread, math.log(OUTLIER_RATIO)):
                message = (
                    f"{name!r} has ‖ΔW‖ = {math.exp(log):.4g}, {math.exp(log - center):.0f} times the median of "
                    f"{math.exp(center):.4g}; it may have diverged, and would own a subspace fitted with "
                    "weighting='none'."
                )
                yield Finding(kind="outlier_norm", adapters=(name,), message=message, value=math.exp(log))

    def _same_starts(self) -> Iterator[Finding]:
        for names, cosine in self._starts.groups(above=SAME_START_COSINE):
            message = (
                f"{_listed(names)} started from the same random lora_A (mean cosine {cosine:.2f}): directions they share "
                "may be the seed's and not learnt."
            )
            yield Finding(kind="same_start", adapters=names, message=message, value=cosine)

    def _near_duplicates(self) -> Iterator[Finding]:
        for names, cosine in self._updates.groups(above=NEAR_DUPLICATE_COSINE):
            message = (
                f"{_listed(names)} have nearly the same update (mean cosine {cosine:.2f}), like checkpoints of one run: "
                "together they count as several adapters. Keep one."
            )
            yield Finding(kind="near_duplicate", adapters=names, message=message, value=cosine)


def independent_groups(names: Sequence[str], findings: Iterable[Finding]) -> dict[str, str]:
    """Adapter to a label, the same for those that share a start or a run and are therefore left out together.

    Args:
        names: Adapters to label.
        findings: Findings about these adapters and possibly others.

    Returns:
        Each name's label: the name of one member of its group.
    """
    label = {name: name for name in names}
    for finding in findings:
        if finding.kind in ("same_start", "near_duplicate"):
            members = [name for name in finding.adapters if name in label]
            merged = {label[name] for name in members}
            for name in names:
                if label[name] in merged:
                    label[name] = label[members[0]]
    return label


class _PairMeans:
    """Mean cosine of every pair of adapters over the modules in which both were compared."""

    def __init__(self):
        self._index: dict[str, int] = {}
        self._sums = torch.zeros(0, 0, dtype=torch.float64)
        self._counts = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, names: Sequence[str], rows: Tensor) -> None:
        """Compare the unit rows of one module, one per adapter; zero rows are compared with nothing."""
        for name in names:
            self._index.setdefault(name, len(self._index))
        missing = len(self._index) - len(self._sums)
        if missing:
            self._sums = torch.nn.functional.pad(self._sums, (0, missing, 0, missing))
            self._counts = torch.nn.functional.pad(self._counts, (0, missing, 0, missing))
        present = rows.any(dim=1, keepdim=True).double()
        where = torch.tensor([self._index[name] for name in names])
        places = (where[:, None], where[None, :])
        self._sums.index_put_(places, (rows @ rows.mT).double().clamp(-1.0, 1.0), accumulate=True)
        self._counts.index_put_(places, present @ present.mT, accumulate=True)

    def groups(self, *, above: float) -> Iterator[tuple[tuple[str, ...], float]]:
        """Connected components of the pairs above a cosine, with the mean cosine of those pairs."""
        means = (self._sums / self._counts.clamp(min=1)).triu(diagonal=1)
        names = list(self._index)
        group_of = list(range(len(names)))
        pairs = [(i, j) for i, j in (means > above).nonzero().tolist()]
        for i, j in pairs:
            old, new = max(group_of[i], group_of[j]), min(group_of[i], group_of[j])
            if old != new:
                group_of = [new if group == old else group for group in group_of]
        for group in sorted({group_of[i] for i, _ in pairs}):
            close = [float(means[i, j]) for i, j in pairs if group_of[i] == group]
            members = tuple(name for name, own in zip(names, group_of, strict=True) if own == group)
            yield members, sum(close) / len(close)


def _start(read: AdapterFactors) -> Tensor:
    entries = read.lora_A.flatten()
    return _unit(entries[:: max(1, math.ceil(len(entries) / _ENTRIES_COMPARED))].double())


def _sketch(read: AdapterFactors) -> Tensor:
    """A row whose cosine with others' estimates that of the ΔW: entries of L ΔW R, with the same random L and R for all."""
    left, right = _projections(len(read.lora_B), read.lora_A.shape[1])  # (64, out_features), (64, in_features)
    sketched_B, sketched_A = left @ read.lora_B.to(left.dtype), read.lora_A.to(right.dtype) @ right.mT
    return _unit((sketched_B.double() @ sketched_A.double()).flatten())


def _unit(row: Tensor) -> Tensor:
    """A row of length 1 in float32, which is all that is kept of an adapter; zero where the row is."""
    # By the largest entry first: the squares of very small and very large ones leave the range of numbers.
    peak = row.abs().max()
    if not peak:
        return torch.zeros(len(row))
    scaled = row / peak
    return (scaled / scaled.norm()).float()


@lru_cache(maxsize=2)
def _projections(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return _projection(out_features, generator), _projection(in_features, generator)


def _projection(width: int, generator: torch.Generator) -> Tensor:
    return torch.eye(width) if width <= _SKETCH_SIZE else torch.randn(_SKETCH_SIZE, width, generator=generator)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
