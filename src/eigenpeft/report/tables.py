"""Summaries as rich tables for a terminal."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from eigenpeft.collection.diagnosis import Finding
from eigenpeft.report.markup import escape

# More modules than this are shown by kind, one row for all layers.
MOST_MODULES = 16
_LISTED = 5  # adapters of other base models that are named


def module_table(summary: dict[str, Any], *, every: bool = False) -> Table:
    """Shape, K, explained share and condition of both spectra: a row per module, or per kind of module where they are many.

    Args:
        summary: From `subspace_summary`.
        every: A row per module, however many there are.
    """
    modules = summary["modules"]
    table = Table(title=f"{len(modules)} modules, {summary['n_adapters']} adapters of {escape(summary['base_model'])}")
    table.add_column("module", overflow="fold")  # never cut: the names of a layer's modules differ at their ends
    for title in ("out × in", "K", "explained", "condition in", "condition out"):
        table.add_column(title, justify="right")
    by_kind = not every and len(modules) > MOST_MODULES
    for name, rows in _by_kind(modules).items() if by_kind else ((name, [row]) for name, row in modules.items()):
        table.add_row(
            escape(name),
            f"{rows[0]['shape'][0]} × {rows[0]['shape'][1]}",
            _range([row["n_components"] for row in rows]),
            f"{fmean(row['explained_share'] for row in rows):.3f}",
            *(_largest([row[side] for row in rows]) for side in ("condition_in", "condition_out")),
        )
    if by_kind:
        table.caption = "A row per kind of module: mean explained share, largest conditions. --all shows every module."
    return table


def _by_kind(modules: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Modules or banks whose names differ in numbers alone and that have one shape, where one is known, together."""
    kinds: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for name, row in modules.items():
        kinds.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), tuple(row.get("shape", ()))), []).append(row)
    return {f"{name} ({len(rows)})": rows for (name, _), rows in kinds.items()}


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _largest(values: Sequence[float | None]) -> str:
    return _number(max((value for value in values if value is not None), default=None))


def adapter_table(summary: dict[str, Any]) -> Table:
    """One row per adapter: core, rank, size as a LoRA and here, what it keeps besides, mean and largest relative ΔW error.

    Args:
        summary: From `store_summary`, or its `adapters` alone.
    """
    rows = summary["adapters"]
    bases = Counter(row["base_model"] for row in rows.values() if row["base_model"])
    base = bases.most_common(1)[0][0] if bases else None
    others = [f"{name} ({row['base_model']})" for name, row in rows.items() if row["base_model"] not in (base, None)]
    table = Table(title=f"{len(rows)} adapter{'' if len(rows) == 1 else 's'}{escape(f' of {base}') if base else ''}")
    table.caption = (
        "kB: with heads; LoRA kB: as a plain LoRA. Errors: relative, of ΔW (Frobenius), over the modules of each; exact: "
        "trained in these bases."
    )
    if others:
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        table.caption += escape(f" Their configs name another base model: {', '.join(others[:_LISTED])}{more}.")
    for title in ("adapter", "core"):
        table.add_column(title, overflow="fold")
    for title in ("rank", "LoRA\nkB", "kB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("kept besides", overflow="fold")
    for title in ("mean error", "largest"):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        errors = [_number(row["mean_error"]), _number(row["largest_error"])]
        if row["mean_error"] is None:
            errors = ["exact", "exact"]
        sizes = [f"{row[size] / 1000:.1f}" for size in ("original_bytes", "bytes")]
        rank = _range(row["ranks"]) if row["ranks"] else "-"
        table.add_row(escape(name), ", ".join(row["cores"]), rank, *sizes, escape(_kept(row)), *errors)
    return table


def sizes_text(sizes: Mapping[str, Any], *, n_adapters: int) -> str:
    """One sentence on the size of a store beside that of its members as plain LoRAs.

    Args:
        sizes: As `store_sizes` gives them, or `store_summary`.
        n_adapters: Members of the store.
    """
    shared = sizes["subspace_bytes"]
    members = sizes["bytes"] - shared
    if sizes["ratio"] is None:
        return f"The store has no adapters; its bases are {shared / 1000:,.1f} kB."
    are = "1 adapter is" if n_adapters == 1 else f"{n_adapters} adapters are"
    return (
        f"{are} {sizes['original_bytes'] / 1000:,.1f} kB as plain LoRAs and {sizes['bytes'] / 1000:,.1f} kB here, "
        f"{sizes['ratio']:.0%} of that: shared bases {shared / 1000:,.1f} kB, members {members / 1000:,.1f} kB."
    )


def absorb_table(summary: dict[str, Any]) -> Table:
    """The banks that grew, with their numbers of components before and after; a row per kind of bank where they are many.

    Args:
        summary: As `absorb_summary` gives it.
    """
    table = Table(title="Components (input x output)")
    for heading in ("bank", "before", "after"):
        table.add_column(heading, justify="left" if heading == "bank" else "right")
    banks = summary["banks"]
    by_kind = len(banks) > MOST_MODULES
    for bank, rows in _by_kind(banks).items() if by_kind else ((name, [row]) for name, row in banks.items()):
        sides = ([_range([row[when][side] for row in rows]) for side in (0, 1)] for when in ("before", "after"))
        table.add_row(escape(bank), *(" x ".join(pair) for pair in sides))
    if by_kind:
        table.caption = "A row per kind of bank. --json shows every bank."
    return table


def _kept(row: dict[str, Any]) -> str:
    modules = list(dict.fromkeys(key.rpartition(".")[0] or key for key in row["kept_aside"]))
    shown = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    lost = [f"not kept: {', '.join(row['not_kept'][:3])}"] if row["not_kept"] else []
    return "; ".join([*([shown] if shown else []), *lost]) or "-"


def findings_text(findings: Sequence[Finding]) -> str:
    """One line per finding, as rich markup; empty when there is none.

    Args:
        findings: From a builder or `AdapterCollection.diagnose`.
    """
    return "\n".join(f"[yellow]{escape(finding.kind)}[/yellow]  {escape(finding.message)}" for finding in findings)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
