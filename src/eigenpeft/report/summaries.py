"""What there is to say about a subspace or a store, as plain JSON-able data."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from torch import Tensor

from eigenpeft.collection.diagnosis import Finding
from eigenpeft.subspace import AdapterMember, AdapterStore, PrincipalSubspace
from eigenpeft.subspace.card import license_of
from eigenpeft.subspace.stores.absorbing import AbsorbReport


def subspace_summary(subspace: PrincipalSubspace, *, findings: Sequence[Finding] = ()) -> dict[str, Any]:
    """Counts, sizes and spectra of a subspace.

    Args:
        subspace: What to describe.
        findings: What its builder noticed about the adapters.
    """
    return {
        "base_model": subspace.info.base_model_name_or_path,
        "method": subspace.info.method,
        "weighting": subspace.info.weighting,
        "n_adapters": len(subspace.info.sources),
        "n_pseudo_components": subspace.info.n_pseudo_components,
        "explained_share": subspace.explained_share,
        "bytes": subspace.n_bytes,
        "sha256": subspace.fingerprint,
        "modules": {
            name: {
                "shape": [bank.out_features, bank.in_features],
                "n_components": bank.n_components,
                "explained_share": bank.explained_share,
                "condition_in": condition(bank.singular_values_in),
                "condition_out": condition(bank.singular_values_out),
            }
            for name, bank in subspace.items()
        },
        "findings": [asdict(finding) for finding in findings],
    }


def store_summary(store: AdapterStore) -> dict[str, Any]:
    """Sizes and errors of a store: relative ΔW error per module and adapter, and what each adapter is.

    Args:
        store: What to describe; every member is read once.

    Raises:
        ArtifactError: If a member cannot be read.
    """
    errors: dict[str, dict[str, float]] = {module: {} for module in store.subspace}
    adapters = {}
    for name in store.names:
        member = store[name]
        adapters[name] = member_summary(member, store.subspace)
        for module, error in member.relative_errors.items():
            errors[module][name] = error
    return {
        "n_adapters": len(store),
        **_sizes(store, sum(row["original_bytes"] for row in adapters.values())),
        "adapters": adapters,
        "relative_errors": errors,
    }


def store_sizes(store: AdapterStore) -> dict[str, Any]:
    """Sizes of a store in bytes, and of its members as plain LoRAs; every member is read once.

    Args:
        store: What to describe.

    Returns:
        `bytes` of the whole store, `subspace_bytes` of the bases that all share, `original_bytes` of all members as plain
        LoRAs, and their `ratio`, None where there is no member.

    Raises:
        ArtifactError: If a member cannot be read.
    """
    return _sizes(store, sum(original_bytes(store[name], store.subspace) for name in store.names))


def _sizes(store: AdapterStore, original: int) -> dict[str, Any]:
    return {
        "bytes": store.n_bytes,
        "subspace_bytes": store.subspace.n_bytes,
        "original_bytes": original,
        "ratio": store.n_bytes / original if original else None,
    }


def original_bytes(member: AdapterMember, subspace: PrincipalSubspace) -> int:
    """Size of a member as the plain LoRA that it was; of one that was trained in the subspace, of the one that it exports to.

    Args:
        member: The member. One that was added from a LoRA file knows the file's size; for others r (in_features +
            out_features) numbers of four bytes are counted per module, and what it keeps besides.
        subspace: Its bases.
    """
    known = member.record.get("file_bytes")
    if isinstance(known, int) and known > 0:
        return known
    kept = sum(tensor.numel() * tensor.element_size() for tensor in member.kept_aside.values())
    ranks = dict(zip(member, member.ranks, strict=True))
    return kept + 4 * sum(
        rank * (subspace[module].in_features + subspace[module].out_features) for module, rank in ranks.items()
    )


def member_summary(member: AdapterMember, subspace: PrincipalSubspace) -> dict[str, Any]:
    """What one member of a store is: its cores, its size, what it keeps besides updates, and its errors.

    Args:
        member: The member. One that was trained in the subspace is exact and has no errors.
        subspace: Its bases.
    """
    return {
        "cores": list(member.kinds),
        "ranks": sorted(set(member.ranks)),
        "base_model": member.record.get("base_model"),
        "n_modules": len(member),
        "bytes": member.n_bytes,
        "original_bytes": original_bytes(member, subspace),
        "task_type": member.record.get("task_type"),
        "license": license_of(member.record) or None,
        "kept_aside": [key.removeprefix("base_model.model.") for key in member.kept_aside],
        "not_kept": [str(key) for key in member.record.get("kept_aside") or () if key not in member.kept_aside],
        **_mean_and_largest(member.relative_errors.values()),
    }


def absorb_summary(report: AbsorbReport) -> dict[str, Any]:
    """What `AdapterStore.absorb` did, as plain data.

    Args:
        report: Its result.
    """
    return {
        "absorbed": {name: {"mean_error": report.errors[name]} for name in report.absorbed},
        "moved": {name: {"lost": lost} for name, lost in report.lost.items()},
        "held_before": report.held_before,
        "held_after": report.held_after,
        "sha256_before": report.fingerprint_before,
        "sha256_after": report.fingerprint_after,
        "banks": {
            bank: {"before": list(before), "after": list(after)}
            for bank, (before, after) in report.n_components.items()
        },
    }


def condition(singular_values: Tensor) -> float | None:
    """Ratio of the largest to the smallest kept singular value; None when nothing is kept.

    Args:
        singular_values: (K,), descending.
    """
    if len(singular_values) == 0:
        return None
    return float(singular_values[0] / singular_values[-1])


def _mean_and_largest(values: Iterable[float]) -> dict[str, float | None]:
    values = list(values)
    return {"mean_error": fmean(values) if values else None, "largest_error": max(values, default=None)}
