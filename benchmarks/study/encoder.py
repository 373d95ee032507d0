"""Does recycling pay on an encoder? Left-out tasks on all-MiniLM-L6-v2, every method beside its controls.

Papers:    EigenLoRAx, arXiv 2502.04700; MoSLoRA, arXiv 2406.11909.
Command:   python benchmarks/study/encoder.py tune --data DIR && python benchmarks/study/encoder.py test --data DIR
           (DIR holds the tasks of recipes/train_zoo.yaml); in slices: --methods, --seeds, --n-train, or --shard 0/2 and
           --shard 1/2 side by side. plan.py runs what docs/study.md shows.
Hardware:  CPU, one thread; 10 to 25 s per cell of 100 steps.
Writes:    benchmarks/results/study/encoder.jsonl, one line per cell. Started again, it goes on where it stopped.

The zoo is the ten adapters that ship with eigenpeft; the target's own adapter is left out of the subspace. Learning rates are
chosen on two tasks that are never targets, with 256 rows; the head has one learning rate for all methods, chosen with the head
alone. Same rows, steps, batch and head for all methods; seeds draw the training rows, the head and the adapter.
"""

import argparse
import json
import logging
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

import datasets
import numpy as np
import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from methods import METHODS, Situation
from nearest import scores
from tasks import load_task
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

import eigenpeft
from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.assets import base_model, shipped_adapters

RESULTS = Path(__file__).parents[1] / "results" / "study" / "encoder.jsonl"
TUNING_TASKS = ("mpqa", "tweet_irony")
TARGETS = ("trec6", "sst2", "subj", "cr", "tweet_emotion", "banking77")
# Added when K = 8 had been put first, to ask the same question of tasks that had no part in that choice.
FRESH_TARGETS = ("mr", "mrpc", "sick_entail", "sts_similar")
TUNING_SEED, SEEDS, TUNING_ROWS = 100, (0, 1, 2), 256
STEPS, BATCH_SIZE = 100, 16


def train(task, method, *, rate: float, head_rate: float, situation: Situation, scratch: str, steps: int = STEPS):
    """The trained model, the number of adapter parameters and the seconds of training."""
    seed = situation.seed
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=task.n_labels)
    model = method.adapt(base, situation)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trainable.items() if "classifier" in name]
    adapter = [p for name, p in trainable.items() if "classifier" not in name]
    groups = [{"params": head, "lr": head_rate}, {"params": adapter, "lr": rate}]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=100,
            warmup_steps=steps // 10,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            seed=seed,
            data_seed=seed,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=task.train,
        data_collator=task.collator,
        optimizers=(torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0), None),
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    return model, sum(p.numel() for p in adapter), round(time.perf_counter() - start, 1)


@torch.no_grad()
def judge(model: nn.Module, task) -> float:
    model.eval()
    right = 0
    for start in range(0, len(task.test), 100):
        rows = [task.test[i] for i in range(start, min(start + 100, len(task.test)))]
        batch = task.collator(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right += int((logits.float().numpy().argmax(1) == np.asarray(batch["labels"])).sum())
    return right / len(task.test)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_rate(rows: list[dict], name: str) -> float:
    """The learning rate of the highest mean accuracy on the tuning tasks."""
    method = METHODS[METHODS[name].tuned_as or name]
    if len(method.rates) == 1:
        return method.rates[0]
    found = defaultdict(dict)
    for row in rows:
        if row["stage"] == "tune" and row["method"] == method.name and row["n_train"] == TUNING_ROWS:
            found[row["rate"]][row["target"]] = row["accuracy"]
    complete = {rate: fmean(values.values()) for rate, values in found.items() if len(values) == len(TUNING_TASKS)}
    if len(complete) < len(method.rates):
        raise SystemExit(f"{method.name} is not tuned yet: run the stage `tune` first.")
    return max(complete, key=complete.get)


def nearest_source(task, *, target: str, seed: int, sources, results: Path) -> str:
    """Name of the source of the highest score, remembered as a row of its own."""
    cell = {"stage": "nearest", "target": target, "seed": seed, "n_train": len(task.train)}
    for row in read(results):
        if cell.items() <= row.items():
            return row["source"]
    with torch.random.fork_rng():  # the cell's own numbers must not depend on whether this was remembered
        found = scores(task, sources)
    source = max(found, key=found.get)
    append(results, {**cell, "source": source, "scores": {name: round(value, 4) for name, value in found.items()}})
    return source


def append(results: Path, row: dict) -> None:
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Slice:
    """Part of the study: every one of these methods on every one of these targets with every one of these seeds.

    Attributes:
        stage: "tune" (the tuning tasks, every learning rate of the methods) or "test" (at the rate that was best).
        methods: Names.
        targets: Of the stage test, and so are the others.
        seeds: Of the rows, the head and the adapter.
        n_train: Training rows.
        steps: Optimiser steps.
    """

    stage: str
    methods: Sequence[str] = tuple(METHODS)
    targets: Sequence[str] = TARGETS
    seeds: Sequence[int] = SEEDS
    n_train: int = 256
    steps: int = STEPS

    def cells(self, rows: list[dict]) -> Iterator[dict]:
        """Its cells in order; `rows` tell the rates."""
        head_first = sorted(self.methods, key=lambda name: name != "head only")
        if self.stage == "tune":
            sizes = {"seed": TUNING_SEED, "n_train": TUNING_ROWS, "stage": "tune", "steps": STEPS}
            for name in head_first:
                method = METHODS[name]
                for rate in method.rates if method.tuned_as is None and len(method.rates) > 1 else ():
                    for target in TUNING_TASKS:
                        yield {"target": target, "method": name, "rate": rate, "batch_size": BATCH_SIZE, **sizes}
            return
        sizes = {"n_train": self.n_train, "stage": "test", "steps": self.steps, "batch_size": BATCH_SIZE}
        for seed in self.seeds:
            for target in self.targets:
                for name in head_first:
                    yield {"target": target, "method": name, "rate": best_rate(rows, name), "seed": seed, **sizes}

    def missing(self, results: Path, *, zoo: str | None = None, shard: str = "0/1") -> list[dict]:
        """Its cells, or every n-th from the i-th where `shard` is "i/n", that the results do not hold yet."""
        rows, (number, n_shards) = read(results), map(int, shard.split("/"))
        return [cell for cell in list(self.cells(rows))[number::n_shards] if not held(cell, rows, zoo=zoo)]


def held(cell: dict, rows: list[dict], *, zoo: str | None) -> bool:
    return any(row.get("zoo") == zoo and cell.items() <= row.items() for row in rows)


def quiet() -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.captureWarnings(True)


def environment() -> dict:
    return {
        "eigenpeft": eigenpeft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }


def run(cell: dict, *, task, zoo: AdapterCollection, head_rate: float, results: Path) -> dict:
    """Train and judge one cell."""
    target, seed = cell["target"], cell["seed"]
    sources = zoo.without(target) if target in zoo else zoo
    nearest = partial(nearest_source, task, target=target, seed=seed, sources=sources, results=results)
    with tempfile.TemporaryDirectory() as scratch:
        model, parameters, seconds = train(
            task,
            METHODS[cell["method"]],
            rate=cell["rate"],
            head_rate=head_rate,
            situation=Situation(sources, seed, nearest),
            scratch=scratch,
            steps=cell["steps"],
        )
    return {"accuracy": judge(model, task), "parameters": parameters, "seconds": seconds}


def run_slice(part: Slice, *, data: Path, zoo: Path | None = None, shard: str = "0/1", results: Path = RESULTS) -> None:
    """Train and judge what is missing of a slice, one line per cell."""
    results.parent.mkdir(parents=True, exist_ok=True)
    named = {"zoo": zoo.name} if zoo else {}
    load = lru_cache(maxsize=8)(partial(load_task, data=data))
    with AdapterCollection.from_pretrained(zoo or shipped_adapters()) as adapters:
        for cell in part.missing(results, zoo=named.get("zoo"), shard=shard):
            if held(cell, read(results), zoo=named.get("zoo")):  # by another process since
                continue
            task = load(cell["target"], n_train=cell["n_train"], seed=cell["seed"])
            head_rate = cell["rate"] if cell["method"] == "head only" else best_rate(read(results), "head only")
            result = run(cell, task=task, zoo=adapters, head_rate=head_rate, results=results)
            append(results, {**cell, **named, "head_rate": head_rate, **result, "environment": environment()})
            print(
                f"{cell['target']:14} {cell['method']:32} {cell['rate']:<7g} {result['accuracy']:.3f} {result['seconds']} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["tune", "test"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n-train", type=int, default=256, help="rows of the stage test")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the stage test")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=[*TARGETS, *FRESH_TARGETS])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--zoo", type=Path, help="folder of other adapters of the same tasks, named in the rows")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell, from the i-th")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    quiet()
    part = Slice(given.stage, given.methods, given.targets, given.seeds, given.n_train, given.steps)
    run_slice(part, data=given.data, zoo=given.zoo, shard=given.shard, results=given.results)


if __name__ == "__main__":
    main()
