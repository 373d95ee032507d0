"""What the command recycle shows of its report: a table of the candidates, and the lines below it."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from eigenpeft.recycling import RecycleReport, Trial
from eigenpeft.report.markup import escape


def trials_table(report: RecycleReport) -> Table:
    """Each candidate at each of its rates, as it was after its longest training, the winner marked; those trained longest first.

    Args:
        report: Report of a run.
    """
    is_classifier = report.majority is not None
    table = Table(
        title=f"Scores on {report.n_held_out} held-out rows (*: the winner; trained: values beside the head)",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    scores = ("loss", *(("accuracy",) if is_classifier else ()))
    for title in ("", "candidate", "rate", "trained", "steps", *scores, "seconds"):
        is_name = title in ("", "candidate")
        table.add_column(title, justify="left" if is_name else "right", no_wrap=True)
    winner, ranked = report.decisive, _ranked(report)
    for trial, seconds in ranked:
        shown = trial.candidate if trial.scale is None else f"{trial.candidate}, λ {trial.scale:g}"
        figures = [f"{trial.loss:.3f}", *([f"{trial.score:.3f}"] if is_classifier else [])]
        row = [
            shown,
            f"{trial.learning_rate:g}",
            f"{trial.n_parameters:,}",
            f"{trial.steps}",
            *figures,
            f"{seconds:.0f}",
        ]
        is_winner = trial == winner
        table.add_row("*" if is_winner else "", *map(escape, row), style="bold" if is_winner else "")
    return table


def _ranked(report: RecycleReport) -> list[tuple[Trial, float]]:
    """The longest trial of each candidate at each rate, and the seconds of all of its trials."""
    of: dict[tuple[object, ...], list[Trial]] = {}
    for trial in report.trials:
        if report.is_ranked(trial):
            of.setdefault((trial.candidate, trial.learning_rate, trial.scale, trial.nearest), []).append(trial)
    longest = [(max(own, key=lambda trial: trial.steps), sum(trial.seconds for trial in own)) for own in of.values()]
    return sorted(longest, key=lambda pair: (-pair[0].steps, pair[0].loss))


def scales_text(report: RecycleReport) -> str | None:
    """How λ of the merged start was chosen, where the trials for it are not candidates of the rounds.

    Args:
        report: Report of a run.
    """
    tried = [trial for trial in report.trials if not report.is_ranked(trial) and trial.scale is not None]
    if not tried:
        return None
    best = min(tried, key=lambda trial: trial.loss)
    losses = ", ".join(f"{trial.scale:g}: {trial.loss:.3f}" for trial in tried)
    return f"λ = {best.scale:g} of the merged start had the least held-out loss with the head alone ({losses})."


def result_text(report: RecycleReport, out: Path) -> str:
    """What was written, how large it is and what to do with it.

    Args:
        report: Report of a run.
        out: Folder of the result.
    """
    adapter = out / "adapter"
    size = "" if report.rank is None else f" of rank {report.rank}, {(report.n_bytes or 0) / 1e6:.1f} MB"
    start = "" if report.decisive.scale is None else " (the ranks of the merged start and of what was trained add up)"
    return (
        f"Wrote {adapter}: a plain LoRA{size}{start}. Its README.md has the lines that load it; all figures are in "
        f"{out / 'report.json'}.\nTo keep it in a store, whose bases grow by what they lack of it: "
        f"eigenpeft store absorb STORE {out}"
    )
