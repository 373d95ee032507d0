"""Which start for a new task: mixtures, the nearest adapter, INIT, the merged start, LoraHub, beside LoRA and random controls.

Papers:    LoraHub, arXiv 2307.13269; EigenLoRAx, arXiv 2502.04700; LoRA, arXiv 2106.09685.
Command:   python benchmarks/regimes/starts.py --data DIR --work DIR --part tune|tasks|clinc150|banking77 [--rows 64]
           python benchmarks/regimes/starts.py --data DIR --work DIR --report   (the tables of docs/compose.md)
Hardware:  CPU, one thread; 1 to 6 s of CPU time per cell.
Writes:    WORK/cells.jsonl and WORK/scales.jsonl as run.py; started again, it goes on. --report publishes them as
           benchmarks/results/regimes/starts.jsonl (the first row has the environment).

Adapters are in query and value of the upper three of MiniLM's six layers, in the zoos and in everything that is trained; what lies
below is computed once. Three parts: `tasks` has the ten tasks of the shipped adapters, each with the adapters of the nine others;
`clinc150` and `banking77` their ten and eight customers, each with the twenty adapters of related ones. 40 steps of 8 rows (80
where there are 256 rows), three seeds of rows, head and batches. Rates are chosen on two customers of banking77 that are never
targets, at 64 rows.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import fmean

import customers
import training
import zoos
from compare import gaps, shown
from customers import Customer
from methods import METHODS
from run import RESULTS, Study, append, quiet

FIRST_LAYER, BATCH_SIZE, MAX_LENGTH, SEEDS, TUNING_SEEDS, TUNING_ROWS = 3, 8, 48, (0, 1, 2), (100, 101), 64
MODULES = r".*\.encoder\.layer\.[345]\.attention\.self\.(query|value)"
ROWS = (16, 64, 256)
NAMES = {
    "head": "head alone",
    "merged, head": "merged start, λ on held-out rows, head",
    "nearest, head": "nearest adapter frozen, head",
    "LoraHub": "LoraHub: weights by 40 evaluations without gradients, head",
    "mixture, shared": "mixture, one weight per adapter",
    "mixture": "mixture, one weight per adapter and module",
    "random mixture": "the same over *random* adapters of the same norms",
    "EigenLoRA K8": "EigenLoRA K 8",
    "random K8": "*random* subspace K 8",
    "merged, EigenLoRA K8": "merged start, EigenLoRA K 8",
    "LoRA r1": "LoRA r 1",
    "INIT r8": "EigenLoRAx-INIT, LoRA r 8",
    "random INIT r8": "the same at *random* orthonormal directions, LoRA r 8",
    "nearest continued": "nearest adapter continued, LoRA r 8",
    "merged, LoRA r8": "merged start, LoRA r 8",
    "LoRA r8": "LoRA r 8",
}
CONTROLS = (
    ("INIT r8", "random INIT r8"),
    ("EigenLoRA K8", "random K8"),
    ("mixture", "random mixture"),
    ("merged, head", "head"),
    ("nearest, head", "head"),
)
TUNED = ("head", "LoRA r8", "LoRA r1", "EigenLoRA K8", "random K8", "mixture", "mixture, shared")
MORE_RATES = {
    "LoRA r8": (1e-2,),
    "LoRA r1": (1e-1,),
    "EigenLoRA K8": (1e-1,),
    "random K8": (1e-1,),
}  # fewer layers train


def task_customer(name: str, data: Path) -> Customer:
    """A whole task as a customer whose relatives are the other tasks."""
    with (data / name / "train.jsonl").open(encoding="utf-8") as lines:
        labels = sorted({json.loads(line)["label"] for line in lines})
    return Customer(name, name, tuple(labels), name, f"without_{name}")


class Starts(Study):
    """The cells of this study; everything below the upper layers is computed once per task."""

    first_layer, modules, batch_size, published = FIRST_LAYER, MODULES, BATCH_SIZE, Path("nothing")

    def __init__(self, data: Path, work: Path):
        super().__init__(data, work)
        self.customers |= {name: task_customer(name, data) for name in zoos.TASKS}

    def _task(self, target: str, rows: int, seed: int) -> training.Task:
        parts = customers.rows_of_target(self.customers[target], n_rows=rows, seed=seed, data=self.data)
        return training.tokenized(*parts, first_layer=FIRST_LAYER, max_length=MAX_LENGTH)

    def zoo_of(self, target: str) -> tuple[str, int, int]:
        zoo = self.customers[target].relatives
        return (zoo, 9, 0) if zoo.startswith("without_") else (zoo, 20, 0)

    def sizes_of(self, cell: dict) -> tuple[str, int, int]:
        return self.zoo_of(cell["target"])

    def rate(self, name: str) -> float:
        method = METHODS[METHODS[name].tuned_as or name]
        found: dict[float, list[float]] = {}
        for row in self.rows:
            if row["stage"] == "tune" and row["method"] == method.name:
                found.setdefault(row["rate"], []).append(row["accuracy"])
        return max(sorted(found), key=lambda rate: fmean(found[rate])) if found else method.rates[0]

    def asked(self, part: str, targets: list[str], n_rows: int, seeds=SEEDS) -> list[dict]:
        """One seed after the other, those cells of a (target, seed) together that share what is searched."""
        tuning = part == "tune"
        cells = []
        for seed in TUNING_SEEDS if tuning else seeds:
            for target in targets:
                for name in TUNED if tuning else NAMES:
                    uses = METHODS[name].uses_zoo
                    zoo, size, _ = self.zoo_of(target)
                    rates = (*METHODS[name].rates, *MORE_RATES.get(name, ())) if tuning else (self.rate(name),)
                    common = {"zoo": zoo if uses else None, "size": size if uses else 0, "draw": 0, "target": target}
                    cells += [
                        {
                            "stage": "tune" if tuning else "test",
                            **common,
                            "rows": n_rows,
                            "seed": seed,
                            "method": name,
                            "rate": rate,
                        }
                        for rate in rates
                    ]
        return cells

    def train_zoo(self, zoo: str, size: int) -> None:
        """Train the adapters of a zoo that are not there yet."""
        names = zoos.zoo_names(zoo, size, 0)
        known = {} if zoo.startswith("without_") else {c.name: c for c in customers.members(zoo, self.data)}
        for name in names:
            if not (folder := self.work / "zoos" / name).exists():
                customer = known.get(name) or self.customers[name]
                more = {} if known else {"per_intent": 600 // len(customer.intents), "steps": 100}
                record = zoos.train_member(
                    customer, data=self.data, folder=folder, modules=MODULES, first_layer=FIRST_LAYER, **more
                )
                print(
                    f"{time.strftime('%H:%M:%S')} {name:14} {record['accuracy']:.3f} {record['seconds']} s", flush=True
                )

    def do(self, part: str, targets: list[str], n_rows: int, seeds=SEEDS) -> None:
        for zoo, size, _ in dict.fromkeys(map(self.zoo_of, targets)):
            self.train_zoo(zoo, size)
        for cell in self.asked(part, targets, n_rows, seeds):
            if self.key(cell) not in self.done:
                row = self.run(cell)
                append(self.path, row)
                self.rows.append(row)
                self.done.add(self.key(row))
                where = f"{cell['target']:16} {cell['rows']:4} {cell['seed']} {cell['method']:22} {cell['rate']:<6g}"
                print(
                    f"{time.strftime('%H:%M:%S')} {where} {row['accuracy']:.3f} {row['seconds_before']}+{row['seconds']}",
                    flush=True,
                )


def accuracies(rows: list[dict], method: str, targets: list[str], n_rows: int) -> dict[str, dict[int, float]]:
    """Target to seed to accuracy."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if (row["method"], row["rows"], row["stage"]) == (method, n_rows, "test") and row["target"] in targets:
            found.setdefault(row["target"], {})[row["seed"]] = row["accuracy"]
    return found


def table(rows: list[dict], targets: list[str]) -> str:
    """Mean accuracy and the difference to LoRA r 8, per number of rows."""
    counts = [n for n in ROWS if accuracies(rows, "LoRA r8", targets, n)]
    titles = ["start and what is trained", "numbers beside the head"]
    lines = [
        "| "
        + " | ".join([*titles, *(f"{n} rows" for n in counts), *(f"minus LoRA r 8, {n} rows" for n in counts)])
        + " |"
    ]
    lines.append("|" + "---|" * (2 + 2 * len(counts)))
    for name, title in NAMES.items():
        means, differences = [], []
        for n in counts:
            own, lora = (accuracies(rows, each, targets, n) for each in (name, "LoRA r8"))
            means.append(f"{fmean(fmean(by_seed.values()) for by_seed in own.values()):.3f}" if own else "")
            differences.append(shown(list(gaps(own, lora).values())) if own and name != "LoRA r8" else "")
        numbers = {row["parameters"] for row in rows if row["method"] == name and row["target"] in targets}
        lines.append(
            "| " + " | ".join([title, " to ".join(f"{n:,}" for n in sorted(numbers)), *means, *differences]) + " |"
        )
    return "\n".join(lines)


def against_controls(rows: list[dict], targets: list[str]) -> str:
    """What recycles beside its own control, per number of rows."""
    counts = [n for n in ROWS if accuracies(rows, "LoRA r8", targets, n)]
    lines = ["| points of accuracy | " + " | ".join(f"{n} rows" for n in counts) + " |", "|---|" + "---|" * len(counts)]
    for one, other in CONTROLS:
        found = [
            shown(list(gaps(*(accuracies(rows, name, targets, n) for name in (one, other))).values())) for n in counts
        ]
        lines.append("| " + " | ".join([f"{NAMES[one]}, minus {NAMES[other]}", *found]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=("tune", "tasks", "clinc150", "banking77"))
    parser.add_argument("--rows", type=int, nargs="*", default=[64])
    parser.add_argument("--targets", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    quiet()
    study = Starts(given.data, given.work)
    parts = {
        "tune": [name for name in study.customers if name.startswith("tune_")],
        "tasks": list(zoos.TASKS),
    }
    for source in ("clinc150", "banking77"):
        named = [name for name, c in study.customers.items() if c.source == source]
        parts[source] = [name for name in named if name.startswith("new_")]
    if given.report:
        published = RESULTS / "starts.jsonl"
        once = [{key: value for key, value in row.items() if key != "environment"} for row in study.rows[1:]]
        published.write_text("".join(json.dumps(row) + "\n" for row in [*study.rows[:1], *once]), encoding="utf-8")
        parts["all customers"] = parts["clinc150"] + parts["banking77"]
        for part in ("tasks", "clinc150", "banking77", "all customers"):
            print(f"{part}\n\n{table(study.rows, parts[part])}\n\n{against_controls(study.rows, parts[part])}\n")
        return
    if (worst := training.difference_to_transformers()) > 1e-4:
        raise SystemExit(f"The packed model differs from transformers' by {worst:.1e}; nothing would be comparable.")
    for n_rows in given.rows:
        study.do(
            given.part, given.targets or parts[given.part], TUNING_ROWS if given.part == "tune" else n_rows, given.seeds
        )


if __name__ == "__main__":
    main()
