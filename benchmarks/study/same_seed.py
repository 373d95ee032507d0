"""Does one seed for the whole zoo change what the audit says, or what training in its subspace reaches?

Command:  python recipes/train_zoo.py --data DIR --out WORK/one_seed --seed 11 \\
              --steps 100 --batch_size 16 --bf16 true --max_length 48
          python benchmarks/study/same_seed.py --data DIR --zoos WORK/one_seed
          (the same without --seed, under another name, separates the seed from the shorter training)
Hardware: 1 CPU core; 5 minutes to train the zoo, 5 minutes here. Started again, it goes on where it stopped.
Writes:   benchmarks/results/study/same_seed.jsonl (one line per audit, one line per cell) and a markdown table, on
          stdout or between the marks of a page.

The cells are those of encoder.py (six targets, seed 0, 256 rows, its learning rates), for EigenLoRA with K = 8 and K = 32; the
zoo that ships with eigenpeft is beside them, its cells taken from encoder.jsonl. A target's own adapter is left out.
"""

import argparse
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

import encoder
from compare import accuracies, difference, shown
from encoder import BATCH_SIZE, STEPS, TARGETS, TUNING_ROWS, append, best_rate, environment, quiet, read, run
from methods import OURS
from tasks import load_task

from eigenpeft import SubspaceBuilder
from eigenpeft.audit import audit_adapters
from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.assets import shipped_adapters
from eigenpeft.errors import SubspaceError
from report import filled, on

RESULTS = encoder.RESULTS.with_name("same_seed.jsonl")
SHIPPED = "shipped"
METHODS = ("EigenLoRA K=8", OURS)
PLACES = (8, 32, 64)
TITLES = {
    "explained": "explained",
    "held_out": "held out",
    "held_out_alone": "held out, each adapter alone",
    "held_out_alone_in": "the same, input side",
    "held_out_out": "held out, output side",
}


def audited(name: str, zoo: AdapterCollection) -> dict:
    """What the audit says of a zoo, and the components that "auto" takes for a module, in the mean (None: refuses)."""
    report = audit_adapters(zoo, n_components=max(PLACES), progress=False)
    curves = {"explained": report.explained, "held_out": report.held_out, "held_out_alone": report.held_out_alone}
    curves |= {"held_out_alone_in": report.held_out_alone_input, "held_out_out": report.held_out_output}
    shares = {
        f"{kind}_{source}": {str(k): round(float(getattr(curve, source)[k - 1]), 4) for k in PLACES}
        for kind, curve in curves.items()
        for source in ("real", "null")
    }
    try:
        subspace = SubspaceBuilder("auto").fit(zoo).subspace_
        auto = round(fmean(bases.n_components for bases in subspace.values()), 1)
    except SubspaceError:
        auto = None
    groups = [list(group) for group in report.groups]
    return {
        "stage": "audit",
        "zoo": name,
        "verdict": report.verdict,
        "groups": groups,
        "auto_components": auto,
        **shares,
    }


def train_cells(name: str, zoo: AdapterCollection, data: Path, results: Path) -> None:
    tuned = read(encoder.RESULTS)
    load = lru_cache(maxsize=1)(partial(load_task, n_train=TUNING_ROWS, seed=0, data=data))
    for target in TARGETS:
        for method in METHODS:
            cell = {"stage": "test", "zoo": name, "target": target, "method": method, "rate": best_rate(tuned, method)}
            cell |= {"seed": 0, "n_train": TUNING_ROWS, "steps": STEPS, "batch_size": BATCH_SIZE}
            if any(cell.items() <= row.items() for row in read(results)):
                continue
            head_rate = best_rate(tuned, "head only")
            result = run(cell, task=load(target), zoo=zoo, head_rate=head_rate, results=results)
            append(results, {**cell, "head_rate": head_rate, **result, "environment": environment()})
            print(f"{name:12} {target:14} {method:30} {result['accuracy']:.3f} {result['seconds']} s", flush=True)


def table(results: Path) -> str:
    """Verdict, held-out shares beside chance, and accuracies, a column a zoo."""
    audits = {row["zoo"]: row for row in read(results) if row["stage"] == "audit"}
    cells = defaultdict(dict)
    for row in read(results):
        if row["stage"] == "test":
            cells[row["zoo"], row["method"]][row["target"]] = row
    tested = on(accuracies(read(encoder.RESULTS), TUNING_ROWS), targets=TARGETS, seeds=[0])
    for method in METHODS:
        cells[SHIPPED, method] = {target: row for (target, _), row in tested.get(method, {}).items()}
    lines = [f"| | {' | '.join(audits)} |", "|" + "---|" * (len(audits) + 1)]
    lines.append(f"| verdict | {' | '.join(row['verdict'] for row in audits.values())} |")
    for kind, title in TITLES.items():
        for k in ("8", "32"):
            shares = [f"{row[f'{kind}_real'][k]:.3f} ({row[f'{kind}_null'][k]:.3f})" for row in audits.values()]
            lines.append(f"| {title}, K = {k} (by chance) | {' | '.join(shares)} |")
    components = [
        "refused" if row["auto_components"] is None else f"{row['auto_components']:g}" for row in audits.values()
    ]
    lines.append(f'| components per module by "auto", mean | {" | ".join(components)} |')
    for method in METHODS:
        found = [cells[name, method] for name in audits]
        means = [f"{fmean(row['accuracy'] for row in own.values()):.3f} ({len(own)})" if own else "" for own in found]
        lines.append(f"| accuracy, {method} (targets) | {' | '.join(means)} |")
        gaps = [
            shown(difference({"one": cells[name, method], "other": cells[SHIPPED, method]}, "one", "other"))
            if name != SHIPPED
            else ""
            for name in audits
        ]
        lines.append(f"| minus that of {SHIPPED} | {' | '.join(gaps)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--zoos", type=Path, nargs="*", default=[], help="folders, named in the rows")
    parser.add_argument("--docs", type=Path, help="page to fill in, instead of printing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    for folder in [shipped_adapters(), *arguments.zoos]:
        name = folder.name if folder in arguments.zoos else SHIPPED
        with AdapterCollection.from_pretrained(folder) as zoo:
            if not any(row["stage"] == "audit" and row["zoo"] == name for row in read(arguments.results)):
                append(arguments.results, {**audited(name, zoo), "environment": environment()})
            if name != SHIPPED:
                train_cells(name, zoo, arguments.data, arguments.results)
    found = {"same-seed": table(arguments.results)}
    if arguments.docs:
        arguments.docs.write_text(filled(arguments.docs.read_text(), found))
    else:
        print(found["same-seed"])


if __name__ == "__main__":
    main()
