"""Does MoSLoRA's mixer pay on a real language model? SmolLM2-135M, two tasks, three seeds, beside LoRA and a folded start.

Paper:    MoSLoRA, arXiv 2406.11909; its settings: r 16, alpha 32, modules q, k, v, up, down, the mixer at the common rate.
Command:  python benchmarks/moslora.py --model MODEL --data DIR   (MODEL and DIR: see benchmarks/smollm2_data.py)
          python benchmarks/moslora.py --report                   (the table of docs/moslora.md on stdout)
Hardware: 1 CPU core with bf16 instructions; 27 minutes of CPU. Started again, it goes on where it stopped.
Writes:   benchmarks/results/moslora.json, a row a training.

Each method has the same four things: rows, steps, batches, and three learning rates, of which the best is chosen on a seed and on
rows that are not used afterwards. Judged by the loss of the held-out answers' tokens (nats), and by how many answers a greedy
decoder would give letter for letter. `folded start` trains a plain LoRA from MoSLoRA's start (A' = M A): what it lacks of MoSLoRA
is the mixer's training alone.
"""

import argparse
import copy
import random
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import smollm2_data
import torch
from peft import LoraConfig, get_peft_model
from timing import environment
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup, set_seed

from eigenpeft import MosLoraConfig

RESULTS = Path(__file__).parent / "results" / "moslora.json"
SHARED = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
METHODS = {
    "LoRA": lambda: LoraConfig(**SHARED),
    "MoSLoRA, kaiming": lambda: MosLoraConfig(init_mixer="kaiming", **SHARED),
    "MoSLoRA, orthogonal": lambda: MosLoraConfig(init_mixer="orthogonal", **SHARED),
    "folded start, kaiming": lambda: MosLoraConfig(init_mixer="kaiming", fold=True, **SHARED),
}
TASKS = {"qasc": lambda data: smollm2_data.t0(data, "qasc"), "gsm8k": smollm2_data.gsm8k}
RATES = (5e-4, 2e-3, 8e-3)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
STEPS, BATCH_SIZE = 24, 4


def encode(rows, tokenizer):
    """(token ids, number of prompt tokens) of each row; answers end with the end token."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        found.append((prompt + answer, len(prompt)))
    return found


def answer_logits(model, rows):
    """Logits at the answers' tokens, those tokens, and the row of each: the head runs on nothing else."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    is_answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (tokens, n_prompt) in enumerate(rows):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
        is_answer[i, n_prompt : len(tokens)] = True
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = causal.lm_head(hidden[:, :-1][is_answer[:, 1:]]).float()
    return logits, ids[is_answer], is_answer.nonzero()[:, 0]


@torch.no_grad()
def judge(model, rows):
    """Mean loss per token, and the share of answers all of whose tokens are the likeliest."""
    model.eval()
    losses, right = [], []
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        logits, targets, row = answer_logits(model, batch)
        losses.append(cross_entropy(logits, targets, reduction="none"))
        wrong = row[logits.argmax(1) != targets]
        right += [int(i not in wrong) for i in range(len(batch))]
    return torch.cat(losses).mean().item(), fmean(right)


def train(base, config, rows, *, rate, seed):
    """The adapted model after STEPS steps, and the loss of each."""
    set_seed(seed)
    model = get_peft_model(copy.deepcopy(base), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    order, losses = [], []
    for _ in range(STEPS):
        if len(order) < BATCH_SIZE:
            order = random.sample(rows, len(rows))
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        logits, targets, _ = answer_logits(model.train(), batch)
        loss = cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    return model, losses


def best_rate(record, task, method):
    tuned = [row for row in record.rows if (row["stage"], row["task"], row["method"]) == ("tune", task, method)]
    if len(tuned) < len(RATES):
        return None
    return min(tuned, key=lambda row: row["loss"])["rate"]


def cells(record):
    """Tuning first, then seed by seed, so that an early end leaves whole comparisons."""
    for task in TASKS:
        for method in METHODS:
            for rate in RATES:
                yield {"stage": "tune", "task": task, "method": method, "rate": rate, "seed": TUNING_SEED}
    for seed in SEEDS:
        for task in TASKS:
            for method in METHODS:
                rate = best_rate(record, task, method)
                yield {"stage": "test", "task": task, "method": method, "rate": rate, "seed": seed}


def run(arguments):
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tasks = {
        name: {split: encode(rows, tokenizer) for split, rows in load(arguments.data).items()}
        for name, load in TASKS.items()
    }
    record = smollm2_data.Record(arguments.results, environment())
    for cell in cells(record):
        if record.find(**cell):
            continue
        start = time.process_time()
        splits = tasks[cell["task"]]
        model, losses = train(base, METHODS[cell["method"]](), splits["train"], rate=cell["rate"], seed=cell["seed"])
        loss, exact = judge(model, splits[cell["stage"]])
        row = {**cell, "loss": round(loss, 4), "exact": round(exact, 4), "steps": STEPS, "batch_size": BATCH_SIZE}
        row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        record.add({**row, "cpu_seconds": round(time.process_time() - start, 1), "training_losses": losses})
        print(*(f"{value}" for value in row.values()), f"{record.rows[-1]['cpu_seconds']} s", flush=True)
    for name, splits in tasks.items():
        if not record.find(method="base model", task=name):
            with torch.no_grad():
                loss, exact = judge(get_peft_model(copy.deepcopy(base), METHODS["LoRA"]()), splits["test"])
            row = {"stage": "test", "task": name, "method": "base model", "rate": None, "seed": None}
            record.add({**row, "loss": round(loss, 4), "exact": round(exact, 4), "parameters": 0})


def report(record):
    """The table of the documentation, and the paired differences from LoRA."""
    found = defaultdict(dict)
    for row in record.rows:
        if row["stage"] == "test":
            found[row["task"], row["method"]][row["seed"]] = row
    for task in TASKS:
        lora = found[task, "LoRA"]
        for method in ["base model", *METHODS]:
            rows = found[task, method]
            losses, exact = ([row[name] for row in rows.values()] for name in ("loss", "exact"))
            if method == "base model":
                print(f"| {task} | {method} | | | {losses[0]:.3f} | | {exact[0]:.3f} |")
                continue
            differences = [rows[seed]["loss"] - lora[seed]["loss"] for seed in rows]
            spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
            against = " ".join(f"{difference:+.3f}" for difference in differences) if method != "LoRA" else ""
            row = next(iter(rows.values()))
            print(
                f"| {task} | {method} | {row['parameters']:,} | {row['rate']:g} | {fmean(losses):.3f}{spread} | {against} "
                f"| {fmean(exact):.3f} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--report", action="store_true", help="print the table and do nothing else")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.report:
        run(arguments)
    report(smollm2_data.Record(arguments.results, environment()))


if __name__ == "__main__":
    main()
