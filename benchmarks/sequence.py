"""Tasks in sequence on one trunk with a head per task: average accuracy at the end, and what was forgotten on the way.

Command:  python benchmarks/sequence.py --data DIR --out rows.jsonl      (DIR/TASK/train.jsonl and test.jsonl or dev.jsonl)
          python benchmarks/sequence.py --report rows.jsonl              (writes benchmarks/results/sequence.json)
Hardware: CPU, one thread; 3 to 15 minutes a method.

all-MiniLM-L6-v2, LoRA r = 8 on query and value. After each task all tasks so far are tested, each with its own head. "Forgetting"
is the mean over the earlier tasks of the accuracy right after training minus that at the end.

Methods: `sequential` trains one LoRA on and on; `merged` adds a fresh LoRA per task to the base weights; `penalty` (O-LoRA),
`projection` and `inflora` do that too, kept off the earlier tasks; `absorb` puts each task's LoRA into a store whose bases grow, so
that the task must be known when it is used. Control: `head` trains the heads alone.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from peft import LoraConfig, get_peft_model
from timing import environment
from torch import nn
from transformers import AutoModel, AutoTokenizer

from eigenpeft import AdapterCollection, AdapterStore, build_subspace
from eigenpeft.demo.assets import base_model
from eigenpeft.tuners.sequence import OrthogonalSubspaceCallback, SubspaceHistory, collect_inputs, start_outside

RESULTS = Path(__file__).parent / "results"
TASKS = ("sst2", "trec6", "subj", "mpqa", "cr", "mr", "tweet_emotion", "tweet_irony", "mrpc", "sick_entail")
METHODS = ("head", "sequential", "merged", "penalty", "projection", "inflora", "absorb")
R, BATCH, MAX_LENGTH, RATE, HEAD_RATE, HISTORY = 8, 16, 32, 3e-3, 1e-2, 128


class Task:
    """Rows of one task and its batches."""

    def __init__(self, folder, tokenizer, *, n_train, n_test):
        self.tokenizer = tokenizer
        test = folder / ("test.jsonl" if (folder / "test.jsonl").exists() else "dev.jsonl")
        self.train, self.test = (self._rows(path, n) for path, n in ((folder / "train.jsonl", n_train), (test, n_test)))
        self.n_labels = 1 + max(row["label"] for row in self.train + self.test)

    @staticmethod
    def _rows(path, n):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(rows)
        return rows[:n]

    def batch(self, rows):
        """Model inputs and labels."""
        texts = [row["text"] if "text" in row else (row["text_a"], row["text_b"]) for row in rows]
        words = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        return words, torch.tensor([row["label"] for row in rows])


def embed(trunk, words):
    """Mean over the tokens of the last layer."""
    hidden = trunk(**words).last_hidden_state
    mask = words["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def accuracy(trunk, head, task):
    """On the test rows."""
    trunk.eval()
    hits = 0
    for start in range(0, len(task.test), 100):
        words, labels = task.batch(task.test[start : start + 100])
        hits += int((head(embed(trunk, words)).argmax(-1) == labels).sum())
    return hits / len(task.test)


def train(trunk, head, task, *, steps, seed, callback=None):
    """AdamW on head and adapter; the callback is called where transformers' Trainer calls it."""
    rest = [p for p in trunk.parameters() if p.requires_grad]
    groups = [{"params": list(head.parameters()), "lr": HEAD_RATE}, {"params": rest, "lr": RATE}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    draw = random.Random(seed)
    trunk.train()
    if callback is not None:
        callback.on_train_begin(None, None, None, model=trunk)
    for _ in range(steps):
        words, labels = task.batch(draw.sample(task.train, BATCH))
        nn.functional.cross_entropy(head(embed(trunk, words)), labels).backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        if callback is not None:
            callback.on_pre_optimizer_step(None, None, None, model=trunk)
        optimizer.step()
        if callback is not None:
            callback.on_optimizer_step(None, None, None, model=trunk)
        optimizer.zero_grad()


def fresh(trunk, seed):
    """A LoRA on the trunk, started by the seed."""
    torch.manual_seed(seed)
    return get_peft_model(trunk, LoraConfig(r=R, lora_alpha=2 * R, target_modules=["query", "value"]))


def run(method, tasks, *, steps, seed):
    """Accuracies after each task of all tasks so far."""
    trunk = AutoModel.from_pretrained(base_model()).requires_grad_(False)
    history, heads, table, store = SubspaceHistory(size=HISTORY), [], [], None
    model = fresh(trunk, seed) if method == "sequential" else trunk
    scratch = Path(tempfile.mkdtemp())
    for number, task in enumerate(tasks.values()):
        torch.manual_seed(100 * seed + number)
        heads.append(nn.Linear(384, task.n_labels))
        callback, inputs = None, None
        if method not in ("head", "sequential"):
            model = fresh(trunk, 1000 * seed + number)
        if method in ("penalty", "projection"):
            mode = "project" if method == "projection" else "penalty"
            callback = OrthogonalSubspaceCallback(history, mode=mode)
        if method == "inflora":
            batches = [dict(task.batch(task.train[start : start + 32])[0]) for start in range(0, 128, 32)]
            inputs = collect_inputs(model, batches, n_rows=1024)
            start_outside(model, inputs, history)
        train(model, heads[-1], task, steps=steps, seed=seed * 100 + number, callback=callback)
        if method in ("penalty", "projection"):
            history.add(model)
        if inputs is not None:
            history.add_inputs(inputs, share=0.6)
        if method == "absorb":
            name = f"task-{number}"
            model.save_pretrained(scratch / name)
            trunk = model.unload()
            with AdapterCollection.from_pretrained(str(scratch / name)) as collection:
                if store is None:
                    store = AdapterStore.from_collection(build_subspace(collection, n_components=R), collection)
                else:
                    store.absorb(collection, share=1.0)
            table.append(
                [
                    accuracy_of(store, f"task-{i}", trunk, heads[i], each)
                    for i, each in enumerate(list(tasks.values())[: number + 1])
                ]
            )
            continue
        if method not in ("head", "sequential"):
            trunk = model = model.merge_and_unload()
            trunk.requires_grad_(False)
        table.append([accuracy(model, heads[i], each) for i, each in enumerate(list(tasks.values())[: number + 1])])
    return table


def accuracy_of(store, name, trunk, head, task):
    """With a member's factors added to the weights, which are put back afterwards."""
    kept = {}
    for module in store[name]:
        weight = trunk.get_submodule(module).weight
        kept[module] = weight.detach().clone()
        lora_B, lora_A = store.factors(name, module)
        weight.data += lora_B @ lora_A
    found = accuracy(trunk, head, task)
    for module, weight in kept.items():
        trunk.get_submodule(module).weight.data.copy_(weight)
    return found


def report(path):
    """Means over seeds."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    table = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row["accuracy"] for row in rows if row["method"] == method]
        lost = [statistics.fmean(each[i][i] - each[-1][i] for i in range(len(each) - 1)) for each in own]
        ends = [statistics.fmean(each[-1]) for each in own]
        learned = [statistics.fmean(each[i][i] for i in range(len(each))) for each in own]
        table[method] = {
            "seeds": len(own),
            "average_accuracy": statistics.fmean(ends),
            "accuracy_right_after_training": statistics.fmean(learned),
            "forgetting": statistics.fmean(lost),
        }
    result = {"environment": environment(), "tasks": rows[0]["tasks"], "steps": rows[0]["steps"], "methods": table}
    RESULTS.joinpath("sequence.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sequence.jsonl"))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.report)
        return
    disable_progress_bars()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    tasks = {
        name: Task(arguments.data / name, tokenizer, n_train=2000, n_test=arguments.test_rows)
        for name in arguments.tasks
    }
    done = set()
    if arguments.out.exists():
        done = {(row["method"], row["seed"]) for row in map(json.loads, arguments.out.read_text().splitlines())}
    for seed in arguments.seeds:
        for method in arguments.methods:
            if (method, seed) in done:
                continue
            start = time.time()
            row = {"method": method, "seed": seed, "steps": arguments.steps, "tasks": list(tasks)}
            row |= {
                "accuracy": run(method, tasks, steps=arguments.steps, seed=seed),
                "seconds": round(time.time() - start),
            }
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(method, seed, [round(value, 3) for value in row["accuracy"][-1]], row["seconds"], flush=True)


if __name__ == "__main__":
    main()
