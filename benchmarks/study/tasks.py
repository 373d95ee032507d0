"""Classification tasks of the study: rows from disk, tokenised, cut to a number of examples by seed."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding

from eigenpeft.demo.assets import banking77, base_model

ZOO = Path(__file__).parents[2] / "recipes" / "train_zoo.yaml"
MAX_LENGTH = 48
N_TEST = 500
# Similar, as a yes or no, of the scores 0 to 5 of SemEval's STS (brmson/dataset-sts, commit e1d3375f5b3b).
SIMILAR_FROM = 3.0


@dataclass(frozen=True)
class Task:
    """One task, tokenised: training rows (n_train of them), rows to judge by, collator, number of labels."""

    name: str
    train: Dataset
    test: Dataset
    collator: DataCollatorWithPadding
    n_labels: int


def rows_of(name: str, split: str, data: Path) -> Dataset:
    """All rows of a split, `{"text", maybe "text_pair", "label"}`."""
    if name == "banking77":
        return Dataset.from_list(banking77({"train": "train", "dev": "test"}[split]))
    if name == "sts_similar":
        files = {"train": "sts/train.jsonl", "dev": "sts/dev.jsonl"}
    else:
        files = yaml.safe_load(ZOO.read_text())["tasks"][name]["files"]
    with (data / files[split]).open(encoding="utf-8") as lines:
        rows = Dataset.from_list([json.loads(line) for line in lines])
    if name == "sts_similar":
        labels = [int(score >= SIMILAR_FROM) for score in rows["label"]]
        rows = rows.remove_columns("label").add_column("label", labels)
    if "text_a" in rows.column_names:
        rows = rows.rename_columns({"text_a": "text", "text_b": "text_pair"})
    return rows.select_columns([column for column in ("text", "text_pair", "label") if column in rows.column_names])


def load_task(name: str, *, n_train: int, seed: int, data: Path) -> Task:
    """Training rows drawn by seed; the same test rows for every seed and method."""
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    train = rows_of(name, "train", data).shuffle(seed=seed)
    labels = sorted(set(train["label"]))
    train = train.select(range(min(n_train, len(train))))
    test = rows_of(name, "dev", data).shuffle(seed=0)
    test = test.select(range(min(N_TEST, len(test))))

    def encode(batch):
        encoded = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=MAX_LENGTH)
        return {**encoded, "labels": [labels.index(label) for label in batch["label"]]}

    train, test = (rows.map(encode, batched=True, remove_columns=rows.column_names) for rows in (train, test))
    return Task(name, train, test, DataCollatorWithPadding(tokenizer), len(labels))
