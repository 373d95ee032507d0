"""Does recycling pay on an encoder? Left-out tasks on all-MiniLM-L6-v2, every method beside its controls.

Papers:    EigenLoRAx, arXiv 2502.04700; MoSLoRA, arXiv 2406.11909.
Command:   python benchmarks/study/encoder.py tune --data DIR && python benchmarks/study/encoder.py test --data DIR
           (DIR holds the tasks of recipes/train_zoo.yaml); in slices: --shard 0/2 and --shard 1/2 side by side.
Hardware:  2 CPU cores; about 15 s a cell, two shards: 25 minutes for `tune`, 30 for `test`, for each --n-train.
Writes:    benchmarks/results/study/encoder.jsonl, a line a cell. Started again, it goes on where it stopped.

The zoo is the ten adapters that ship with eigenpeft; the target's own adapter is left out of the subspace. Learning rates are
chosen on two tasks that are never targets, four a method; the head has one learning rate for all methods, chosen with the head
alone. Same rows, steps, batch and head for all methods; seeds draw the training rows, the head and the adapter.
"""

import argparse
import json
import logging
import platform
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import datasets
import numpy as np
import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from methods import METHODS
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
TUNING_SEED, SEEDS = 100, (0, 1, 2)
STEPS, BATCH_SIZE = 100, 16


def train_and_judge(task, method, *, rate: float, head_rate: float, seed: int, sources, scratch: str) -> dict:
    set_seed(seed)
    model = method.adapt(
        AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=task.n_labels), sources, seed
    )
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trainable.items() if "classifier" in name]
    adapter = [p for name, p in trainable.items() if "classifier" not in name]
    groups = [{"params": head, "lr": head_rate}, {"params": adapter, "lr": rate}]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=scratch,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=100,
            warmup_steps=STEPS // 10,
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
    seconds = time.perf_counter() - start
    return {
        "accuracy": judge(model, task),
        "parameters": sum(p.numel() for p in adapter),
        "seconds": round(seconds, 1),
    }


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


def best_rate(rows: list[dict], method: str, n_train: int) -> float:
    """The learning rate of the highest mean accuracy on the tuning tasks."""
    found = defaultdict(list)
    for row in rows:
        if row["stage"] == "tune" and row["method"] == method and row["n_train"] == n_train:
            found[row["rate"]].append(row["accuracy"])
    complete = {rate: fmean(values) for rate, values in found.items() if len(values) == len(TUNING_TASKS)}
    if len(complete) < len(METHODS[method].rates):
        raise SystemExit(f"{method} with n_train={n_train} is not tuned yet: run the stage `tune` first.")
    return max(complete, key=complete.get)


def cells(stage: str, rows: list[dict], n_train: int, methods: list[str]):
    head_first = sorted(methods, key=lambda name: name != "head only")
    if stage == "tune":
        for name in head_first:
            for rate in METHODS[name].rates:
                for target in TUNING_TASKS:
                    yield {"target": target, "method": name, "rate": rate, "seed": TUNING_SEED}
    else:
        for seed in SEEDS:
            for target in TARGETS:
                for name in head_first:
                    yield {"target": target, "method": name, "rate": best_rate(rows, name, n_train), "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["tune", "test"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n-train", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell, from the i-th")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.captureWarnings(True)
    environment = {
        "eigenpeft": eigenpeft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    shard, n_shards = map(int, arguments.shard.split("/"))
    zoo = AdapterCollection.from_pretrained(shipped_adapters())
    rows = read(arguments.results)
    for i, cell in enumerate(cells(arguments.stage, rows, arguments.n_train, arguments.methods)):
        cell |= {"stage": arguments.stage, "n_train": arguments.n_train, "steps": STEPS, "batch_size": BATCH_SIZE}
        if i % n_shards != shard or any(cell.items() <= row.items() for row in rows):
            continue
        task = load_task(cell["target"], n_train=cell["n_train"], seed=cell["seed"], data=arguments.data)
        sources = zoo.without(cell["target"]) if cell["target"] in zoo else zoo
        head_rate = (
            cell["rate"]
            if cell["method"] == "head only"
            else best_rate(read(arguments.results), "head only", cell["n_train"])
        )
        with tempfile.TemporaryDirectory() as scratch:
            result = train_and_judge(
                task,
                METHODS[cell["method"]],
                rate=cell["rate"],
                head_rate=head_rate,
                seed=cell["seed"],
                sources=sources,
                scratch=scratch,
            )
        row = {**cell, "head_rate": head_rate, **result, "environment": environment}
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{cell['target']:14} {cell['method']:32} {cell['rate']:<7g} {row['accuracy']:.3f} {row['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
