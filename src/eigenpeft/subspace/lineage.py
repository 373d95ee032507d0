"""What a grown subspace was before: its earlier fingerprints, and which of its first components each of them means."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from eigenpeft.subspace.module import ModuleSubspace

Lineage = tuple[dict[str, Any], ...]
"""Earlier states, oldest first: `{"sha256": ..., "n_modules": ..., "n_sources": ..., "sizes": [[...], ...]}`.

`n_modules` says how many of the first modules there were, `sizes` how many of the first components, singular values and shares
each of their banks had: `[K_in, K_out, spectrum_in, spectrum_out]`, one row for all banks where they are alike.
"""


def entry_of(fingerprint: str, modules: Mapping[str, ModuleSubspace], *, n_sources: int) -> dict[str, Any]:
    """The entry of a lineage that says what a subspace is now, for when it grows.

    Args:
        fingerprint: Fingerprint of the subspace.
        modules: Bank of each module, in order.
        n_sources: Adapters it was made from.
    """
    rows = [_sizes(bank) for bank in _unique(modules.values())]
    return {
        "sha256": fingerprint,
        "n_modules": len(modules),
        "n_sources": n_sources,
        "sizes": rows[:1] if all(row == rows[0] for row in rows) else rows,
    }


def banks_before(modules: Mapping[str, ModuleSubspace], entry: Mapping[str, Any]) -> dict[str, ModuleSubspace]:
    """The banks that a lineage's entry describes: views on the first components of those there are.

    Args:
        modules: Bank of each module, in order.
        entry: Entry of the lineage; `is_entry` holds.

    Raises:
        SubspaceError: If the tensors of a bank do not fit each other.
    """
    first = dict(islice(modules.items(), entry["n_modules"]))
    banks, sizes = _unique(first.values()), entry["sizes"]
    rows = sizes * len(banks) if len(sizes) == 1 else sizes
    cut = {id(bank): _first(bank, row) for bank, row in zip(banks, rows, strict=False)}
    return {name: cut.get(id(bank), bank) for name, bank in first.items()}


def is_entry(value: Any) -> bool:
    """Whether a value from a file has the form of an entry.

    Args:
        value: Parsed JSON.
    """
    if not isinstance(value, dict) or not isinstance(value.get("sha256"), str):
        return False
    counts = (value.get("n_modules"), value.get("n_sources"))
    rows = value.get("sizes")
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and isinstance(rows, list)
        and bool(rows)
        and all(
            isinstance(row, list) and len(row) == 4 and all(type(each) is int and each >= 0 for each in row)
            for row in rows
        )
    )


def _unique(banks: Iterable[ModuleSubspace]) -> list[ModuleSubspace]:
    return list({id(bank): bank for bank in banks}.values())


def _sizes(bank: ModuleSubspace) -> list[int]:
    return [
        bank.n_components_in,
        bank.n_components_out,
        len(bank.singular_values_in),
        len(bank.singular_values_out),
    ]


def _first(bank: ModuleSubspace, row: list[int]) -> ModuleSubspace:
    n_in, n_out, spectrum_in, spectrum_out = row
    return ModuleSubspace(
        components_in=bank.components_in[:n_in],
        components_out=bank.components_out[:n_out],
        singular_values_in=bank.singular_values_in[:spectrum_in],
        singular_values_out=bank.singular_values_out[:spectrum_out],
        explained_variance_ratio=bank.explained_variance_ratio[: max(spectrum_in, spectrum_out)],
    )
