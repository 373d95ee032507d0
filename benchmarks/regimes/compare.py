"""Paired differences between methods with targets as observations, and their intervals."""

from collections import defaultdict
from statistics import fmean, stdev

from scipy import stats

# What a cell is asked for: zoo kind relative to the target ("own", "other", "far", "shipped", "mixed"), size, rows.
Cells = list[dict]


def kind_of(row: dict, own: str) -> str:
    """How a cell's zoo is related to its target, whose relatives are in the zoo `own`."""
    if row["zoo"] in (None, "shipped", "mixed"):
        return row["zoo"] or ""
    if row["zoo"] == own:
        return "own"
    return "other" if row["zoo"][:-2] == own[:-2] else "far"


def accuracies(
    rows: Cells, method: str, *, zoo: str = "own", size: int = 20, n_rows: int = 64
) -> dict[str, dict[int, float]]:
    """Target to seed to accuracy; `rows` carry their `kind`."""
    found = defaultdict(dict)
    for row in rows:
        if (
            row["method"] == method
            and row["rows"] == n_rows
            and (row["kind"] == "" or (row["kind"], row["size"]) == (zoo, size))
        ):
            found[row["target"]][row["seed"]] = row["accuracy"]
    return dict(found)


def gaps(one: dict[str, dict[int, float]], other: dict[str, dict[int, float]]) -> dict[str, float]:
    """Target to the mean over common seeds of the difference."""
    found = {}
    for target in one.keys() & other.keys():
        seeds = one[target].keys() & other[target].keys()
        if seeds:
            found[target] = fmean(one[target][seed] - other[target][seed] for seed in seeds)
    return found


def interval(values: list[float]) -> tuple[float, float, int]:
    """Mean, half of the 95 % interval (Student's t), number; the half is infinite below three values."""
    if len(values) < 3:
        return (fmean(values) if values else float("nan")), float("inf"), len(values)
    error = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values), error, len(values)


def shown(values: list[float]) -> str:
    """In points of accuracy; bold where the interval does not hold zero."""
    mean, error, n = interval(values)
    if not n:
        return ""
    text = f"{100 * mean:+.1f}" + (f" ± {100 * error:.1f}" if n > 2 else "") + f" ({n})"
    return f"**{text}**" if abs(mean) > error else text
