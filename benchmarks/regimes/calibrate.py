"""Which of the audit's numbers predicts what training gains? Fitted on some zoos and targets, judged on others.

Command:   python benchmarks/regimes/calibrate.py --data DIR --work DIR [--ship]   (after run.py and measures.py)
Writes:    benchmarks/results/regimes/calibration.json and reliability.png; with --ship also what the audit ships
           (src/eigenpeft/audit/task/calibration.json).

An observation is one zoo (kind, size) with one target and one seed. It is judged by a logistic model of all observations that share
neither its zoo nor the group of its target (the targets with relatives in one zoo). The yardstick is the base rate of those same
observations. Intervals are bootstraps over targets. The two models that ship were named before any cell was looked at: "adapters"
(the held-out share at K = 8) and "task" (that, the gradient's share over a random subspace's, and how far the mean update points
downhill). The single measures beside them are exploratory.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import customers
import torch
from compare import Cells, accuracies, interval, kind_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run import read

from eigenpeft.audit.task.calibration import SHIPPED
from eigenpeft.linalg.scores.logistic import brier_score, fit_logistic
from report import RESULTS

EVENTS = {
    "EigenLoRA (K 8) ahead of a LoRA of as many numbers": ("EigenLoRA K8", "LoRA equal"),
    "EigenLoRA (K 8) ahead of a random subspace of its size": ("EigenLoRA K8", "random K8"),
    "EigenLoRA (K 8) ahead of LoRA r 8": ("EigenLoRA K8", "LoRA r8"),
    "merged start with the head alone ahead of LoRA r 8": ("merged, head", "LoRA r8"),
    "merged start with the head alone ahead of the head alone": ("merged, head", "head"),
}
MODELS = {"adapters": ("held_out",), "task": ("held_out", "gradient", "downhill_mean")}
SINGLE = ("held_out", "adapters", "pair_cosine", "gradient", "downhill_mean", "downhill_best")
RIDGE, DRAWS, LEAST, FEWEST = 1.0, 2000, 1e-4, 8


def observations(cells: Cells, measures: Cells, data: Path, *, kinds: tuple[str, ...]) -> Cells:
    """One record per (zoo, size, target, seed, rows): measures and gains over each control."""
    own = {c.name: c.relatives for c in customers.targets(data)}
    rows = [
        {**row, "kind": kind_of(row, own[row["target"]])}
        for row in cells
        if row["stage"] == "test" and row["draw"] == 0
    ]
    zoo_of = {(m["zoo"], m["size"]): m for m in measures if m["kind"] == "zoo" and m["draw"] == 0}
    keys = ("zoo", "size", "target", "rows", "seed")
    task_of = {tuple(m[k] for k in keys): m for m in measures if m["kind"] == "target" and m["draw"] == 0}
    controls = {
        (name, n): accuracies(rows, name, n_rows=n)
        for name in ("LoRA equal", "random K8", "LoRA r8", "head")
        for n in (16, 64, 256)
    }
    found = {}
    for row in rows:
        key = tuple(row[k] for k in keys)
        if row["kind"] in kinds and row["method"] in ("EigenLoRA K8", "merged, head") and key in task_of:
            zoo, task = zoo_of[key[:2]], task_of[key]
            record = found.setdefault(
                key,
                {
                    **dict(zip(keys, key, strict=True)),
                    "kind": row["kind"],
                    "group": own[row["target"]],
                    "held_out": math.log10(max(zoo["held_out_8"] - zoo["chance_8"], LEAST)),
                    "adapters": math.log2(row["size"] / 20),
                    "n_rows": math.log2(row["rows"] / 64),
                    "pair_cosine": zoo["pair_cosine"],
                    "gradient": math.log2(task["gradient_share"] / task["gradient_random"]),
                    "downhill_mean": task["mean_cosine"],
                    "downhill_best": task["best_cosine"],
                    "gains": {},
                },
            )
            for one, other in EVENTS.values():
                control = controls[other, row["rows"]].get(row["target"], {}).get(row["seed"])
                if one == row["method"] and control is not None:
                    record["gains"][f"{one}/{other}"] = row["accuracy"] - control
    return list(found.values())


STUDY = RESULTS.parent / "study" / "encoder.jsonl"
NAMES_THERE = {
    "EigenLoRA K8": "EigenLoRA K=8",
    "random K8": "random subspace K=8",
    "LoRA equal": "LoRA, equal parameters to K=8",
    "LoRA r8": "LoRA r8",
    "head": "head only",
}


def unrelated_tasks(measures: Cells, *, n_rows: int = 64) -> Cells:
    """The earlier study (docs/study.md) as observations: a left-out one of the ten unrelated tasks, the zoo without it."""
    zoo = next((m for m in measures if m["kind"] == "zoo" and m["zoo"] == "shipped"), None)
    if zoo is None:
        return []
    found = {}
    for row in read(STUDY):
        if row["stage"] == "test" and row["n_train"] == n_rows and row.get("zoo") is None:
            found.setdefault((row["target"], row["seed"]), {})[row["method"]] = row["accuracy"]
    records = []
    for (target, seed), by_method in sorted(found.items()):
        gains = {}
        for one, other in EVENTS.values():
            names = NAMES_THERE.get(one), NAMES_THERE[other]
            if names[0] in by_method and names[1] in by_method:
                gains[f"{one}/{other}"] = by_method[names[0]] - by_method[names[1]]
        if gains:
            measured = {
                "held_out": math.log10(max(zoo["held_out_8"] - zoo["chance_8"], LEAST)),
                "adapters": math.log2(zoo["size"] / 20),
                "n_rows": math.log2(n_rows / 64),
                "pair_cosine": zoo["pair_cosine"],
            }
            place = {"zoo": "shipped", "size": zoo["size"], "target": target, "rows": n_rows, "seed": seed}
            records.append({**place, "kind": "own", "group": "ten tasks", **measured, "gains": gains})
    return records


def table_of(
    records: Cells, features: tuple[str, ...], event: tuple[str, str]
) -> tuple[torch.Tensor, torch.Tensor, Cells]:
    kept = [r for r in records if "/".join(event) in r["gains"]]
    x = torch.tensor([[r[f] for f in features] for r in kept], dtype=torch.float64).reshape(len(kept), len(features))
    return x, torch.tensor([float(r["gains"]["/".join(event)] > 0) for r in kept], dtype=torch.float64), kept


def fitted(x: torch.Tensor, y: torch.Tensor) -> dict:
    """A logistic model on measures brought to mean 0 and standard deviation 1."""
    center, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    weights, intercept = fit_logistic((x - center) / scale, y, ridge=RIDGE)
    return {"center": center.tolist(), "scale": scale.tolist(), "weights": weights.tolist(), "intercept": intercept}


def predicted(model: dict, x: torch.Tensor) -> torch.Tensor:
    center, scale, weights = (torch.tensor(model[k], dtype=torch.float64) for k in ("center", "scale", "weights"))
    return torch.sigmoid(((x - center) / scale) @ weights + model["intercept"])


def judged(records: Cells, features: tuple[str, ...], event: tuple[str, str]) -> dict | None:
    """Probabilities by models that saw neither an observation's zoo nor its target's group, and their Brier scores."""
    x, y, kept = table_of(records, features, event)
    probability, base = (
        torch.full((len(kept),), math.nan, dtype=torch.float64),
        torch.full((len(kept),), math.nan, dtype=torch.float64),
    )
    for zoo, group in {(r["zoo"], r["group"]) for r in kept}:
        inside = torch.tensor([(r["zoo"], r["group"]) == (zoo, group) for r in kept])
        apart = torch.tensor([r["zoo"] != zoo and r["group"] != group for r in kept])
        if int(apart.sum()) >= FEWEST:
            probability[inside] = predicted(fitted(x[apart], y[apart]), x[inside])
            base[inside] = y[apart].mean()
    known = ~probability.isnan()
    if not bool(known.any()):
        return None
    gains = brier_score(base, y) - brier_score(probability, y)
    targets = sorted({r["target"] for r, k in zip(kept, known.tolist(), strict=True) if k})
    by_target = [
        gains[torch.tensor([k and r["target"] == t for r, k in zip(kept, known.tolist(), strict=True)])]
        for t in targets
    ]
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(targets), (DRAWS, len(targets)), generator=generator)
    sums, counts = torch.stack([g.sum() for g in by_target]), torch.tensor([float(len(g)) for g in by_target])
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return {
        "n": int(known.sum()),
        "n_targets": len(targets),
        "happened": float(y[known].mean()),
        "brier": float(brier_score(probability, y)[known].mean()),
        "base_brier": float(brier_score(base, y)[known].mean()),
        "gain": [float(gains[known].mean()), low, high],
        "probability": probability[known].tolist(),
        "outcome": y[known].tolist(),
    }


def draw(found: dict, path: Path) -> None:
    """Reliability: in bins of predicted probability, how often the event happened."""
    figure = Figure(figsize=(4 * len(EVENTS), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, event in zip(figure.subplots(1, len(EVENTS)), EVENTS, strict=True):
        axes.plot([0, 1], [0, 1], color="tab:grey", linestyle=":")
        for kind, color in (("adapters", "tab:orange"), ("task", "tab:blue")):
            one = found["models"][kind].get(event)
            if one is None:
                continue
            p, y = torch.tensor(one["probability"]), torch.tensor(one["outcome"])
            bins = (p * 5).long().clamp(max=4)
            points = [
                (float(p[bins == b].mean()), float(y[bins == b].mean()), int((bins == b).sum()))
                for b in range(5)
                if bool((bins == b).any())
            ]
            axes.plot(
                [a for a, _, _ in points],
                [b for _, b, _ in points],
                "-",
                color=color,
                label=f"{kind}: Brier {one['brier']:.3f}, base {one['base_brier']:.3f}",
            )
            axes.scatter(
                [a for a, _, _ in points], [b for _, b, _ in points], s=[8 * n for _, _, n in points], color=color
            )
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted", ylabel="happened")
        axes.set_title(event, fontsize=8)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def shipped(found: dict, records: dict[str, Cells]) -> dict:
    events, ranges = {}, {}
    for kind, features in MODELS.items():
        events[kind] = []
        for event, pair in EVENTS.items():
            x, y, kept = table_of(records[kind], features, pair)
            one = found["models"][kind].get(event)
            if one is not None:
                by_target = defaultdict(list)
                for record in kept:
                    by_target[record["target"]].append(100 * record["gains"]["/".join(pair)])
                mean, half, _ = interval([fmean(values) for values in by_target.values()])
                scores = {
                    "base_rate": float(y.mean()),
                    "points": [mean, half],
                    "judged": [one["n"], round(one["n"] * one["happened"])],
                    **{k: one[k] for k in ("brier", "base_brier", "gain")},
                }
                events[kind].append({"event": event, "features": list(features), **fitted(x, y), **scores})
        ends = {f: [min(r[f] for r in records[kind]), max(r[f] for r in records[kind])] for f in features}
        sizes, rows = ([r[f] for r in records[kind]] for f in ("adapters", "n_rows"))
        # Half a doubling more either way counts as seen.
        ranges[kind] = {
            **ends,
            "adapters": [min(sizes) - 0.5, max(sizes) + 0.5],
            "rows": [min(rows) - 0.5, max(rows) + 0.5],
        }
    every = records["task"]
    return {
        "source": "benchmarks/regimes/calibrate.py on benchmarks/results/regimes",
        "base_models": ["all-minilm-l6-v2"],
        "n_adapters": [min(r["size"] for r in every), max(r["size"] for r in every)],
        "n_zoos": len({(r["zoo"], r["size"]) for r in every}),
        "n_tasks": len({r["target"] for r in every}),
        "seen": ranges,
        "events": events,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ship", action="store_true", help="write the audit's calibration too")
    given = parser.parse_args()
    cells, measures = read(given.work / "cells.jsonl"), read(given.work / "measures.jsonl")
    # Without rows of the task the audit speaks of a task of the same kind as the adapters'.
    records = {
        "adapters": observations(cells, measures, given.data, kinds=("own",)) + unrelated_tasks(measures),
        "task": observations(cells, measures, given.data, kinds=("own", "other", "far", "shipped", "mixed")),
    }
    found: dict = {
        "models": {
            kind: {e: judged(records[kind], f, pair) for e, pair in EVENTS.items()} for kind, f in MODELS.items()
        }
    }
    found["single"] = {f: {e: judged(records["task"], (f,), pair) for e, pair in EVENTS.items()} for f in SINGLE}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "calibration.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, RESULTS / "reliability.png")
    for name, by_event in (*found["models"].items(), *found["single"].items()):
        for event, one in by_event.items():
            if one:
                scores = f"happened {one['happened']:.2f} Brier {one['brier']:.3f} base {one['base_brier']:.3f}"
                gain, low, high = one["gain"]
                print(f"{name:14} {event:58} n {one['n']:3} {scores} gain {gain:+.3f} ({low:+.3f} to {high:+.3f})")
    if given.ship:
        SHIPPED.write_text(json.dumps(shipped(found, records), indent=1) + "\n")


if __name__ == "__main__":
    main()
