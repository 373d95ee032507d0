"""The tables and the figure of docs/regimes.md, from the cells that are there.

Command:   python benchmarks/regimes/report.py --data DIR --work DIR [--docs docs/regimes.md]
Writes:    the tables between the marks `<!-- NAME -->` and `<!-- end -->` of a page, regimes.png and the
           cells, λ and measures as benchmarks/results/regimes/*.jsonl. Observations are targets; intervals are 95 %.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import fmean

import customers
from compare import Cells, accuracies, gaps, interval, kind_of, shown
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plan import ON_TOP, OTHERS, PRIMARY
from run import RESULTS, read

_MARK = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAIRS = (
    ("EigenLoRA K8", "LoRA equal"),
    ("EigenLoRA K8", "LoRA r8"),
    ("EigenLoRA K8", "random K8"),
    ("EigenLoRA K8", "head"),
    ("merged, head", "LoRA r8"),
    ("merged, head", "head"),
    ("merged, head", "LoRA equal"),
    ("merged, LoRA r8", "LoRA r8"),
    ("merged, LoRA r8", "merged, head"),
    ("merged, EigenLoRA K8", "merged, head"),
    ("merged, EigenLoRA K8", "LoRA r8"),
    ("random K8", "LoRA equal"),
    ("LoRA r8", "head"),
)
KINDS = {
    "own": "relatives",
    "other": "other domains",
    "far": "the other data set",
    "shipped": "ten unrelated tasks",
    "mixed": "a quarter each",
}


def with_kinds(rows: Cells, data: Path) -> Cells:
    own = {c.name: c.relatives for c in customers.targets(data)}
    return [{**row, "kind": kind_of(row, own[row["target"]])} for row in rows if row["stage"] == "test"]


def table(titles: list[str], lines: list[list[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def of_source(values: dict[str, float], own: dict[str, str], source: str) -> list[float]:
    return [value for target, value in values.items() if own[target].startswith(source)]


def comparisons(rows: Cells, own: dict[str, str], pairs=PAIRS, *, n_rows: int = 64) -> str:
    lines = []
    for one, other in pairs:
        found = gaps(accuracies(rows, one, n_rows=n_rows), accuracies(rows, other, n_rows=n_rows))
        if found:
            parts = [list(found.values()), of_source(found, own, "clinc"), of_source(found, own, "bank")]
            lines.append([f"{one} minus {other}", *map(shown, parts)])
    return table(["comparison, points of accuracy", "all targets", "clinc150", "banking77"], lines)


def methods_table(rows: Cells, own: dict[str, str], names, *, n_rows: int = 64) -> str:
    lines = []
    for name in names:
        found = {t: fmean(s.values()) for t, s in accuracies(rows, name, n_rows=n_rows).items()}
        if found:
            numbers = next(row["parameters"] for row in rows if row["method"] == name)
            rate = next(row["rate"] for row in rows if row["method"] == name)
            parts = [of_source(found, own, "clinc"), of_source(found, own, "bank")]
            means = [f"{fmean(part):.3f} ({len(part)})" if part else "" for part in parts]
            lines.append([name, f"{numbers:,}", f"{rate:g}", *means])
    return table(["method", "numbers beside the head", "rate", "clinc150", "banking77"], lines)


def zoos_table(rows: Cells, measures: Cells) -> str:
    """What the zoo's kind and size do: gains of the two recycled methods over their controls."""
    lines = []
    found = sorted(
        {(row["kind"], row["size"]) for row in rows if row["kind"]}, key=lambda k: (list(KINDS).index(k[0]), k[1])
    )
    for kind, size in found:
        eigen = accuracies(rows, "EigenLoRA K8", zoo=kind, size=size)
        merged = accuracies(rows, "merged, head", zoo=kind, size=size)
        controls = {name: accuracies(rows, name) for name in ("LoRA equal", "random K8", "head", "LoRA r8")}
        zoos = {(row["zoo"], row["size"]) for row in rows if (row["kind"], row["size"]) == (kind, size)}
        shares = [
            m["held_out_8"] for m in measures if m["kind"] == "zoo" and (m["zoo"], m["size"]) in zoos and m["draw"] == 0
        ]
        lines.append(
            [
                KINDS[kind],
                str(size),
                " to ".join(dict.fromkeys(f"{share:.3f}" for share in (min(shares), max(shares)))) if shares else "",
                *(shown(list(gaps(eigen, controls[name]).values())) for name in ("LoRA equal", "random K8", "LoRA r8")),
                *(shown(list(gaps(merged, controls[name]).values())) for name in ("head", "LoRA r8")),
            ]
        )
    titles = [
        "zoo",
        "adapters",
        "held-out share, K 8",
        "EigenLoRA K8 minus LoRA equal",
        "minus random K8",
        "minus LoRA r8",
    ]
    return table([*titles, "merged, head minus head", "minus LoRA r8"], lines)


def growth_table(rows: Cells) -> str:
    """What more adapters, or relatives among them, add: the same method, targets and seeds with one zoo and with another."""
    pairs = (
        (("own", 40), ("own", 5)),
        (("own", 20), ("own", 5)),
        (("own", 40), ("own", 20)),
        (("other", 40), ("other", 5)),
        (("own", 20), ("other", 20)),
        (("own", 40), ("other", 40)),
    )
    lines = []
    for one, other in pairs:
        named = [f"{size} {KINDS[kind] if kind == 'own' else 'of ' + KINDS[kind]}" for kind, size in (one, other)]
        found = [
            shown(list(gaps(*(accuracies(rows, method, zoo=kind, size=size) for kind, size in (one, other))).values()))
            for method in ("EigenLoRA K8", "merged, head")
        ]
        lines.append([" minus ".join(named), *found])
    return table(["adapters", "EigenLoRA K8", "merged, head"], lines)


def targets_table(rows: Cells, own: dict[str, str]) -> str:
    names = [*PRIMARY, *ON_TOP]
    found = {name: accuracies(rows, name) for name in names}
    scales = {
        (row["target"], row["seed"]): row["scale"]
        for row in rows
        if row["method"] == "merged, head" and row["kind"] == "own" and row["size"] == 20 and row["rows"] == 64
    }
    lines = []
    for target in own:
        if target in found["EigenLoRA K8"]:
            values = [f"{fmean(found[name][target].values()):.3f}" if target in found[name] else "" for name in names]
            chosen = ", ".join(f"{scale:g}" for (name, _), scale in sorted(scales.items()) if name == target)
            lines.append([target, *values, chosen])
    return table(["target", *names, "λ"], lines)


def tuning_table(rows: Cells) -> str:
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["stage"] == "tune":
            found.setdefault((row["method"], row["rate"]), []).append(row["accuracy"])
    methods = dict.fromkeys(name for name, _ in found)
    return table(
        ["method", "mean accuracy on the tuning customers, by rate"],
        [
            [m, ", ".join(f"{rate:g}: {fmean(v):.3f}" for (name, rate), v in found.items() if name == m)]
            for m in methods
        ],
    )


def calibration_table(*, single: bool) -> str:
    """Brier scores on zoos and targets that a model was not fitted on, beside the base rate's."""
    path = RESULTS / "calibration.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    lines = []
    for name, by_event in (found["single"] if single else found["models"]).items():
        for event, one in by_event.items():
            if one:
                gain, low, high = one["gain"]
                text = f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
                count = f"{one['n']} ({one['n_targets']})"
                scores = [f"{one[key]:.3f}" for key in ("brier", "base_brier")]
                lines.append(
                    [name, event, count, f"{one['happened']:.0%}", *scores, f"**{text}**" if low > 0 else text]
                )
    titles = [
        "measure" if single else "model",
        "event",
        "observations (targets)",
        "happened",
        "Brier",
        "base rate's",
        "gain",
    ]
    return table(titles, lines)


def reuse_table(measures: Cells, data: Path) -> str:
    """How often the adapter that points furthest downhill is of the target's own domain."""
    group = {c.name: c.group for c in customers.targets(data)}
    domain = {c.name: c.group for zoo in customers.ZOOS for c in customers.members(zoo, data)}
    lines = []
    for zoo, size in sorted(
        {(m["zoo"], m["size"]) for m in measures if m["kind"] == "target" and m["zoo"].startswith("clinc")}
    ):
        own = [m for m in measures if m["kind"] == "target" and (m["zoo"], m["size"]) == (zoo, size)]
        own = [m for m in own if any(domain[name] == group[m["target"]] for name in m["cosines"])]
        if own:
            right = sum(domain[m["best_adapter"]] == group[m["target"]] for m in own)
            chance = fmean(fmean(domain[name] == group[m["target"]] for name in m["cosines"]) for m in own)
            mean = fmean(m["mean_cosine"] for m in own)
            lines.append([zoo, str(size), f"{right} of {len(own)}", f"{chance:.0%}", f"{mean:+.3f}"])
    return table(
        ["zoo", "adapters", "nearest adapter is of the target's domain", "by chance", "cosine of the mean update"],
        lines,
    )


def draw(rows: Cells, path: Path) -> None:
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    labels = []
    for one, other in PAIRS:
        values = list(gaps(accuracies(rows, one), accuracies(rows, other)).values())
        if values:
            mean, error, _ = interval(values)
            left.errorbar(
                100 * mean,
                -len(labels),
                xerr=100 * error if len(values) > 2 else 0,
                fmt="o",
                color="tab:blue",
                capsize=3,
            )
            left.plot(
                [100 * v for v in values], [-len(labels) - 0.25] * len(values), "|", color="tab:grey", markersize=5
            )
            labels.append(f"{one} − {other}")
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(0, -len(labels), -1), labels, fontsize=8)
    left.set(xlabel="points of accuracy, 95 % interval over targets", title="64 rows, 20 related adapters")
    for method, other, color in (("EigenLoRA K8", "LoRA equal", "tab:blue"), ("merged, head", "head", "tab:orange")):
        points = []
        few = accuracies(rows, method, size=5)  # the same targets at every size
        for size in (5, 10, 20, 40):
            found = gaps(accuracies(rows, method, size=size), accuracies(rows, other))
            values = [gap for target, gap in found.items() if target in few]
            if len(values) > 2:
                points.append((size, *interval(values)[:2]))
        if points:
            sizes, means, errors = zip(*points, strict=True)
            right.errorbar(
                sizes,
                [100 * m for m in means],
                yerr=[100 * e for e in errors],
                fmt="o-",
                color=color,
                capsize=3,
                label=f"{method} − {other}",
            )
    right.axhline(0, color="black", linewidth=0.8)
    right.set(
        xscale="log", xlabel="related adapters", ylabel="points of accuracy", title="Growth with the number of adapters"
    )
    right.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    right.minorticks_off()
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    given = parser.parse_args()
    cells, measures = read(given.work / "cells.jsonl"), read(given.work / "measures.jsonl")
    rows, own = with_kinds(cells, given.data), {c.name: c.relatives for c in customers.targets(given.data)}
    tables = {
        "primary": comparisons(rows, own),
        "methods": methods_table(rows, own, (*PRIMARY, *ON_TOP, *OTHERS)),
        "targets": targets_table(rows, own),
        "zoos": zoos_table(rows, measures),
        "growth": growth_table(rows),
        "rows-16": comparisons(rows, own, n_rows=16),
        "rows-256": comparisons(rows, own, n_rows=256),
        "tuning": tuning_table(cells),
        "reuse": reuse_table(measures, given.data),
        "calibration": calibration_table(single=False),
        "measures": calibration_table(single=True),
        "others": comparisons(rows, own, [(name, other) for name in OTHERS for other in ("LoRA r8", "EigenLoRA K8")]),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("cells", "scales", "measures"):
        found = read(given.work / f"{name}.jsonl")
        (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    draw(rows, RESULTS / "regimes.png")
    if given.docs is None:
        print("\n\n".join(f"{name}\n{text}" for name, text in tables.items()))
        return
    page = given.docs.read_text()
    given.docs.write_text(
        _MARK.sub(
            lambda m: f"{m[1]}{tables.get(m[2], '').strip() or m[0][len(m[1]) : -len(m[3])].strip()}\n{m[3]}", page
        )
    )


if __name__ == "__main__":
    main()
