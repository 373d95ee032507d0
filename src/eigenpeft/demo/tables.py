"""The demo's result as a table for a terminal, with plain sentences on what it says."""

from statistics import fmean

from rich.table import Table

from eigenpeft.demo.methods import OURS
from eigenpeft.demo.result import DemoResult, Row


def demo_table(result: DemoResult) -> Table:
    """One row per method.

    Args:
        result: From `run_demo`.
    """
    title = f"{result.n_customers} new customers, {result.n_train} training rows each, {result.n_test} test rows in all"
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for heading in ("numbers", "accuracy", f"{OURS} leads by", "seconds"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        gap = "" if row.method == OURS else f"{row.gap:+.3f} ± {row.gap_error:.3f}"
        table.add_row(row.method, f"{row.n_parameters:,}", f"{fmean(row.accuracies):.3f}", gap, f"{row.seconds:.1f}")
    return table


def demo_verdict(result: DemoResult) -> str:
    """What the numbers say: each gap with twice its standard error over the test rows (paired), one seed's luck not in it.

    Args:
        result: From `run_demo`.
    """
    by_name = {row.method: row for row in result.rows}
    ours, checks = by_name[OURS], result.checks
    parts = [_against(row) for row in result.rows if row.method != OURS]
    large = by_name["LoRA, equal rank"].n_parameters / ours.n_parameters
    return (
        f"{OURS} with {ours.n_parameters:,} numbers is {'; '.join(parts)}. LoRA of equal rank trains {large:.0f} times as "
        f"many.\n"
        f"The store keeps a customer in {checks.member_bytes / 1000:.1f} kB, head included, beside bases of "
        f"{checks.subspace_bytes / 1000:.0f} kB that all share; as a plain LoRA it takes {checks.lora_bytes / 1000:.0f} kB.\n"
        f"Served in mixed batches, accuracy {checks.served_accuracy:.3f}, each row with its own adapter and head: the logits "
        f"differ from those of the trained models by at most {checks.served_difference:.0e}; those of the plain LoRA, loaded "
        f"with PEFT alone, by at most {checks.export_difference:.0e}."
    )


def _against(row: Row) -> str:
    word = "as good as" if abs(row.gap) <= row.gap_error else ("better than" if row.gap > 0 else "worse than")
    return f"{word} {row.method} ({row.gap:+.3f} ± {row.gap_error:.3f})"
