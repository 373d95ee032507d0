"""Where a subspace comes from: the part of it that is not tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from eigenpeft.errors import ArtifactError
from eigenpeft.subspace.lineage import Lineage, is_entry
from eigenpeft.version import __version__

# Names of fields in files that were written before 0.1.0; the weighting "none" was called "energy" there.
_OLD_NAMES = {"missed_energy_bound": "missed_share_bound"}


@dataclass(frozen=True, kw_only=True)
class SubspaceInfo:
    """Everything in `subspace_config.json` that does not follow from the tensors.

    Attributes:
        base_model_name_or_path: The base model of the adapters.
        base_model_revision: Its revision, where the adapters name one.
        method: How the bases were fitted; see `SubspaceBuilder`.
        weighting: "equal" or "none".
        n_components: As asked for: a number, a share, "auto", or one of them per module pattern.
        n_pseudo_components: Random directions added to each module.
        seed: Seed of the random directions and of the iterative solver.
        sources: One record per adapter: name, source, revision, sha256, ranks, alpha, license, modules.
        measured_on: Names of the adapters that `explained_variance_ratio` was measured on: all of them after `fit`, the
            added ones alone when a subspace that was loaded from disk is updated.
        fan_in_fan_out: Modules whose base weight is stored transposed (GPT-2's Conv1D).
        embeddings: Modules that are embeddings, whose input features are tokens.
        missed_share_bound: Where a memory limit made the build read a module's adapters in chunks: the share of a stack's
            squared norm that its components miss, against the best ones, at most; the largest over modules and sides.
        grown_from: What the subspace was before it took in later adapters; see `lineage.py`.
        eigenpeft_version: Version that built it.
    """

    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    method: str = "balanced"
    weighting: str = "equal"
    n_components: int | float | str | dict[str, int | float | str] | None = None
    n_pseudo_components: int = 0
    seed: int = 0
    sources: tuple[dict[str, Any], ...] = ()
    measured_on: tuple[str, ...] = ()
    fan_in_fan_out: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    missed_share_bound: float | None = None
    grown_from: Lineage = ()
    eigenpeft_version: str = field(default=__version__)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SubspaceInfo":
        """From the values of a config file; keys of other versions are left out.

        Args:
            values: Parsed JSON.

        Raises:
            ArtifactError: If a field has a value that no version writes.
        """
        values = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
        if values.get("weighting") == "energy":
            values["weighting"] = "none"
        kept: dict[str, Any] = {}
        for entry in fields(cls):
            if entry.name in values:
                value = values[entry.name]
                if not _is_right(entry.name, value):
                    raise ArtifactError(
                        f"The config of the subspace has {entry.name}={str(value)[:80]!r}, which no version of eigenpeft writes: "
                        "it was altered. Get a fresh copy."
                    )
                kept[entry.name] = tuple(value) if isinstance(value, list) else value
        return cls(**kept)


def _is_right(name: str, value: Any) -> bool:
    """Whether a field of a config file has the kind of value that it is written with."""
    if name in ("base_model_name_or_path", "base_model_revision", "missed_share_bound") and value is None:
        return True
    if name == "n_components":
        values = value.values() if isinstance(value, dict) else [value]
        return all(isinstance(each, int | float | str | None) for each in values)
    if name in ("n_pseudo_components", "seed"):
        return type(value) is int
    if name == "missed_share_bound":
        return isinstance(value, int | float) and 0 <= value < 1e300  # a whole number may be larger than any float
    if name == "grown_from":
        return isinstance(value, list | tuple) and all(is_entry(each) for each in value)
    if name in ("sources", "measured_on", "fan_in_fan_out", "embeddings"):
        kind = dict if name == "sources" else str
        return isinstance(value, list | tuple) and all(isinstance(each, kind) for each in value)
    return isinstance(value, str)
