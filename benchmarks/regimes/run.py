"""When does recycling pay? Related and unrelated zoos of customers on all-MiniLM-L6-v2, every method beside its controls.

Papers:    EigenLoRAx, arXiv 2502.04700; LoRA, arXiv 2106.09685.
Command:   python benchmarks/regimes/run.py --data DIR --work DIR   (DIR of data holds banking77/ and clinc150/, JSONL)
Hardware:  CPU, one thread; 2 to 9 s of CPU time per cell of 40 steps, 7 to 11 s per adapter of a zoo.
Writes:    WORK/zoos, WORK/cells.jsonl (a line per cell), WORK/scales.jsonl (λ). Started again, it goes on where it stopped.

What is run, in order of value: plan.py. Rates are chosen on two customers that are never targets. Same rows, steps, batches and
head for all methods of a (target, seed).
"""

import argparse
import json
import logging
import platform
import time
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

import customers
import datasets
import torch
import training
import transformers
import zoos
from huggingface_hub.utils import disable_progress_bars
from methods import HEAD_RATE_BESIDE_ADAPTER, METHODS, Situation, add_mean, names_of, with_weights
from plan import PLAN, STEPS, TUNING_ROWS, TUNING_SEEDS, Slice
from torch import Tensor, nn

import eigenpeft

try:
    import nevergrad  # for the control "LoraHub" alone: pip install nevergrad
except ImportError:
    nevergrad = None

RESULTS = Path(__file__).parents[1] / "results" / "regimes"
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
N_FOLDS = 4
LORAHUB_EVALUATIONS, LORAHUB_PENALTY, LORAHUB_BOUND = 40, 0.05, 1.5


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@lru_cache(maxsize=1)
def environment() -> dict:
    return {
        "eigenpeft": eigenpeft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }


class Study:
    """The cells of a work folder: which exist, which rate a method takes, and how a missing one is run.

    Attributes:
        first_layer: The first layer with adapters; what lies below is computed once per task.
        modules: Those with adapters, as PEFT's `target_modules` names them.
        batch_size: Rows of a step.
        published: Folder of published cells, with which a new work folder begins.
    """

    first_layer = 0
    modules: list[str] | str = zoos.MODULES
    batch_size = training.BATCH_SIZE
    published = RESULTS

    def __init__(self, data: Path, work: Path):
        self.data, self.work = data, work
        self.path, self.scales = work / "cells.jsonl", work / "scales.jsonl"
        (work / "zoos").mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.scales, work / "measures.jsonl"):  # go on from what is published
            if not path.exists() and (self.published / path.name).exists():
                path.write_text((self.published / path.name).read_text())
        self.rows = read(self.path)
        self.done = {self.key(row) for row in self.rows}
        self.customers = {c.name: c for c in (*customers.targets(data), *customers.tuning_customers(data))}
        self.task = lru_cache(maxsize=4)(self._task)

    @staticmethod
    def key(cell: dict) -> tuple:
        return tuple(
            cell[name] for name in ("stage", "zoo", "size", "draw", "target", "rows", "seed", "method", "rate")
        )

    def _task(self, target: str, rows: int, seed: int) -> training.Task:
        return training.tokenized(
            *customers.rows_of_target(self.customers[target], n_rows=rows, seed=seed, data=self.data)
        )

    def rate(self, name: str) -> float:
        """The rate of the highest mean accuracy on the tuning customers; of equal ones the lowest."""
        method = METHODS[METHODS[name].tuned_as or name]
        found = {
            rate: [
                row["accuracy"]
                for row in self.rows
                if row["stage"] == "tune" and row["method"] == method.name and row["rate"] == rate
            ]
            for rate in method.rates
        }
        return max(sorted(found), key=lambda rate: fmean(found[rate] or [0.0]))

    def cells(self, part: Slice) -> list[dict]:
        """The cells of a slice; methods that use no adapters appear once for all zoos."""
        found = []
        for seed in part.seeds if part.stage == "test" else TUNING_SEEDS:
            for name in part.targets(self.customers):
                zoo = part.zoo_of(self.customers[name])
                for method in part.methods:
                    uses = METHODS[method].uses_zoo
                    rates = METHODS[method].rates if part.stage == "tune" else (self.rate(method),)
                    for rate in rates:
                        found.append(
                            {
                                "stage": part.stage,
                                "zoo": zoo if uses else None,
                                "size": (10 if zoo == "shipped" else part.size) if uses else 0,
                                "draw": (seed if part.draws else 0) if uses else 0,
                                "target": name,
                                "rows": part.rows if part.stage == "test" else TUNING_ROWS,
                                "seed": seed,
                                "method": method,
                                "rate": rate,
                            }
                        )
        return found

    def features(self, task: training.Task, situation: Situation | None, scale: float) -> Tensor:
        base = training.fresh_base(task.n_labels, seed=0)
        if scale and situation is not None:
            add_mean(base, situation, scale)
        return self.pooled(base, task)

    def pooled(self, base: nn.Module, task: training.Task) -> Tensor:
        """What the head of a model reads of the training rows."""
        return training.prefix(base.bert, task.ids, layer=len(base.bert.encoder.layer), start=task.below).hidden

    def held_out(self, task: training.Task, features: Tensor, *, seed: int) -> tuple[float, float]:
        """Accuracy and loss of a head alone, trained on three quarters of the rows and judged on the fourth."""
        fold = torch.arange(len(features)) // task.n_labels % N_FOLDS
        right, loss = 0.0, 0.0
        for k in range(N_FOLDS):
            head = training.train_head(
                features[fold != k],
                task.labels[fold != k],
                task.n_labels,
                rate=self.rate("head"),
                steps=STEPS,
                seed=seed,
            )
            with torch.no_grad():
                logits = head(features[fold == k])
                right += float((logits.argmax(1) == task.labels[fold == k]).sum())
                loss += float(torch.nn.functional.cross_entropy(logits, task.labels[fold == k], reduction="sum"))
        return right / len(features), loss / len(features)

    def scale(self, cell: dict, situation: Situation) -> float:
        """λ of the highest held-out accuracy, of equal ones the lowest loss; remembered with all that was tried."""
        asked = {name: cell[name] for name in ("zoo", "size", "draw", "target", "rows", "seed")}
        for row in read(self.scales):
            if row["kind"] == "scale" and asked.items() <= row.items():
                return row["scale"]
        task = self.task(cell["target"], cell["rows"], cell["seed"])
        tried = {s: self.held_out(task, self.features(task, situation, s), seed=cell["seed"]) for s in SCALES}
        best = max(tried, key=lambda s: (tried[s][0], -tried[s][1]))
        found = {str(s): [round(value, 5) for value in pair] for s, pair in tried.items()}
        append(self.scales, {"kind": "scale", **asked, "scale": best, "tried": found})
        return best

    def nearest(self, cell: dict, situation: Situation) -> str:
        """The adapter behind which a head does best on held-out rows."""
        asked = {name: cell[name] for name in ("zoo", "size", "draw", "target", "rows", "seed")}
        for row in read(self.scales):
            if row["kind"] == "nearest" and asked.items() <= row.items():
                return row["name"]
        task, tried = self.task(cell["target"], cell["rows"], cell["seed"]), {}
        found = zoos.factors(*situation.part)
        for name in [each for each, _, _ in next(iter(found.values()))]:
            base = training.fresh_base(task.n_labels, seed=0)
            with torch.no_grad():
                for module, parts in found.items():
                    for own, b, a in parts:
                        if own == name:
                            base.get_submodule(module).weight.add_(b @ a)
            features = self.pooled(base, task)
            tried[name] = self.held_out(task, features, seed=cell["seed"])
        best = max(tried, key=lambda name: (tried[name][0], -tried[name][1]))
        tried = {name: [round(value, 5) for value in pair] for name, pair in tried.items()}
        append(self.scales, {"kind": "nearest", **asked, "name": best, "tried": tried})
        return best

    def weights(self, cell: dict, situation: Situation) -> list[float]:
        """Weights of all adapters by LoraHub's search: 40 evaluations of loss + .05 mean |w|, within ±1.5, no gradients.

        LoraHub takes the loss of the few rows themselves, of a language model without a new head. A new head fits the rows
        behind any weights, so here the loss is that of heads on held-out rows.
        """
        asked = {name: cell[name] for name in ("zoo", "size", "draw", "target", "rows", "seed")}
        for row in read(self.scales):
            if row["kind"] == "lorahub" and asked.items() <= row.items():
                return row["weights"]
        task, names = self.task(cell["target"], cell["rows"], cell["seed"]), names_of(situation)

        def objective(values) -> float:
            weights = [float(value) for value in values]
            base = with_weights(
                training.fresh_base(task.n_labels, seed=0), situation, dict(zip(names, weights, strict=True))
            )
            features = self.pooled(base, task)
            loss = self.held_out(task, features, seed=cell["seed"])[1]
            return loss + LORAHUB_PENALTY * fmean(map(abs, weights))

        space = nevergrad.p.Array(init=[0.0] * len(names)).set_bounds(-LORAHUB_BOUND, LORAHUB_BOUND)
        space.random_state.seed(cell["seed"])
        search = nevergrad.optimizers.NGOpt(space, budget=LORAHUB_EVALUATIONS)
        best = [round(float(value), 5) for value in search.minimize(objective).value]
        append(self.scales, {"kind": "lorahub", **asked, "weights": best, "nevergrad": nevergrad.__version__})
        return best

    def sizes_of(self, cell: dict) -> tuple[str, int, int]:
        """The zoo whose sizes a random subspace has, where a method uses no adapters."""
        return "shipped", 10, 0

    def run(self, cell: dict) -> dict:
        """Train and judge one cell."""
        zoo = (cell["zoo"], cell["size"], cell["draw"]) if cell["zoo"] else self.sizes_of(cell)
        common = {"work": self.work, "seed": cell["seed"], "modules": self.modules}
        situation = Situation(*zoo, **common, scale=lambda: 0.0, nearest=lambda: "")
        situation = Situation(
            *zoo,
            **common,
            scale=partial(self.scale, cell, situation),
            nearest=partial(self.nearest, cell, situation),
            weights=partial(self.weights, cell, situation),
        )
        task = self.task(cell["target"], cell["rows"], cell["seed"])
        method, start = METHODS[cell["method"]], time.perf_counter()
        torch.manual_seed(cell["seed"])
        model = method.adapt(training.fresh_base(task.n_labels, seed=cell["seed"]), situation).eval()
        adapted = round(time.perf_counter() - start, 1)
        head_rate = cell["rate"] if (method.tuned_as or method.name) == "head" else HEAD_RATE_BESIDE_ADAPTER
        steps = STEPS if cell["rows"] <= 64 else 2 * STEPS
        parameters, seconds = training.train(
            model,
            task,
            rate=cell["rate"],
            head_rate=head_rate,
            steps=steps,
            seed=cell["seed"],
            size=self.batch_size,
        )
        right = training.accuracy(model, task.test_ids, task.test_labels, start=task.test_below)
        found = {"accuracy": round(right, 5), "n_test": len(task.test_ids), "parameters": parameters}
        if method.merged:
            found["scale"] = situation.scale()
        times = {"seconds": round(seconds, 1), "seconds_before": adapted}
        return {**cell, "steps": steps, "head_rate": head_rate, **found, **times, "environment": environment()}

    def fill(self, part: Slice) -> None:
        missing = [cell for cell in self.cells(part) if self.key(cell) not in self.done]
        for zoo, size in part.zoos(self.customers) if missing else ():
            for member in zoos.missing_members(zoo, size, data=self.data, work=self.work):
                record = zoos.train_member(member, data=self.data, folder=self.work / "zoos" / member.name)
                print(
                    f"{time.strftime('%H:%M:%S')} {member.name:14} {record['accuracy']:.3f} {record['seconds']} s",
                    flush=True,
                )
        for cell in missing:
            row = self.run(cell)
            append(self.path, row)
            self.rows.append(row)
            self.done.add(self.key(row))
            where = f"{cell['zoo'] or '':8} {cell['size']:3} {cell['target']:22} {cell['method']:22} {cell['rate']:<6g}"
            took = f"{row['seconds_before']}+{row['seconds']} s"
            print(f"{time.strftime('%H:%M:%S')} {part.name:14} {where} {row['accuracy']:.3f} {took}", flush=True)


def quiet() -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.captureWarnings(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--slices", nargs="*", help="only these of plan.py")
    parser.add_argument("--missing", action="store_true", help="count the cells that are missing, and stop")
    given = parser.parse_args()
    quiet()
    if (worst := training.difference_to_transformers()) > 1e-4:
        raise SystemExit(
            f"The packed model differs from transformers' by {worst:.1e}; its results would not be comparable."
        )
    study = Study(given.data, given.work)
    for part in PLAN:
        if given.slices and part.name not in given.slices:
            continue
        if given.missing:
            cells = study.cells(part)
            left = sum(study.key(cell) not in study.done for cell in cells)
            print(f"{part.name:16} {left:4} of {len(cells)} cells missing")
        else:
            study.fill(part)


if __name__ == "__main__":
    main()
