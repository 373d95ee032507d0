"""Comparisons of the study's cells: what is held against what, paired differences, rank correlations, their intervals."""

from collections import defaultdict
from collections.abc import Callable
from statistics import fmean, stdev

import numpy as np
from encoder import STEPS, best_rate
from methods import FEW, METHODS, OURS, RANDOM
from scipy import stats

HEAD = "head only"
Cells = dict[str, dict[tuple[str, int], dict]]


def accuracies(rows: list[dict], n_train: int, *, zoo: str | None = None, steps: int = STEPS) -> Cells:
    """Method to the rows of its (target, seed) pairs, at its chosen rate."""
    found = defaultdict(dict)
    asked = {"stage": "test", "n_train": n_train, "steps": steps}
    tested = [
        row for row in rows if asked.items() <= row.items() and row.get("zoo") == zoo and row["method"] in METHODS
    ]
    rates = {method: best_rate(rows, method) for method in {row["method"] for row in tested}}
    for row in tested:
        if row["rate"] == rates[row["method"]]:  # widening a grid can change the choice
            found[row["method"]][row["target"], row["seed"]] = row
    return {name: found[name] for name in METHODS if name in found}


# Methods whose LoRA of equal parameters goes by another's name; "diagonal" has none, its stand-in has twice as many.
SMALL_LORA = {
    "mixer": f"{FEW} to K=64",
    "r=2": f"{FEW} to K=8",
    "late layers": f"{FEW} to K=16",
    "diagonal": "LoRA, rank 1 on one module",
}


def controls_of(method: str) -> tuple[str | None, str | None]:
    """The random subspace and the LoRA that a method is held against."""
    if method == OURS:
        return RANDOM, FEW
    if method.startswith("EigenLoRA ") or method in ("mean-only subspace", "shuffled subspace"):
        kind = method.removeprefix("EigenLoRA ").split(", ")[0]
        twin, small = f"random subspace {kind}", SMALL_LORA.get(kind, f"{FEW} to {kind}")
        same_size = twin not in METHODS or kind.startswith("alpha")
        return (twin if twin in METHODS else RANDOM), (small if small in METHODS else FEW if same_size else None)
    return None, None


def difference(
    cells: Cells, one: str, other: str | None, *, measure: str = "accuracy"
) -> tuple[float, float, int] | None:
    """Mean paired difference, half its 95 % interval, pairs; None below three pairs."""
    if other is None or one not in cells or other not in cells:
        return None
    pairs = sorted(set(cells[one]) & set(cells[other]))
    gaps = [cells[one][pair][measure] - cells[other][pair][measure] for pair in pairs]
    if len(gaps) < 3:
        return None
    error = float(stats.t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return fmean(gaps), error, len(gaps)


def difference_by_target(
    cells: Cells, one: str, other: str, *, measure: str = "accuracy"
) -> tuple[float, float, int] | None:
    """As `difference`, with the mean over seeds of every target as one observation: what holds for another target."""
    by_target = defaultdict(list)
    for pair in set(cells[one]) & set(cells[other]):
        by_target[pair[0]].append(cells[one][pair][measure] - cells[other][pair][measure])
    gaps = [fmean(values) for values in by_target.values()]
    if len(gaps) < 3:
        return None
    error = float(stats.t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / len(gaps) ** 0.5
    return fmean(gaps), error, len(gaps)


def shown(found: tuple[float, float, int] | None) -> str:
    if found is None:
        return ""
    mean, error, n = found
    text = f"{mean:+.3f} ± {error:.3f} ({n})"
    return f"**{text}**" if abs(mean) > error else text


def correlations(cells: Cells, shares: list[dict]) -> list[dict]:
    """One record a (subspace, target, seed) that was both measured and trained in."""
    found = []
    for row in shares:
        pair = (row["target"], row["seed"])
        if pair in cells.get(row["method"], {}) and pair in cells[HEAD]:
            gain = cells[row["method"]][pair]["accuracy"] - cells[HEAD][pair]["accuracy"]
            found.append({**row, "gain": gain, "accuracy": cells[row["method"]][pair]["accuracy"], "pair": pair})
    return found


def rank_correlation(records: list[dict], *, within: Callable | None, draws: int = 2000) -> tuple[float, float, float]:
    """Spearman's correlation of share and gain with a 95 % interval; `within`: of ranks inside each value of that key."""

    def value(chosen: list[dict]) -> float:
        by_pair = defaultdict(list)
        for i, record in enumerate(chosen):
            by_pair[(record.get("draw"), within(record)) if within else None].append(i)
        x, y = np.zeros(len(chosen)), np.zeros(len(chosen))
        for places in by_pair.values():
            for values, key in ((x, "share"), (y, "gain")):
                ranks = stats.rankdata([chosen[i][key] for i in places])
                values[places] = ranks - ranks.mean()
        return float((x @ y) / np.sqrt((x @ x) * (y @ y)))

    pairs = sorted({record["pair"] for record in records})
    generator = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        drawn = generator.integers(len(pairs), size=len(pairs))
        chosen = [{**r, "draw": i} for i, p in enumerate(drawn) for r in records if r["pair"] == pairs[p]]
        values.append(value(chosen))
    low, high = np.quantile(values, [0.025, 0.975])
    return value(records), float(low), float(high)
