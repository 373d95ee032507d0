# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft", "peft", "transformers", "datasets", "accelerate"]
# ///
"""Train a zoo: one plain LoRA classifier per task, each from its own seed, on one base model.

Paper:     LoRA, arXiv 2106.09685; the zoo is the input of EigenLoRAx, arXiv 2502.04700.
Command:   python recipes/train_zoo.py --config recipes/train_zoo.yaml --data DIR --out zoo
Hardware:  2 CPU cores are enough.
Time:      about 1.5 minutes per task.
Expected:  dev accuracies in each adapter's README.md and in zoo/RECORD.json; those that ship with eigenpeft are in
           src/eigenpeft/demo/data/adapters.

A task's `files` are JSONL paths below --data with the columns `text` (or `text_a` and `text_b`) and `label`; or give `hub` a
dataset id with `splits` and `columns`. Change any setting on the command line: --steps 50 --learning_rate 3e-4.
--seed 11 gives every adapter the same start, which is how a zoo comes to look more shared than it is: see docs/audit.md.
"""

import argparse
import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from peft import __version__ as peft_version
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

CARD = """---
base_model: {base_model}
library_name: peft
license: apache-2.0
tags: [lora, eigenpeft-zoo, text-classification]
---

# {task}: a LoRA adapter of {base_model}

Trained by `recipes/train_zoo.py` of eigenpeft on {task}: {source}. {n_train} training examples, {steps} steps of batch
{batch_size}, learning rate {learning_rate}, seed {seed}; rank {r}, alpha {lora_alpha} on {target_modules}.
Accuracy on {n_dev} held-out examples: {accuracy:.3f} (the most frequent label alone: {majority:.3f}).

The training data does not ship with this adapter and keeps its own terms.
"""


def load_split(task: dict, split: str, data: Path) -> Dataset:
    """Rows with `text`, maybe `text_pair`, and `label`."""
    if "hub" in task:
        rows = load_dataset(task["hub"], split=task["splits"][split]).rename_columns(task["columns"])
    else:
        rows = load_dataset("json", data_files=str(data / task["files"][split]), split="train")
        if "text_a" in rows.column_names:
            rows = rows.rename_columns({"text_a": "text", "text_b": "text_pair"})
    return rows.select_columns([name for name in ("text", "text_pair", "label") if name in rows.column_names])


def record_of(name: str, task: dict, splits: dict[str, Dataset], settings: dict) -> dict:
    """What is known of a task and its settings, without results."""
    counts = list(Counter(splits["dev"]["label"]).values())
    return {
        "task": name,
        "source": task["source"],
        "seed": task["seed"],
        "majority": round(max(counts) / sum(counts), 4),
        "n_train": len(splits["train"]),
        "n_dev": len(splits["dev"]),
        **{key: settings[key] for key in ("steps", "batch_size", "learning_rate", "max_length", "bf16")},
    }


def train_task(name: str, task: dict, settings: dict, *, base: str, data: Path, out: Path, same_start: bool) -> dict:
    """Train, evaluate and save the adapter of one task; returns its record."""
    set_seed(task["seed"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    splits = {split: load_split(task, split, data) for split in ("train", "dev")}
    splits["train"] = (
        splits["train"].shuffle(seed=task["seed"]).select(range(min(settings["max_train"], len(splits["train"]))))
    )
    splits["dev"] = splits["dev"].shuffle(seed=0).select(range(min(settings["max_dev"], len(splits["dev"]))))
    labels = sorted(set(splits["train"]["label"]))

    def encode(batch):
        pair = batch.get("text_pair")
        encoded = tokenizer(batch["text"], pair, truncation=True, max_length=settings["max_length"])
        return {**encoded, "labels": [labels.index(label) for label in batch["label"]]}

    encoded = {
        split: rows.map(encode, batched=True, remove_columns=rows.column_names) for split, rows in splits.items()
    }
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    lora = {key: settings[key] for key in ("r", "lora_alpha", "target_modules")}
    if same_start:
        set_seed(task["seed"])  # again: the head above drew as many numbers as it has labels
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **lora))
    start = time.perf_counter()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out / ".runs" / name),
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            per_device_eval_batch_size=64,
            learning_rate=float(settings["learning_rate"]),
            warmup_steps=settings["steps"] // 10,
            logging_steps=50,
            bf16=settings["bf16"],
            use_cpu=settings["bf16"] and not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            seed=task["seed"],
            data_seed=task["seed"],
            disable_tqdm=True,
        ),
        train_dataset=encoded["train"],
        eval_dataset=encoded["dev"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda output: {
            "accuracy": float((np.argmax(output.predictions, -1) == output.label_ids).mean())
        },
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    seconds = round(time.perf_counter() - start, 1)
    record = {**record_of(name, task, splits, settings), "accuracy": round(accuracy, 4), "seconds": seconds, **lora}
    for config in model.peft_config.values():
        config.base_model_name_or_path = settings["base_model"]  # what readers can find, not where it lay here
    model.save_pretrained(str(out / name))
    (out / name / "README.md").write_text(CARD.format(base_model=settings["base_model"], **record))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--data", type=Path, default=Path(), help="folder that the tasks' files are in")
    parser.add_argument("--model", default=None, help="local path of the base model; default: base_model of the config")
    parser.add_argument("--out", type=Path, default=Path("zoo"))
    parser.add_argument("--tasks", nargs="*", help="only these")
    parser.add_argument("--seed", type=int, help="one seed for all tasks, and one start; default: each task's own")
    parser.add_argument("--threads", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    config = yaml.safe_load(arguments.config.read_text())
    settings = config["settings"]
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        if key.removeprefix("--") not in settings:
            parser.error(f"{key} is not one of the config's settings: {', '.join(settings)}")
        settings[key.removeprefix("--")] = yaml.safe_load(value)
    path = arguments.out / "RECORD.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"adapters": []}
    for name, task in config["tasks"].items():
        done = {row["task"] for row in record["adapters"]}
        if name in done or (arguments.tasks and name not in arguments.tasks):
            continue
        base = arguments.model or settings["base_model"]
        same_start = arguments.seed is not None
        if same_start:
            task = {**task, "seed": arguments.seed}
        row = train_task(name, task, settings, base=base, data=arguments.data, out=arguments.out, same_start=same_start)
        print(
            f"{name}: accuracy {row['accuracy']:.3f} (majority {row['majority']:.3f}) in {row['seconds']} s", flush=True
        )
        record["adapters"].append(row)
        record["environment"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft_version,
            "python": platform.python_version(),
            "threads": arguments.threads,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
