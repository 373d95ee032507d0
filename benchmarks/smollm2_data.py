"""The rows that the real runs on SmolLM2-135M train and are judged on.

MODEL is `smollm2/model` as `make smollm2` writes it: the dequantised Q4_1 weights of SmolLM2-135M-Instruct (Apache-2.0).
The rows are read from a folder DIR that is not part of this repository: `tasks/t0_templates` (tasks of T0's training mixture,
200 rows each, as the Self-Instruct repository keeps them), `tasks/gsm8k` (MIT) and `prefs/hh_relabelled` (pairs of Anthropic's HH
data that the authors of VPL relabelled for two simulated kinds of user, one who wants help and one who wants no harm).
All splits are drawn with fixed seeds; no function here depends on the seed of a run.
"""

import json
import random

import datasets
import torch
import transformers

ON_CPU = {
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "disable_tqdm": True,
}  # flags of every run of a recipe here


def quiet() -> None:
    """One thread, and no bars between the lines that a benchmark prints."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shuffled(rows):
    return random.Random(0).sample(rows, len(rows))


def t0(data, template, *, n_test=48, n_tune=32):
    """Rows of one T0 template as {"train", "tune", "test"}; the file names begin with `template`."""
    (path,) = (data / "tasks" / "t0_templates").glob(f"{template}*.jsonl")
    rows = [{"prompt": row["prompt"].rstrip() + "\n", "completion": row["completion"]} for row in read(path)]
    rows = shuffled(rows)
    held_out = n_test + n_tune
    return {"test": rows[:n_test], "tune": rows[n_test:held_out], "train": rows[held_out:]}


def gsm8k(data, *, longest=330, n_train=320, n_test=48, n_tune=32):
    """Short problems of gsm8k with worked answers, its calculator annotations taken out."""

    def short(name):
        rows = [
            {"prompt": row["prompt"] + "\n", "completion": without_annotations(row["completion"])}
            for row in read(data / "tasks" / "gsm8k" / f"{name}.jsonl")
        ]
        return shuffled([row for row in rows if len(row["prompt"] + row["completion"]) <= longest])

    rows = short("train")
    return {"train": rows[n_tune:][:n_train], "tune": rows[:n_tune], "test": short("test")[:n_test]}


def without_annotations(answer):
    """`48/2 = <<48/2=24>>24` becomes `48/2 = 24`."""
    return "".join(part.split(">>")[-1] for part in answer.split("<<"))


def pairs(data, *, user=None, longest=300, n_test=96):
    """Comparisons by the last turn of their dialogue, as {"train", "test"} of rows with user_id, prompt, chosen, rejected.

    `user` is "helpful", "harmless" or None for both; the test rows of both are the same however it is called.
    """
    found = {"train": [], "test": []}
    for name in ("helpful", "harmless"):
        rows = []
        for row in read(data / "prefs" / "hh_relabelled" / "both_test.jsonl"):
            prompt = "Human: " + row["prompt"].split("Human: ")[-1].strip() + "\n\nAssistant:"
            chosen, rejected = (" " + row["responses"][i].strip() for i in (row["label"], 1 - row["label"]))
            if (
                row["user_id"] == name
                and chosen != rejected
                and len(prompt + max(chosen, rejected, key=len)) <= longest
            ):
                rows.append({"user_id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected})
        rows = shuffled(rows)
        if user in (None, name):
            found["test"] += rows[:n_test]
            found["train"] += rows[n_test:]
    return {split: shuffled(rows) for split, rows in found.items()}


def cut_pairs(data, end, *, n_prompt=160, n_answer=320):
    """All comparisons of both users, one random order: the last turn's end, the answer's beginning, then `end`."""
    rows = []
    for row in read(data / "prefs" / "hh_relabelled" / "both_test.jsonl"):
        turn = row["prompt"].split("Human: ")[-1].strip()
        turn = turn if len(turn) <= n_prompt else turn[-n_prompt:].split(" ", 1)[-1]
        answers = [answer.strip() for answer in row["responses"]]
        answers = [text if len(text) <= n_answer else text[:n_answer].rsplit(" ", 1)[0] for text in answers]
        chosen, rejected = (f" {answers[i]}{end}" for i in (row["label"], 1 - row["label"]))
        prompt = f"Human: {turn}\n\nAssistant:"
        rows.append({"user_id": row["user_id"], "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return shuffled(rows)


def arithmetic(n_test=16):
    """Sums of two numbers from 2 to 19 after two worked ones, each asked once, in gsm8k's columns."""
    sums = shuffled([(a, b) for a in range(2, 20) for b in range(2, 20)])
    rows = [{"question": f"3 + 4 = 7\n12 + 5 = 17\n{a} + {b} =", "answer": str(a + b)} for a, b in sums]
    return {"train": rows[n_test:], "test": rows[:n_test]}


def write_rows(folder, rows):
    """`folder/train.jsonl` and `folder/test.jsonl`, as the recipes read them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
    return folder


class Record:
    """Rows of results in one JSON file: written after every run, so that an interrupted benchmark goes on."""

    def __init__(self, path, environment):
        self.path, self.environment = path, environment
        self.rows = json.loads(path.read_text())["rows"] if path.exists() else []

    def find(self, **cell):
        """The row with these entries, or None."""
        return next((row for row in self.rows if cell.items() <= row.items()), None)

    def add(self, row):
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = ",\n  ".join(json.dumps(row) for row in self.rows)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(f'{{\n "environment": {json.dumps(self.environment)},\n "rows": [\n  {text}\n ]\n}}\n')
        scratch.replace(self.path)
