"""Ten adapters as one: every merging rule on real tasks, beside each adapter alone and the base model.

Command:  python benchmarks/merging.py --data shared/data/tasks                         (the ten shipped adapters)
          python benchmarks/merging.py --data shared/data/tasks --zoo clinc --work DIR  (ten customers of clinc150, trained first)
          python benchmarks/merging.py --report
Hardware: CPU, one thread; about 50 minutes per zoo on an idle core, plus 5 to train the customers.
Writes:   one file per cell in --work, and benchmarks/results/merging.json and merging.md with --report.

Every task keeps its own head. The figures are of 300 rows per task of the test split (cr, mpqa, mr and subj have none: rows of
dev; customers of clinc150: 200 rows). The multiplier λ is chosen on other rows, of dev: three disjoint sets of 30 per task, the
best mean accuracy of each set, and a cell's figure is the mean over the three. (Until November 2026 the figures of the shipped ten
were of 200 rows of dev, on which every merge is three points worse and the adapters themselves half a point.) λ is tried
at fixed ratios of the merged update's norm to the mean norm of the adapters, the same for every rule, a factor of 1.3 or so apart.
"auto" is λ without rows. (With ten rows per task and ratios 1.4 apart, as this benchmark had at first, one set in three cost a rule
up to two points. A cell's `n_lambda_rows` says what it was chosen on; without it, it was ten.)
Differences are to task arithmetic with their 95 % intervals over tasks (paired, Student's t).
Statistics for RegMean come from 48 (or 8) training rows per task, without labels. The customers of clinc150 (CC BY 3.0) have 6
intents of one domain each, all ten domains once; they are those of benchmarks/regimes.
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from huggingface_hub.utils import disable_progress_bars
from timing import environment
from transformers import AutoModel, AutoTokenizer

from eigenpeft.collection import AdapterCollection
from eigenpeft.combining import collect_statistics, merge
from eigenpeft.combining.merged import MergedAdapter
from eigenpeft.combining.scoring import merged_into
from eigenpeft.demo.assets import base_model, shipped_adapters

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "regimes"))
from customers import members, rows_of_member  # noqa: E402
from zoos import train_member  # noqa: E402

N_TEST, N_LAMBDA, SEEDS = {"shipped": 300, "clinc": 200}, 30, 3
LAMBDA_FROM = 200  # of the rows that λ is chosen on, the first
RATIOS = (0.7, 1.0, 1.3, 1.7, 2.2, 2.8)
STUDENT_T = {9: 2.262}  # 97.5 % quantile by degrees of freedom: ten tasks

# Name to arguments of `merge`, the most telling cells first; the first two and the fourth are controls that it does not offer.
CELLS = {
    "base": {},
    "individual": {},
    "task arithmetic": {"rule": "task_arithmetic"},
    "mean of factors": {},
    "TSV-M, rank 16": {"rule": "tsv", "rank": 16},
    "Subspace Boosting, β .5, rank 16": {"rule": "boosting", "beta": 0.5, "rank": 16},
    "RegMean, 48 rows, rank 16": {"rule": "regmean", "n_rows": 48, "rank": 16},
    "task arithmetic, rank 16": {"rule": "task_arithmetic", "rank": 16},
    "RegMean, 48 rows": {"rule": "regmean", "n_rows": 48},
    "Pico, rank 16": {"rule": "pico", "rank": 16},
    "TSV-M": {"rule": "tsv"},
    "Subspace Boosting, β .5": {"rule": "boosting", "beta": 0.5},
    "Pico": {"rule": "pico"},
    "TIES": {"rule": "ties"},
    "Iso-C": {"rule": "iso_c"},
    "Iso-CTS": {"rule": "iso_cts"},
    "WUDI": {"rule": "wudi"},
    "RegMean, 48 rows, rank 8": {"rule": "regmean", "n_rows": 48, "rank": 8},
    "task arithmetic, rank 8": {"rule": "task_arithmetic", "rank": 8},
    "Compress-then-Merge, rank 8": {"rule": "compress", "rank": 8},
    "RegMean, 8 rows": {"rule": "regmean", "n_rows": 8},
    "SVC": {"rule": "svc"},
    "DARE": {"rule": "dare"},
    "KnOTS-TIES": {"rule": "knots"},
    "task arithmetic, λ auto": {"rule": "task_arithmetic", "scale": "auto"},
    "Pico, λ auto": {"rule": "pico", "scale": "auto"},
    "TSV-M, λ auto": {"rule": "tsv", "scale": "auto"},
    "Compress-then-Merge, rank 16": {"rule": "compress", "rank": 16},
    "DARE-TIES": {"rule": "dare_ties"},
    "Subspace Boosting, β .01": {"rule": "boosting"},
}


@dataclass
class Task:
    """One task with its adapter's head and its rows, tokenized in batches of nearly equal length."""

    name: str
    head: tuple[torch.Tensor, torch.Tensor]
    test: list
    held_out: list
    train_texts: list


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the tasks")
    parser.add_argument("--zoo", choices=("shipped", "clinc"), default="shipped")
    parser.add_argument("--work", type=Path, default=Path("merging-work"))
    parser.add_argument("--part", default="0/1", help="i/n: every n-th cell from the i-th, for several processes")
    parser.add_argument("--cells", nargs="*", help="these alone")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    if arguments.report:
        report(arguments.work)
        return
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    load = shipped_tasks if arguments.zoo == "shipped" else clinc_tasks
    folder, tasks = load(arguments.data, arguments.work, tokenizer)
    cells, model = arguments.work / "cells" / arguments.zoo, AutoModel.from_pretrained(base_model()).eval()
    cells.mkdir(parents=True, exist_ok=True)
    index, n_parts = map(int, arguments.part.split("/"))
    for name, settings in list(CELLS.items())[index::n_parts]:
        if arguments.cells and name not in arguments.cells:
            continue
        path = cells / f"{name}.json"
        if not path.exists():
            cell = {
                "cell": name,
                "zoo": arguments.zoo,
                **run_cell(name, dict(settings), folder, tasks, model, tokenizer),
            }
            path.write_text(json.dumps(cell, indent=1) + "\n")
            print(f"{arguments.zoo} {name}: {cell['accuracy']:.4f} (λ ratios {cell['ratios']})", flush=True)


def run_cell(name, settings, folder, tasks, model, tokenizer):
    """Accuracy by task and what it took."""
    if name == "base":
        return {
            "accuracies": (found := accuracies(tasks, model, "test")),
            "accuracy": mean(found.values()),
            "ratios": [],
        }
    if name == "individual":
        found = {}
        for task in tasks:
            with merged_into(model, merge(folder, names=[task.name], progress=False)):
                found |= accuracies([task], model, "test")
        return {"accuracies": found, "accuracy": mean(found.values()), "ratios": []}
    start = time.perf_counter()
    if name == "mean of factors":
        merged, sources = mean_of_factors(folder), merge(folder, progress=False).report.sources
    else:
        n_rows = settings.pop("n_rows", None)
        statistics = None if n_rows is None else statistics_of(folder, tasks, model, tokenizer, n_rows)
        merged = merge(folder, statistics=statistics, progress=False, **({"scale": 1.0} | settings))
        sources = merged.report.sources
    seconds = time.perf_counter() - start
    if settings.get("scale") == "auto":
        with merged_into(model, merged):
            found = accuracies(tasks, model, "test")
        return {"accuracies": found, "accuracy": mean(found.values()), "ratios": ["auto"], "seconds": seconds}
    unit = mean(source.norm for source in sources) / norm_of(merged)
    grid = {}
    for ratio in RATIOS:
        with merged_into(model, merged.scaled(ratio * unit)):
            grid[ratio] = {task.name: right(task, model, task.held_out) for task in tasks}
    chosen = [
        max(RATIOS, key=lambda r, s=seed: mean(mean(grid[r][task.name][s::SEEDS]) for task in tasks))
        for seed in range(SEEDS)
    ]
    by_ratio = {}
    for ratio in sorted(set(chosen)):
        with merged_into(model, merged.scaled(ratio * unit)):
            by_ratio[ratio] = accuracies(tasks, model, "test")
    found = {task.name: mean(by_ratio[ratio][task.name] for ratio in chosen) for task in tasks}
    return {
        "accuracies": found,
        "accuracy": mean(found.values()),
        "by_seed": [mean(by_ratio[ratio].values()) for ratio in chosen],
        "ratios": chosen,
        "n_lambda_rows": N_LAMBDA,
        "scales": [ratio * unit for ratio in chosen],
        "held_out": {str(ratio): mean(map(mean, rows.values())) for ratio, rows in grid.items()},
        "seconds": seconds,
    }


def mean_of_factors(folder):
    """What averaging the factors gives, `(Σ B / T)(Σ A / T)` times the scaling: no function of the updates. A control."""
    collection = AdapterCollection.from_pretrained(folder)
    some = merge(folder, names=[collection.names[0]], progress=False)
    factors = {}
    for module in collection.modules:
        read = collection.factors(module)
        factors[module] = sum(each.lora_B for each in read) / len(read), sum(each.lora_A for each in read) / len(read)
    return MergedAdapter(factors=factors, report=some.report)


def norm_of(merged):
    return math.sqrt(sum(float((B.double() @ A.double()).norm()) ** 2 for B, A in merged.factors.values()))


def statistics_of(folder, tasks, model, tokenizer, n_rows):
    rows = {
        task.name: [dict(tokenizer(*texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))]
        for task in tasks
        if (texts := [list(column) for column in zip(*task.train_texts[:n_rows], strict=True)])
    }
    return collect_statistics(model, batches=rows, adapters=folder, progress=False)


def accuracies(tasks, model, rows):
    return {task.name: mean(right(task, model, getattr(task, rows))) for task in tasks}


@torch.no_grad()
def right(task, model, batches):
    """Whether each row is classified rightly, in the rows' own order."""
    found = {}
    for places, batch, labels in batches:
        pooled = model(**batch).pooler_output
        logits = pooled @ task.head[0].mT + task.head[1]
        found |= dict(zip(places, (logits.argmax(dim=1) == labels).float().tolist(), strict=True))
    return [found[place] for place in range(len(found))]


def batched(rows, tokenizer, max_length=64, size=50):
    """(places, inputs, labels), rows of nearly equal length together."""
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i][0])))
    batches = []
    for start in range(0, len(order), size):
        places = order[start : start + size]
        texts = [list(column) for column in zip(*(rows[i][0] for i in places), strict=True)]
        batch = tokenizer(*texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batches.append((places, dict(batch), torch.tensor([rows[i][1] for i in places])))
    return batches


def make_task(name, heads, test, chosen, train_texts, tokenizer):
    head = {key.rpartition(".")[2]: tensor.float() for key, tensor in heads[name].items()}
    return Task(name, (head["weight"], head["bias"]), batched(test, tokenizer), batched(chosen, tokenizer), train_texts)


def apart(rows, n_test):
    """Rows for the figures, and others to choose λ on."""
    last = LAMBDA_FROM + SEEDS * N_LAMBDA
    assert len(rows) >= last, f"{len(rows)} held-out rows"
    return (rows[:LAMBDA_FROM] + rows[last:])[:n_test], rows[LAMBDA_FROM:last]


def shipped_tasks(data, work, tokenizer):
    """The tasks of the adapters that ship; their labels are numbered as recipes/train_zoo.py does."""
    folder = str(shipped_adapters())
    heads, tasks = merge(folder, progress=False).heads, []
    for name in AdapterCollection.from_pretrained(folder).names:
        splits = {}
        for split in ("train", "dev", "test"):
            if not (data / name / f"{split}.jsonl").exists():
                continue
            rows = [json.loads(line) for line in (data / name / f"{split}.jsonl").read_text().split("\n") if line]
            random.Random(0).shuffle(rows)
            splits[split] = rows
        labels = sorted({row["label"] for row in splits["train"]})
        texts = {split: [text_of(row) for row in rows] for split, rows in splits.items()}
        numbered = {split: [labels.index(row["label"]) for row in rows] for split, rows in splits.items()}
        held_out = {split: list(zip(texts[split], numbered[split], strict=True)) for split in splits}
        test, chosen = apart(held_out["dev"], N_TEST["shipped"])
        test = held_out.get("test", test)[: N_TEST["shipped"]]
        tasks.append(make_task(name, heads, test, chosen, texts["train"], tokenizer))
    return folder, tasks


def text_of(row):
    return (row["text_a"], row["text_b"]) if "text_a" in row else (row["text"],)


def clinc_tasks(data, work, tokenizer):
    """Ten customers of clinc150, one of each domain."""
    customers = [members(zoo, data)[i] for i in range(5) for zoo in ("clinc_a", "clinc_b")]
    folders = [work / "zoos" / customer.name for customer in customers]
    for customer, folder in zip(customers, folders, strict=True):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            train_member(customer, data=data, folder=folder)
    heads, tasks = merge(folders, progress=False).heads, []
    for customer in customers:
        train, test = rows_of_member(customer, data)
        rows = list(zip([(text,) for text in test.texts], test.labels, strict=True))
        texts = [(text,) for text in random.Random(0).sample(train.texts, 48)]
        tasks.append(make_task(customer.name, heads, *apart(rows, N_TEST["clinc"]), texts, tokenizer))
    return folders, tasks


def report(work):
    """benchmarks/results/merging.json and merging.md from the cells."""
    cells = [json.loads(path.read_text()) for path in sorted((work / "cells").rglob("*.json"))]
    lines, results = [], {"command": "python benchmarks/merging.py", "environment": environment(), "zoos": {}}
    for zoo in ("shipped", "clinc"):
        found = {cell["cell"]: cell for cell in cells if cell["zoo"] == zoo}
        if "task arithmetic" not in found:
            continue
        reference, rows = found["task arithmetic"]["accuracies"], []
        for name in CELLS:
            if name in found:
                differences = [value - reference[task] for task, value in found[name]["accuracies"].items()]
                spread = STUDENT_T[len(differences) - 1] * stdev(differences) / math.sqrt(len(differences))
                rows.append({**found[name], "difference": mean(differences), "interval": spread})
        results["zoos"][zoo] = rows
        lines += [
            f"### {zoo}",
            "",
            "| | accuracy | to task arithmetic | by set of λ rows | λ |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            seeds = " ".join(f"{value:.3f}" for value in row.get("by_seed", ()))
            scales = " ".join(f"{value:.2f}" for value in row.get("scales", ())) or " ".join(map(str, row["ratios"]))
            lines.append(
                f"| {row['cell']} | {row['accuracy']:.4f} | {row['difference']:+.3f} ± {row['interval']:.3f} | {seeds} | {scales} |"
            )
        lines.append("")
    (HERE / "results" / "merging.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "results" / "merging.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
