"""Does training without gradients reach what gradients reach? The diagonal core on all-MiniLM-L6-v2, and what memory it takes.

Papers:    MeZO, arXiv 2305.17333; SPSA, Spall, IEEE Trans. Autom. Control 37, 1992; directions at right angles, arXiv 1804.02395.
Command:   python benchmarks/zeroth_order.py --data DIR --tasks trec6 cr sst2; python benchmarks/zeroth_order.py --memory
Hardware:  CPU, one thread; about seven minutes of CPU time per task.
Writes:    benchmarks/results/zeroth_order.json (a part per call) and lines on stdout.

The subspace has paired directions (K 16) of the nine other shipped adapters, on query and value of the last two layers: 64
trained numbers. The layers below do not change and are computed once, as their outputs are the same in every step; those above them
are the real ones and train in transformers' Trainer. First the head alone is trained to the end on the base's features and frozen;
gain is what the core adds to it, by Adam with gradients or by forward passes alone, from the same start, on the same rows.
32 directions at right angles per step, 156 steps: 4,992 pairs of forward passes. Rates are chosen for each on 100 rows that are
neither trained on nor tested on (without gradients after 30 steps). --memory measures the peak of resident memory in processes of
their own, on the whole model with batches of 32 rows of 128 tokens.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars
from peft import get_peft_model
from timing import environment
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from eigenpeft import AdapterCollection, EigenLoraConfig, PrincipalSubspace, SubspaceBuilder
from eigenpeft.demo import shipped_adapters
from eigenpeft.demo.assets import base_model
from eigenpeft.trainers import ZerothOrderTrainer

RESULTS = Path(__file__).parent / "results" / "zeroth_order.json"
FIRST, K, BATCH, MAX_LENGTH = 4, 16, 8, 32
ADAM_STEPS, ADAM_RATES = 200, (3e-1, 1.0, 3.0)
DIRECTIONS, STEPS, TUNING_STEPS, RATES, EPSILON = 32, 156, 30, (3e-1, 1.0), 1e-1
N_TRAIN, N_CHOICE, N_TEST = 300, 100, 400


class Given(nn.Module):
    """In the place of the embeddings: the hidden states that the layers below gave."""

    def forward(self, inputs_embeds=None, **_):
        return inputs_embeds


def rows(data, task):
    """Texts and labels: to train on, to choose rates by, to test."""
    found = {}
    for split in ("train", "test", "dev"):
        path = data / task / f"{split}.jsonl"
        if path.exists():
            found[split] = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    labels = sorted({row["label"] for row in found["train"]})
    train = random.Random(task).sample(found["train"], N_TRAIN + N_CHOICE)
    test = found.get("test") or found["dev"]
    test = random.Random(task).sample(test, min(N_TEST, len(test)))
    parts = train[:N_TRAIN], train[N_TRAIN:], test
    return [([text_of(row) for row in part], [labels.index(row["label"]) for row in part]) for part in parts], len(
        labels
    )


def text_of(row):
    """One text, or the two of a pair."""
    return row["text"] if "text" in row else f"{row['text_a']} [SEP] {row['text_b']}"


@torch.no_grad()
def below(model, texts):
    """Hidden states after the first layers, and the attention mask, one row per text."""
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    found = []
    for start in range(0, len(texts), 50):
        batch = tokenizer(
            texts[start : start + 50], padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        states = model.bert(**batch, output_hidden_states=True).hidden_states[FIRST]
        found += [
            {"inputs_embeds": states[i].clone(), "attention_mask": mask}
            for i, mask in enumerate(batch["attention_mask"])
        ]
    return found


def collated(rows_):
    """A batch, cut to its longest row."""
    longest = max(int(row["attention_mask"].sum()) for row in rows_)
    cut = {key: torch.stack([row[key][:longest] for row in rows_]) for key in ("inputs_embeds", "attention_mask")}
    return {**cut, "labels": torch.tensor([row["labels"] for row in rows_])}


def upper(n_labels):
    """The base model from layer FIRST on."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=n_labels).eval()
    model.bert.embeddings = Given()
    model.bert.encoder.layer = model.bert.encoder.layer[FIRST:]
    return model


def others(task):
    """The shipped adapters of the other tasks."""
    names = [path for path in sorted(shipped_adapters().iterdir()) if path.is_dir() and path.name != task]
    return AdapterCollection.from_pretrained(names)


def renamed(whole):
    """A subspace as the layers that are left call its modules."""
    kept = {
        name.replace(f"layer.{layer}.", f"layer.{layer - FIRST}."): whole[name]
        for layer in range(FIRST, 6)
        for name in whole
        if f"layer.{layer}." in name
    }
    return PrincipalSubspace(kept, info=whole.info)


@torch.no_grad()
def accuracy(model, part):
    right = 0
    for start in range(0, len(part), 100):
        batch = collated(part[start : start + 100])
        right += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
    return right / len(part)


def train_head(model, part):
    """The head alone, to the end, on the features that the base gives it."""
    batch, head = collated(part), model.classifier
    with torch.no_grad():
        features = model.bert(
            inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"]
        ).pooler_output
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-2, weight_decay=1e-4)
    for _ in range(400):
        optimizer.zero_grad()
        cross_entropy(head(features), batch["labels"]).backward()
        optimizer.step()


def prepared(data, task, whole):
    """Rows to train on, to choose by and to test, each with the hidden states that the layers below give it."""
    found, n_labels = rows(data, task)
    parts = [
        [row | {"labels": label} for row, label in zip(below(whole, texts), labels, strict=True)]
        for texts, labels in found
    ]
    return parts, n_labels


def head_of(parts, n_labels):
    """A trained head and its accuracies."""
    model = upper(n_labels)
    train_head(model, parts[0])
    head = {name: value.clone() for name, value in model.classifier.state_dict().items()}
    return head, {"choice": accuracy(model, parts[1]), "test": accuracy(model, parts[2])}


def run(kind, head, subspace, parts, n_labels, *, rate, steps, seed=0):
    """Train the core from zero; the accuracy on the rows to choose by and on the test rows, and CPU seconds."""
    model = upper(n_labels)
    model.classifier.load_state_dict(head)
    config = EigenLoraConfig(subspace=subspace, core="diagonal", r=8, lora_alpha=8)
    model = get_peft_model(model, config)
    settings = {"max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": rate, "seed": seed}
    settings |= {
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, lr_scheduler_type="linear", remove_unused_columns=False, **settings
        )
        common = {"model": model, "args": arguments, "train_dataset": parts[0], "data_collator": collated}
        trainer = (
            Trainer(**common)
            if kind == "adam"
            else ZerothOrderTrainer(**common, epsilon=EPSILON, n_directions=DIRECTIONS)
        )
        trainer.remove_callback(PrinterCallback)
        start = time.process_time()
        trainer.train()
    seconds = time.process_time() - start
    model.eval()
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "choice": accuracy(model, parts[1]),
        "test": accuracy(model, parts[2]),
        "numbers": numbers,
        "cpu_seconds": seconds,
        "rate": rate,
    }


def judge(data, task):
    parts, n_labels = prepared(data, task, AutoModelForSequenceClassification.from_pretrained(base_model()).eval())
    head, accuracies = head_of(parts, n_labels)
    found = {"head": accuracies}
    print(task, "head", accuracies, flush=True)
    with others(task) as collection:
        subspace = renamed(SubspaceBuilder(K, method="paired").fit(collection).subspace_)
    for kind, rates, tuning, steps in (
        ("adam", ADAM_RATES, ADAM_STEPS, ADAM_STEPS),
        ("zeroth order", RATES, TUNING_STEPS, STEPS),
    ):
        tried = [run(kind, head, subspace, parts, n_labels, rate=rate, steps=tuning) for rate in rates]
        best = max(tried, key=lambda each: each["choice"])
        last = best if steps == tuning else run(kind, head, subspace, parts, n_labels, rate=best["rate"], steps=steps)
        found[kind] = {**last, "steps": steps, "tried": tried}
        print(task, kind, {key: value for key, value in found[kind].items() if key != "tried"}, flush=True)
    found["zeroth order"]["pairs"] = STEPS * DIRECTIONS
    gain = found["adam"]["test"] - found["head"]["test"]
    found["share_of_adams_gain"] = (found["zeroth order"]["test"] - found["head"]["test"]) / gain if gain > 0 else None
    print(task, "share of Adam's gain", found["share_of_adams_gain"])
    return found


def measured(kind):
    """The peak of resident memory of this process, in MB, after a few batches of one kind."""
    model = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=6).eval()
    with AdapterCollection.from_pretrained(shipped_adapters()) as collection:
        subspace = SubspaceBuilder(K, method="balanced").fit(collection).subspace_
    model = get_peft_model(model, EigenLoraConfig(subspace=subspace, core="diagonal", r=8, lora_alpha=8)).eval()
    row = {"input_ids": torch.arange(1000, 1128), "attention_mask": torch.ones(128, dtype=torch.int64), "labels": 1}
    data = [row] * 32
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        common = {"model": model, "args": arguments, "train_dataset": data, "eval_dataset": data}
        trainer = ZerothOrderTrainer(**common) if kind == "zeroth order" else Trainer(**common)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if kind == "inference":
            for _ in range(6):
                trainer.evaluate()
        else:
            trainer.train()
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "peak_before_mb": before}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*", default=["trec6", "cr", "sst2"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--measure", choices=("inference", "zeroth order", "adam"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    if given.measure:
        print(json.dumps(measured(given.measure)))
        return
    if given.memory:
        command = [sys.executable, __file__, "--measure"]
        kinds = ("inference", "zeroth order", "adam")
        lines = {
            kind: subprocess.run([*command, kind], capture_output=True, text=True, check=True).stdout for kind in kinds
        }
        memory = {kind: json.loads(text.strip().splitlines()[-1]) for kind, text in lines.items()}
        print(memory)
        write({"memory": memory})
        return
    for task in given.tasks:
        write({"tasks": {task: judge(given.data, task)}})


def write(part):
    """Add a part to the results on disk."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    part = {**part, "environment": environment()}
    if "tasks" in part:
        part["tasks"] = {**known.get("tasks", {}), **part["tasks"]}
    RESULTS.write_text(json.dumps({**known, **part}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
