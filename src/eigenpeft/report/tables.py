"""Summaries as rich tables for a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from eigenpeft.collection.diagnosis import Finding
from eigenpeft.report.markup import escape


def module_table(summary: dict[str, Any]) -> Table:
    """One row a module: shape, K, explained share, condition of both spectra.

    Args:
        summary: From `subspace_summary`.
    """
    table = Table(
        title=f"{len(summary['modules'])} modules, {summary['n_adapters']} adapters of {escape(summary['base_model'])}"
    )
    table.add_column("module")
    for title in ("out × in", "K", "explained", "condition in", "condition out"):
        table.add_column(title, justify="right")
    for name, row in summary["modules"].items():
        table.add_row(
            escape(name),
            f"{row['shape'][0]} × {row['shape'][1]}",
            str(row["n_components"]),
            f"{row['explained_share']:.3f}",
            _number(row["condition_in"]),
            _number(row["condition_out"]),
        )
    return table


def adapter_table(summary: dict[str, Any]) -> Table:
    """One row per adapter: its core, what it keeps besides updates, mean and largest relative ΔW error over its modules.

    Args:
        summary: From `store_summary`, or its `adapters` alone.
    """
    table = Table(title="Adapters, and the relative error of ΔW (Frobenius) over the modules of each")
    table.add_column("adapter")
    for title in ("core", "kept besides"):
        table.add_column(title)
    for title in ("mean", "largest"):
        table.add_column(title, justify="right")
    for name, row in summary["adapters"].items():
        errors = [_number(row["mean_error"]), _number(row["largest_error"])]
        if row["mean_error"] is None:
            errors = ["exact", "exact"]
        table.add_row(escape(name), ", ".join(row["cores"]), escape(_kept(row)), *errors)
    return table


def absorb_table(summary: dict[str, Any]) -> Table:
    """The banks that grew, with their numbers of components before and after.

    Args:
        summary: As `absorb_summary` gives it.
    """
    table = Table(title="Components (input x output)")
    for heading in ("bank", "before", "after"):
        table.add_column(heading, justify="left" if heading == "bank" else "right")
    for bank, row in summary["banks"].items():
        table.add_row(escape(bank), *(f"{row[when][0]} x {row[when][1]}" for when in ("before", "after")))
    return table


def _kept(row: dict[str, Any]) -> str:
    modules = list(dict.fromkeys(key.rpartition(".")[0] or key for key in row["kept"]))
    shown = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    lost = [f"not kept: {', '.join(row['not_kept'][:3])}"] if row["not_kept"] else []
    return "; ".join([*([shown] if shown else []), *lost]) or "-"


def findings_text(findings: Sequence[Finding]) -> str:
    """One line a finding, as rich markup; empty when there is none.

    Args:
        findings: From a builder or `AdapterCollection.diagnose`.
    """
    return "\n".join(f"[yellow]{escape(finding.kind)}[/yellow]  {escape(finding.message)}" for finding in findings)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
