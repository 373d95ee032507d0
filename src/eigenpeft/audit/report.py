"""What an audit found, as frozen plain data."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from eigenpeft.audit.adapters.sharing import Sharing, SharingRow
from eigenpeft.audit.answers import Chance, Compress, CompressRow, Reuse, Train
from eigenpeft.audit.kinds import wrong_kind
from eigenpeft.audit.task.gradient import GradientShare, ModuleGradient
from eigenpeft.collection.diagnosis import Finding
from eigenpeft.errors import ArtifactError

Verdict = Literal["shared", "shared only through a common seed", "shared only by related runs", "not shared"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A share for K = 1, 2, ... components, beside the same of the matched null.

    Attributes:
        real: Figures of the adapters, mean.
        low: Lower end of the bootstrap interval over adapters (5 %); equal to `real` where none was taken.
        high: Upper end (95 %).
        null: Figures of random adapters with the same singular values and shapes, mean over draws.
        null_high: Largest of the draws.
    """

    real: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    null: tuple[float, ...]
    null_high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ModuleAudit:
    """One module.

    Attributes:
        shape: (out_features, in_features).
        n_adapters: Trained adapters that have it.
        effective_rank_in: Directions of equal weight that would spread as the input rows do.
        effective_rank_out: The same for the output rows.
        null_effective_rank_in: Effective rank of the input side of the matched null.
        null_effective_rank_out: Effective rank of the output side of the matched null.
        explained: Share of the adapters' squared norms inside a subspace fitted to all of them.
        held_out: The same, each adapter's share in a subspace fitted to the others.
    """

    shape: tuple[int, int]
    n_adapters: int
    effective_rank_in: float
    effective_rank_out: float
    null_effective_rank_in: float
    null_effective_rank_out: float
    explained: Curve
    held_out: Curve


# Names of fields before 0.1.0, in reports that were saved then.
_OLD_NAMES = {
    "outside": "unshared",
    "held_out_in": "held_out_input",
    "held_out_out": "held_out_output",
    "held_out_alone_in": "held_out_alone_input",
}
_OLD_ROW_NAMES = {"kept": "kept_share", "error": "relative_error"}  # of the rows of `compress`


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The whole collection: three answers, and the measures behind them.

    Attributes:
        compress: May these adapters be kept in fewer numbers?
        train: Will a new task gain by starting from them?
        reuse: Which of them is nearest to the new task?
        verdict: A detail, whether an adapter may be replaced by its projection on the others' subspace: "shared", "shared only
            through a common seed", "shared only by related runs", or "not shared". It answers none of the three questions.
        advice: What that means, in a few sentences.
        n_components: Where the held-out share stops growing more than by chance (`choose_n_components`).
        adapters: Trained adapters, in order.
        groups: Adapters that were left out together, because they share a start or a run.
        clusters: Groups by the overlap of their row spaces, single adapters included; one group where all are alike.
        cluster_gain: Held-out share, at `n_components`, by the adapter's own cluster less that by all others; above 0, one
            subspace per cluster is better. None where there are no two clusters of at least three adapters.
        explained: Mean over the modules.
        held_out: Mean over modules and adapters; adapters of one group are left out together.
        held_out_alone: The same, each adapter left out alone: what it gains through its group is in it.
        held_out_unrelated: As `held_out`, each adapter left out with every adapter related to it too (cosine of ΔW above
            0.2), mean over those that have at least two strangers. None where no two are related but by their group, or
            where fewer than half of the adapters have two strangers.
        held_out_input: As `held_out`, with the input side alone projected.
        held_out_alone_input: As `held_out_alone`, with the input side alone projected: what a common lora_A gives.
        held_out_output: As `held_out`, with the output side alone projected.
        unshared: Adapter to the share of its update that the others' subspace of `n_components` does not hold.
        similarity: Mean cosine of ΔW of every pair, (n, n).
        modules: Module name to its audit.
        findings: What was noticed about single adapters and pairs.
        weighting: "equal": every adapter's update of a module counts alike.
        seed: Seed of the nulls and the bootstrap.
        gradient: The share of a new task's gradient inside the adapters' subspace, where a model and a data set were given.
        sharing: What one bank for all layers of a kind would cost, where it was asked for.
    """

    compress: Compress
    train: Train
    reuse: Reuse
    verdict: Verdict
    advice: str
    n_components: int
    adapters: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    clusters: tuple[tuple[str, ...], ...]
    cluster_gain: float | None
    explained: Curve
    held_out: Curve
    held_out_alone: Curve
    held_out_unrelated: Curve | None
    held_out_input: Curve
    held_out_alone_input: Curve
    held_out_output: Curve
    unshared: dict[str, float]
    similarity: tuple[tuple[float, ...], ...]
    modules: dict[str, ModuleAudit]
    findings: tuple[Finding, ...]
    weighting: str
    seed: int
    gradient: GradientShare | None = None
    sharing: Sharing | None = None

    @property
    def answers(self) -> tuple[tuple[str, str, str], ...]:
        """Question, answer in a word and answer in sentences, for each of the three."""
        return (
            ("Compress: may these adapters be kept in fewer numbers?", self.compress.answer, self.compress.text),
            ("Train: will a new task gain by starting from them?", self.train.answer, self.train.text),
            ("Reuse: which of them is nearest to the new task?", self.reuse.answer, self.reuse.text),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AuditReport":
        """The report that `to_dict` gave, also after JSON.

        Args:
            data: What `to_dict` returned, or what `eigenpeft audit --json` printed.

        Raises:
            ArtifactError: If fields are missing or of another kind, as in reports of other versions.
        """
        if isinstance(data, Mapping):
            data = {_OLD_NAMES.get(name, name): value for name, value in data.items()}
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        missing = sorted(required - set(data)) if isinstance(data, Mapping) else sorted(required)
        if missing:
            raise ArtifactError(
                f"This is not a report of this version of eigenpeft: it has no {', '.join(missing)}. Run `eigenpeft audit ... "
                "--json` again."
            )
        try:
            values = {name: _restored(name, data[name]) for name in known & set(data)}
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ArtifactError(
                f"The audit report is damaged ({error}); run `eigenpeft audit ... --json` again."
            ) from error
        report = cls(**values)
        fault = wrong_kind(report, cls)
        sizes = {len(curve) for curve in (report.explained.real, report.held_out.real)} if fault is None else {0}
        if fault is None and not 0 <= report.n_components <= min(sizes):
            fault = f"n_components is {report.n_components}, beyond the {min(sizes)} components of its curves"
        if fault is None and any(len(row) != len(report.adapters) for row in (report.similarity, *report.similarity)):
            fault = f"similarity is not a square table of its {len(report.adapters)} adapters"
        if fault is not None:
            raise ArtifactError(f"The audit report is damaged ({fault}); run `eigenpeft audit ... --json` again.")
        return report


def _restored(name: str, value: Any) -> Any:
    if name == "compress":
        return Compress(**{**value, "rows": tuple(_compress_row(row) for row in value["rows"])})
    if name == "train":
        return Train(
            **{
                **value,
                "chances": tuple(
                    Chance(**{field: _tuples(part) for field, part in chance.items()}) for chance in value["chances"]
                ),
            }
        )
    if name == "reuse":
        return Reuse(**{**value, "nearest": _tuples(value["nearest"])})
    if name == "modules":
        return {
            key: ModuleAudit(**{field: _restored(field, part) for field, part in module.items()})
            for key, module in value.items()
        }
    if name == "gradient" and isinstance(value, Mapping):
        modules = tuple(
            ModuleGradient(**{field: _tuples(part) for field, part in module.items()}) for module in value["modules"]
        )
        return GradientShare(**{**{field: _tuples(part) for field, part in value.items()}, "modules": modules})
    if name == "sharing" and isinstance(value, Mapping):
        return Sharing(**{**value, "rows": tuple(SharingRow(**row) for row in value["rows"])})
    if name == "findings":
        return tuple(Finding(**{**found, "adapters": tuple(found["adapters"])}) for found in value)
    if isinstance(value, Mapping) and {field.name for field in fields(Curve)} == set(value):
        return Curve(**{key: tuple(shares) for key, shares in value.items()})
    return _tuples(value)


def _compress_row(row: Mapping[str, Any]) -> CompressRow:
    return CompressRow(**{_OLD_ROW_NAMES.get(name, name): value for name, value in row.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list | tuple) else value
