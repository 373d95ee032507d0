"""Tasks in sequence on one trunk with a head per task: average accuracy at the end, and what was forgotten on the way.

Command:  python benchmarks/sequence.py --data DIR --out rows.jsonl      (DIR/TASK/train.jsonl and test.jsonl or dev.jsonl)
          python benchmarks/sequence.py --report rows.jsonl              (writes benchmarks/results/sequence.json)
Hardware: CPU, one thread; 2 to 5 minutes a method and seed.

all-MiniLM-L6-v2, LoRA r = 8 on query and value. Each task is tested right after it was trained and after the last one, with its own
head. "Forgetting" is the mean over the earlier tasks of the accuracy right after training minus that at the end.

Methods: `sequential` trains one LoRA on and on; `merged` adds a fresh LoRA per task to the base weights; `penalty` (O-LoRA),
`projection` (CoSO's) and `inflora` do that too, kept off the earlier tasks; `opcm` trains each task's LoRA on the base weights and
merges it onto those before; `absorb` puts each task's LoRA into a store whose bases grow, so that the task must be known when it is
used, and also says by how much any logit of an old member changed until the end. Control: `head` trains the heads alone.
"""

import argparse
import contextlib
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

from eigenpeft import AdapterCollection, AdapterStore
from eigenpeft.building import build_subspace
from eigenpeft.demo.assets import base_model
from eigenpeft.linalg.merging.continual import add_off_directions, mean_norm_scale
from eigenpeft.tuners.sequence import OrthogonalSubspaceCallback, SubspaceHistory, collect_inputs, init_lora_from_inputs

RESULTS = Path(__file__).parent / "results"
TASKS = ("sst2", "trec6", "subj", "mpqa", "cr", "mr", "tweet_emotion", "tweet_irony", "mrpc", "sick_entail")
METHODS = ("sequential", "opcm", "absorb", "penalty", "projection", "inflora", "merged", "head")
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
        with path.open(encoding="utf-8") as file:  # not splitlines, which also breaks at separators inside of texts
            rows = [json.loads(line) for line in file]
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
def logits_of(trunk, head, task):
    """Of the test rows."""
    trunk.eval()
    batches = [task.batch(task.test[start : start + 100])[0] for start in range(0, len(task.test), 100)]
    return torch.cat([head(embed(trunk, words)) for words in batches])


def share_right(logits, task):
    """Accuracy of the test rows' logits."""
    return float((logits.argmax(-1) == task.batch(task.test)[1]).float().mean())


def accuracy(trunk, head, task):
    """On the test rows."""
    return share_right(logits_of(trunk, head, task), task)


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


def fresh_head(task, seed):
    """A classifier of the embeddings, started by the seed."""
    torch.manual_seed(seed)
    return nn.Linear(384, task.n_labels)


def fresh(trunk, seed):
    """A LoRA on the trunk, started by the seed."""
    torch.manual_seed(seed)
    return get_peft_model(trunk, LoraConfig(r=R, lora_alpha=2 * R, target_modules=["query", "value"]))


def run(method, tasks, *, steps, seed):
    """One row per task: accuracies by task; with `absorb` also the largest change of an old member's logits."""
    if method in ("opcm", "absorb"):
        return run_apart(method, tasks, steps=steps, seed=seed)
    trunk = AutoModel.from_pretrained(base_model()).requires_grad_(False)
    history, heads, table = SubspaceHistory(max_rows=HISTORY), [], []
    model = fresh(trunk, seed) if method == "sequential" else trunk
    for number, task in enumerate(tasks.values()):
        heads.append(fresh_head(task, 100 * seed + number))
        callback, inputs = None, None
        if method not in ("head", "sequential"):
            model = fresh(trunk, 1000 * seed + number)
        if method in ("penalty", "projection"):
            mode = "project" if method == "projection" else "penalty"
            callback = OrthogonalSubspaceCallback(history, mode=mode)
        if method == "inflora":
            batches = [dict(task.batch(task.train[start : start + 32])[0]) for start in range(0, 128, 32)]
            inputs = collect_inputs(model, batches=batches, n_rows=1024)
            init_lora_from_inputs(model, inputs=inputs, history=history)
        train(model, heads[-1], task, steps=steps, seed=seed * 100 + number, callback=callback)
        if method in ("penalty", "projection"):
            history.add(model)
        if inputs is not None:
            history.add_inputs(inputs, held_share=0.6)
        if method not in ("head", "sequential"):
            trunk = model = model.merge_and_unload()
            trunk.requires_grad_(False)
        table.append(
            {name: accuracy(model, heads[list(tasks).index(name)], tasks[name]) for name in due(tasks, number)}
        )
    return {"accuracy": table}


def due(tasks, number):
    """Names of the tasks to test after one: itself, and all after the last."""
    return list(tasks) if number == len(tasks) - 1 else list(tasks)[number : number + 1]


def run_apart(method, tasks, *, steps, seed):
    """As `run`, where each task's LoRA is trained on the base weights and what was trained is put together afterwards."""
    trunk = AutoModel.from_pretrained(base_model()).requires_grad_(False)
    keep = Merged() if method == "opcm" else Absorbed()
    heads, table, first_logits, change = [], [], [], 0.0
    for number, task in enumerate(tasks.values()):
        heads.append(fresh_head(task, 100 * seed + number))
        model = fresh(trunk, 1000 * seed + number)
        train(model, heads[-1], task, steps=steps, seed=seed * 100 + number)
        keep.add(model, f"task-{number}")
        trunk = model.unload()
        row = {}
        for name in due(tasks, number):
            i = list(tasks).index(name)
            with added(trunk, keep.updates(f"task-{i}")):
                logits = logits_of(trunk, heads[i], tasks[name])
            row[name] = share_right(logits, tasks[name])
            if i == number:
                first_logits.append(logits)
            change = max(change, float((logits - first_logits[i]).abs().max()))
        table.append(row)
    return {"accuracy": table} | keep.measures(change)


class Merged:
    """LoRAs merged one after another by OPCM."""

    def __init__(self):
        self.totals, self.norms = {}, []

    def add(self, model, name):
        layers = {path: layer for path, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}
        new = {path: layer.get_delta_weight("default").detach().double() for path, layer in layers.items()}
        self.norms.append(sum(float(update.square().sum()) for update in new.values()) ** 0.5)
        for path, update in new.items():
            self.totals[path] = add_off_directions(self.totals[path], update) if path in self.totals else update

    def updates(self, name):
        scale = mean_norm_scale(list(self.totals.values()), self.norms)
        return {path: scale * total for path, total in self.totals.items()}

    def measures(self, change):
        return {}


class Absorbed:
    """LoRAs in a store whose bases grow by what they lack."""

    def __init__(self):
        self.store, self.scratch, self.components = None, Path(tempfile.mkdtemp()), []

    def add(self, model, name):
        model.save_pretrained(self.scratch / name)
        with AdapterCollection.from_pretrained(str(self.scratch / name)) as collection:
            if self.store is None:
                self.store = AdapterStore.from_collection(build_subspace(collection, n_components=R), collection)
            else:
                self.store.absorb(collection, held_share=1.0)
        self.components.append(max(len(bank.components_in) for bank in self.store.subspace.banks.values()))

    def updates(self, name):
        factors = {module: self.store.factors(name, module=module) for module in self.store[name]}
        return {module: lora_B @ lora_A for module, (lora_B, lora_A) in factors.items()}

    def measures(self, change):
        return {"largest_change_of_a_logit": change, "components": self.components}


@contextlib.contextmanager
def added(trunk, updates):
    """The updates in the weights, which are put back afterwards."""
    kept = {module: trunk.get_submodule(module).weight.detach().clone() for module in updates}
    try:
        for module, update in updates.items():
            trunk.get_submodule(module).weight.data += update.float()
        yield
    finally:
        for module, weight in kept.items():
            trunk.get_submodule(module).weight.data.copy_(weight)


def report(path):
    """Means over seeds."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    table = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row["accuracy"] for row in rows if row["method"] == method]
        names = rows[0]["tasks"]
        lost = [statistics.fmean(each[i][name] - each[-1][name] for i, name in enumerate(names[:-1])) for each in own]
        ends = [statistics.fmean(each[-1].values()) for each in own]
        learned = [statistics.fmean(each[i][name] for i, name in enumerate(names)) for each in own]
        table[method] = {
            "seeds": len(own),
            "average_accuracy": statistics.fmean(ends),
            "accuracy_right_after_training": statistics.fmean(learned),
            "forgetting": statistics.fmean(lost),
            "by_seed": [{"average_accuracy": end, "forgetting": loss} for end, loss in zip(ends, lost, strict=True)],
            "seconds": statistics.fmean(row["seconds"] for row in rows if row["method"] == method),
        }
        for key in ("largest_change_of_a_logit", "components"):
            found = [row[key] for row in rows if row["method"] == method and key in row]
            table[method] |= {key: max(found)} if found else {}
    result = {
        "environment": environment(),
        "tasks": rows[0]["tasks"],
        "steps": rows[0]["steps"],
        "test_rows": rows[0]["test_rows"],
    }
    result["methods"] = table
    RESULTS.joinpath("sequence.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("sequence.jsonl"))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--test-rows", type=int, default=200)
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
            row["test_rows"] = arguments.test_rows
            row |= run(method, tasks, steps=arguments.steps, seed=seed)
            row["seconds"] = round(time.time() - start)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(method, seed, [round(value, 3) for value in row["accuracy"][-1].values()], row["seconds"], flush=True)


if __name__ == "__main__":
    main()
