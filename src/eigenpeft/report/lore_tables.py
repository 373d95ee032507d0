"""A fit's candidates and an evaluation of LoRe as tables for a terminal."""

from rich.table import Table

from eigenpeft.reward import LoReEvaluation, LoReFitter


def candidate_table(fitter: LoReFitter) -> Table:
    """Held-out loss and accuracy of every setting that was tried.

    Args:
        fitter: After `fit`.
    """
    table = Table(title="Held-out comparisons by setting")
    for title in ("basis", "deviation scale", "concentration", "loss", "known users", "new users"):
        table.add_column(title, justify="right")
    for one in fitter.candidates_:
        table.add_row(
            str(one.setting.n_basis),
            f"{one.setting.deviation_scale:g}" if one.setting.n_basis > 1 else "",
            f"{one.setting.concentration:g}" if one.setting.n_basis > 1 else "",
            f"{one.score:.4f}",
            f"{one.seen_accuracy:.3f}",
            f"{one.unseen_accuracy:.3f}",
        )
    return table


def accuracy_table(found: LoReEvaluation) -> Table:
    """Accuracy of every method on known and new users and prompts, and LoRe's gains, with intervals.

    Args:
        found: From `evaluate_lore`.
    """
    table = Table(title="Comparisons in the right order, mean over users [95 % by bootstrap of users]")
    asked = (str(share.n_users) for share in next(iter(found.accuracy.values())).values())
    table.add_column("method")
    for quadrant in found.gain:
        table.add_column(quadrant, justify="right")
    for method, shares in found.accuracy.items():
        table.add_row(method, *(f"{share.mean:.3f} \\[{share.low:.3f}, {share.high:.3f}]" for share in shares.values()))
    for name, gains in (
        ("gain over the shared head", found.gain_over_shared),
        ("gain over its population", found.gain_over_population),
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
    table = Table(title="New users by number of comparisons, on new prompts")
    for title in ("comparisons", "shared head", "LoRe", "gain over its population"):
        table.add_column(title, justify="right")
    for n, gain in found.few_shot_gain.items():
        table.add_row(
            str(n),
            f"{found.few_shot['shared head'][n].mean:.3f}",
            f"{found.few_shot['LoRe'][n].mean:.3f}",
            f"{gain.mean:+.3f} \\[{gain.low:+.3f}, {gain.high:+.3f}]",
        )
    return table
