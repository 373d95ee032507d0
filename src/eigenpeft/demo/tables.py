"""The demo's result as a table for a terminal, with a plain sentence on what it says."""

from statistics import fmean, stdev

from rich.table import Table

from eigenpeft.demo.run import DemoResult, Row


def demo_table(result: DemoResult) -> Table:
    """One row a method.

    Args:
        result: From `run_demo`.
    """
    n_seeds = len(result.rows[0].accuracies)
    table = Table(
        title=f"banking77: {result.n_train} training examples, {result.n_test} test examples, {n_seeds} seed(s)"
    )
    table.add_column("method")
    for title in ("parameters", "adapter file", "accuracy", "seconds"):
        table.add_column(title, justify="right")
    for row in result.rows:
        spread = f" ± {stdev(row.accuracies):.3f}" if n_seeds > 1 else ""
        size = "-" if row.adapter_bytes is None else f"{row.adapter_bytes / 1000:.1f} kB"
        table.add_row(
            row.method, f"{row.parameters:,}", size, f"{fmean(row.accuracies):.3f}{spread}", f"{row.seconds:.0f}"
        )
    return table


def demo_verdict(result: DemoResult) -> str:
    """What the numbers say: each gap with twice its standard error over the test rows (paired), one seed's luck not in it.

    Args:
        result: From `run_demo`.
    """
    by_name = {row.method: row for row in result.rows}
    ours = fmean(by_name["EigenLoRA"].accuracies)
    parts = [_against(row) for row in result.rows if row.method != "EigenLoRA"]
    checks = result.checks
    agree = "the same class for every test row" if checks.same_predictions else "DIFFERENT classes for some test rows"
    return (
        f"Audit: {result.audit_verdict}. Of an adapter left out, a subspace of the others holds {result.held_out_share:.1%}; "
        f"{result.chance_share:.1%} would be chance ({result.explained_share:.1%} of those that it was fitted to).\n"
        f"EigenLoRA {ours:.3f}: {'; '.join(parts)}.\n"
        f"Trained, reloaded and exported models predict {agree} (largest logit differences "
        f"{checks.reload_difference:.1e} and {checks.export_difference:.1e})."
    )


def _against(row: Row) -> str:
    word = "as good as" if abs(row.gap) <= row.gap_error else ("better than" if row.gap > 0 else "worse than")
    return f"{word} {row.method} ({row.gap:+.3f} ± {row.gap_error:.3f})"
