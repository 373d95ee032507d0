"""A fit's candidates and an evaluation of LoRe as tables for a terminal."""

from rich.table import Table

from eigenpeft.reward import LoReEvaluation, LoReFitter
from eigenpeft.reward.evaluation.verdict import FEW_USERS
from eigenpeft.reward.fitting.selection import lowest_loss

_RULE = (
    "Chosen: the smallest basis within one standard error of the lowest loss (one shared head: within two), errors of the paired "
    "differences over the {n:,} comparisons; of that size the setting with the lowest loss."
)


def candidate_table(fitter: LoReFitter) -> Table:
    """Held-out loss and accuracy of every setting that was tried, with standard errors; the chosen one has a star.

    Args:
        fitter: After `fit`.
    """
    best = lowest_loss(fitter.candidates_)
    n = 0 if best is None else len(best.losses)
    table = Table(
        title=f"{n:,} held-out comparisons by setting (± one standard error; * chosen)", caption=_RULE.format(n=n)
    )
    for title in ("basis", "deviation scale", "concentration", "loss", "above the lowest", "known users", "new users"):
        table.add_column(title, justify="right")
    for one in fitter.candidates_:
        chosen = one is fitter.chosen_
        above = "0" if best is None or one is best else "{:.4f} ± {:.4f}".format(*one.worse_than(best))
        table.add_row(
            f"{'* ' if chosen else ''}{one.setting.n_basis}",
            f"{one.setting.deviation_scale:g}" if one.setting.n_basis > 1 else "",
            f"{one.setting.concentration:g}" if one.setting.n_basis > 1 else "",
            f"{one.score:.4f} ± {one.score_error:.4f}",
            above,
            _percent(one.seen_accuracy, one.seen_accuracy_error),
            _percent(one.unseen_accuracy, one.unseen_accuracy_error),
            style="bold" if chosen else None,
        )
    return table


def _percent(share: float, error: float) -> str:
    return f"{100 * share:.1f} ± {100 * error:.1f} %" if share == share else "none held out"


def accuracy_table(found: LoReEvaluation) -> Table:
    """Accuracy of every method on known and new users and prompts, and LoRe's gains, with intervals.

    Where the fit chose one shared head, LoRe is the best basis of several rows, as in the verdict; the title says so.

    Args:
        found: From `evaluate_lore`.
    """
    judged = found.best_personal or found
    unchosen = (
        f"; LoRe is a basis of {judged.n_basis}, the best of those above one: the fit chose one shared head"
        if found.best_personal
        else f"; LoRe is a basis of {judged.n_basis}"
    )
    table = Table(title=f"Comparisons in the right order, mean over users [95 % by bootstrap of users]{unchosen}")
    asked = (str(share.n_users) for share in next(iter(judged.accuracy.values())).values())
    table.add_column("method")
    for title in (
        "known users, training comparisons",
        f"known users, new {found.held_out}",
        f"new users, new {found.held_out}",
    ):
        table.add_column(title, justify="right")
    for method, shares in judged.accuracy.items():
        table.add_row(method, *(f"{share.mean:.3f} \\[{share.low:.3f}, {share.high:.3f}]" for share in shares.values()))
    for name, gains in (
        ("LoRe's gain over the shared head", judged.gain_over_shared),
        ("LoRe's gain over its population", judged.gain_over_population),
    ):
        cells = (f"{share.mean:+.3f} \\[{share.low:+.3f}, {share.high:+.3f}]" for share in gains.values())
        table.add_row(name, *cells, style="bold")
    table.add_row("users asked", *asked)
    return table


def few_shot_table(found: LoReEvaluation) -> Table:
    """Accuracy on new users by the number of comparisons that they gave.

    Args:
        found: From `evaluate_lore`.
    """
    judged = found.best_personal or found
    table = Table(title=f"New users by number of comparisons, on new {found.held_out}")
    for title in (
        "comparisons",
        "users",
        "shared head",
        f"LoRe, basis of {judged.n_basis}",
        "gain over its population",
    ):
        table.add_column(title, justify="right")
    for n, gain in judged.few_shot_gain.items():
        table.add_row(
            str(n),
            str(gain.n_users),
            f"{judged.few_shot['shared head'][n].mean:.3f}",
            f"{judged.few_shot['LoRe'][n].mean:.3f}",
            "too few users" if gain.n_users < FEW_USERS else f"{gain.mean:+.3f} \\[{gain.low:+.3f}, {gain.high:+.3f}]",
        )
    if any(gain.n_users < FEW_USERS for gain in judged.few_shot_gain.values()):
        table.caption = (
            "Only new users who keep as many comparisons as the last line asks are in it: give more of each user."
        )
    return table
