"""Four adapters of a language model as one: held-out loss per task, beside each adapter and the base model.

Command:  python benchmarks/merging_smollm2.py --model MODEL --data DIR --work DIR
          python benchmarks/merging_smollm2.py --work DIR --report
          (MODEL and DIR: see benchmarks/smollm2_data.py)
Hardware: CPU, one thread, float32; about 10 minutes on an idle core. Started again, it goes on where it stopped.
Writes:   one file per cell in WORK/cells, and benchmarks/results/merging_smollm2.json with --report.

SmolLM2-135M-Instruct; four tasks of T0, one LoRA per task (q and v, rank 16, alpha 32, 16 steps of 4 rows, AdamW with a peak rate
of 2e-3). The loss is that of the answers' tokens alone, mean over 24 held-out rows of the task. λ is chosen on 12 other rows per
task at fixed ratios of the merged update's norm to the adapters' mean norm, the same for every rule; "auto" is λ without rows.
Merged adapters have rank 16, that of each source. RegMean reads 32 training rows per task, without answers.
Every adapter is judged on every task: how much one task's adapter costs the others is what a merge has to undo. One seed.
"""

import argparse
import json
import math
import time
from pathlib import Path
from statistics import mean

import smollm2_data
import torch
from peft import LoraConfig, get_peft_model
from timing import environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenpeft.combining import collect_statistics, merge
from eigenpeft.combining.scoring import merged_into

RESULTS = Path(__file__).parent / "results" / "merging_smollm2.json"
TASKS = ("commonsense_qa", "sciq", "quarel", "glue_qqp")
N_TEST, N_LAMBDA, N_STATISTICS, STEPS, BATCH, RATE, RANK = 24, 12, 32, 16, 4, 2e-3, 16
RATIOS = (0.7, 1.0, 1.4)
CELLS = {
    "base": {},
    **{f"adapter {task}": {"names": [task], "scale": 1.0} for task in TASKS},
    "task arithmetic": {"rule": "task_arithmetic"},
    "TSV-M": {"rule": "tsv"},
    "RegMean, 32 rows": {"rule": "regmean"},
    "task arithmetic, λ auto": {"rule": "task_arithmetic", "scale": "auto"},
}


def batches(rows, tokenizer, *, size=8, answers=True):
    """Padded batches with labels on the answers' tokens alone, rows of nearly equal length together."""
    made = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        answer = tokenizer(row["completion"]).input_ids + [tokenizer.eos_token_id]
        made.append((prompt, answer if answers else []))
    made.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    found = []
    for start in range(0, len(made), size):
        part = made[start : start + size]
        longest = max(len(prompt) + len(answer) for prompt, answer in part)
        batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for prompt, answer in part:
            gap = longest - len(prompt) - len(answer)
            batch["input_ids"].append(prompt + answer + [tokenizer.pad_token_id] * gap)
            batch["attention_mask"].append([1] * (longest - gap) + [0] * gap)
            batch["labels"].append([-100] * len(prompt) + answer + [-100] * gap)
        found.append({name: torch.tensor(values) for name, values in batch.items()})
    return found


def train(task, rows, folder, arguments, tokenizer):
    """One task's adapter."""
    torch.manual_seed(TASKS.index(task))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        (batch,) = batches(rows[step * BATCH : (step + 1) * BATCH], tokenizer, size=BATCH)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"{task} step {step + 1}: {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(folder)


@torch.no_grad()
def loss(model, rows):
    """Mean over the answers' tokens of all rows."""
    total = tokens = 0.0
    for batch in rows:
        n = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + n * float(model(**batch).loss), tokens + n
    return total / tokens


def run_cell(settings, folders, rows, model, arguments):
    """Loss by task and the multiplier that was chosen."""

    def losses(split):
        return {task: loss(model, rows[task][split]) for task in TASKS}

    if not settings:
        return {"losses": losses("test")}
    settings = {"rank": RANK, "scale": 1.0, **settings}
    if settings.get("rule") == "regmean":
        read = {task: [{k: v for k, v in b.items() if k != "labels"} for b in rows[task]["train"]] for task in TASKS}
        settings["statistics"] = collect_statistics(model, batches=read, adapters=folders, progress=False)
    start = time.process_time()
    merged = merge(folders, progress=False, **settings)
    seconds = time.process_time() - start
    found = {"kept_share": merged.report.kept_share, "merge_cpu_seconds": round(seconds, 2)}
    if "names" not in settings and settings["scale"] != "auto":
        norm = math.sqrt(sum(float((B.double() @ A.double()).norm()) ** 2 for B, A in merged.factors.values()))
        unit, grid = mean(source.norm for source in merged.report.sources) / norm, {}
        for ratio in RATIOS:
            with merged_into(model, merged.scaled(ratio * unit)):
                grid[ratio] = mean(losses("tune").values())
        best = min(grid, key=grid.get)
        found |= {"grid": {str(ratio): value for ratio, value in grid.items()}, "ratio": best, "scale": best * unit}
        merged = merged.scaled(best * unit)
    with merged_into(model, merged):
        return {"losses": losses("test"), **found}


def report(work):
    rows = []
    for name in CELLS:
        path = work / "cells" / f"{name}.json"
        if path.exists():
            rows.append({"cell": name, **json.loads(path.read_text())})
    print("| | " + " | ".join(TASKS) + " | mean | λ |\n|---|" + "---|" * (len(TASKS) + 2))
    for row in rows:
        values = " | ".join(f"{row['losses'][task]:.3f}" for task in TASKS)
        scale = f"{row['scale']:.2f}" if "scale" in row else ""
        print(f"| {row['cell']} | {values} | {mean(row['losses'].values()):.3f} | {scale} |")
    record = {"command": "python benchmarks/merging_smollm2.py", "environment": environment(), "cells": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    smollm2_data.quiet()
    if arguments.report:
        report(arguments.work)
        return
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows, folders = {}, []
    for task in TASKS:
        split = smollm2_data.t0(arguments.data, task)
        folders.append(arguments.work / "adapters" / task)
        if not folders[-1].exists():
            train(task, split["train"], folders[-1], arguments, tokenizer)
        rows[task] = {
            "test": batches(split["test"][:N_TEST], tokenizer),
            "tune": batches(split["tune"][:N_LAMBDA], tokenizer),
            "train": batches(split["train"][:N_STATISTICS], tokenizer, answers=False),
        }
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    (arguments.work / "cells").mkdir(exist_ok=True)
    for name, settings in CELLS.items():
        path = arguments.work / "cells" / f"{name}.json"
        if not path.exists():
            cell = run_cell(dict(settings), folders, rows, model, arguments)
            path.write_text(json.dumps(cell, indent=1) + "\n")
            print(f"{name}: {cell['losses']}", flush=True)


if __name__ == "__main__":
    main()
