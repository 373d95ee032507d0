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
    """What the numbers say, with the sampling error of the test set.

    Args:
        result: From `run_demo`.
    """
    by_name = {row.method: row for row in result.rows}
    ours = fmean(by_name["EigenLoRA"].accuracies)
    parts = [
        _against(ours, by_name["random subspace"], n_test=result.n_test),
        _against(ours, by_name["LoRA, equal parameters"], n_test=result.n_test),
        _against(ours, by_name["LoRA, equal rank"], n_test=result.n_test),
    ]
    checks = result.checks
    agree = "the same class for every test row" if checks.same_predictions else "DIFFERENT classes for some test rows"
    return (
        f"EigenLoRA {ours:.3f}: {'; '.join(parts)}.\n"
        f"Trained, reloaded and exported models predict {agree} (largest logit differences "
        f"{checks.reload_difference:.1e} and {checks.export_difference:.1e})."
    )


def _against(ours: float, row: Row, *, n_test: int) -> str:
    theirs = fmean(row.accuracies)
    # Both are measured on the same rows; twice the binomial standard error of one is a cautious yardstick.
    error = 2 * (theirs * (1 - theirs) / n_test) ** 0.5
    gap = ours - theirs
    word = "as good as" if abs(gap) <= error else ("better than" if gap > 0 else "worse than")
    return f"{word} {row.method} ({gap:+.3f}, sampling error {error:.3f})"
