"""Train and evaluate one classifier of the demo in a short loop; what lies below the first trained layer is computed once."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    get_scheduler,
    set_seed,
)

from eigenpeft.demo.assets import base_model
from eigenpeft.demo.related import NewCustomer
from eigenpeft.demo.trunk import Trunk, first_trained_layer, padded, resumed

MAX_LENGTH = 48


@dataclass(frozen=True)
class Task:
    """A classification task, tokenized.

    Attributes:
        train: Training rows.
        test: Held-out rows.
        data_collator: Pads batches.
        n_labels: Number of classes.
    """

    train: Dataset
    test: Dataset
    data_collator: DataCollatorWithPadding
    n_labels: int


@dataclass(frozen=True)
class Trained:
    """A trained model and what it took.

    Attributes:
        model: The model, in evaluation mode.
        seconds: Seconds of training alone.
        logits: (n_test, n_labels).
        accuracy: On the test rows.
    """

    model: nn.Module
    seconds: float
    logits: np.ndarray
    accuracy: float


def load_task(customer: NewCustomer) -> Task:
    """A new customer's rows, tokenized for the base model.

    Args:
        customer: From `new_customer`.

    Raises:
        EigenPeftError: If the installed base model is not whole.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_model())

    def encode(rows: list[dict]) -> Dataset:
        words = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)
        return Dataset.from_dict({**words, "labels": [row["label"] for row in rows]})

    return Task(
        train=encode(customer.train),
        test=encode(customer.test),
        data_collator=DataCollatorWithPadding(tokenizer),
        n_labels=len(customer.intents),
    )


def fresh_base(task: Task, *, seed: int) -> PreTrainedModel:
    """The base model under a new head; the same seed gives the same head to every method.

    Args:
        task: Gives the number of labels.
        seed: Seed of the head.

    Raises:
        EigenPeftError: If the installed base model is not whole.
    """
    model = copy.deepcopy(_loaded(task.n_labels, seed))
    set_seed(seed)
    return model


@lru_cache(maxsize=2)
def _loaded(n_labels: int, seed: int) -> PreTrainedModel:
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=n_labels)


def train(
    task: Task,
    adapt: Callable[[PreTrainedModel], nn.Module],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    head_learning_rate: float,
) -> Trained:
    """Adapt a fresh base, train what is trainable, evaluate. Dropout is off, as where the rates were chosen.

    Args:
        task: Data.
        adapt: Makes the trainable model from the base.
        seed: Seed of head, adapter and batches.
        steps: Optimizer steps (AdamW, linear decay).
        batch_size: Rows per step.
        learning_rate: Peak, of the adapter.
        head_learning_rate: Peak, of the head.

    Raises:
        EigenPeftError: If the installed base model is not whole.
    """
    model = adapt(fresh_base(task, seed=seed)).eval()
    first = first_trained_layer(model)
    optimizer = _optimizer(model, learning_rate, head_learning_rate)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    labels = torch.tensor(task.train["labels"])
    start = time.perf_counter()
    trunk = Trunk.of(model, task.train["input_ids"], first=first)
    with resumed(model, first=first):
        for chosen in _batches(trunk.lengths, steps=steps, size=batch_size, seed=seed):
            loss = nn.functional.cross_entropy(model(**trunk.batch(chosen)).logits, labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - start
    logits = predict(model, task)
    return Trained(model, seconds, logits, accuracy(logits, task))


def _batches(lengths: list[int], *, steps: int, size: int, seed: int) -> Iterator[list[int]]:
    """Rows of every step: passes over all rows in random order, rows of nearly equal length together, for less padding."""
    generator = torch.Generator().manual_seed(seed)
    left: list[list[int]] = []
    for _ in range(steps):
        if not left:
            places = torch.tensor(lengths) + 4 * torch.rand(len(lengths), generator=generator)
            parts = places.argsort().split(size)
            left = [parts[i].tolist() for i in torch.randperm(len(parts), generator=generator).tolist()]
        yield left.pop()


def _optimizer(model: nn.Module, learning_rate: float, head_learning_rate: float) -> torch.optim.Optimizer:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trainable.items() if "classifier" in name]
    adapter = [p for name, p in trainable.items() if "classifier" not in name]
    groups = [{"params": head, "lr": head_learning_rate}, {"params": adapter, "lr": learning_rate}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


@torch.no_grad()
def predict(model: nn.Module, task: Task, *, batch_size: int = 64) -> np.ndarray:
    """(n_test, n_labels) logits of a model on the test rows, rows of nearly equal length together.

    Args:
        model: Any sequence classifier.
        task: Data.
        batch_size: Rows at a time.
    """
    model.eval()
    ids = task.test["input_ids"]
    order = np.argsort([len(each) for each in ids], kind="stable")
    logits = np.empty((len(order), task.n_labels), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        logits[places] = model(**padded([ids[i] for i in places])).logits.float()
    return logits


def accuracy(logits: np.ndarray, task: Task) -> float:
    """Share of test rows whose largest logit is the label's.

    Args:
        logits: (n_test, n_labels).
        task: Data.
    """
    # Not `evaluate.load("accuracy")`: it fetches its script from the Hub, and the demo must run offline.
    return float((logits.argmax(axis=1) == np.asarray(task.test["labels"])).mean())
