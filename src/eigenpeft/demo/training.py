"""Train and evaluate one classifier of the demo with transformers' Trainer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from eigenpeft.demo.assets import base_model
from eigenpeft.demo.related import NewCustomer

MAX_LENGTH = 48


@dataclass(frozen=True)
class Task:
    """A classification task, tokenized.

    Attributes:
        train: Training rows.
        test: Held-out rows.
        collator: Pads batches.
        n_labels: Number of classes.
    """

    train: Dataset
    test: Dataset
    collator: DataCollatorWithPadding
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
    """
    tokenizer = AutoTokenizer.from_pretrained(base_model())

    def encode(rows: list[dict]) -> Dataset:
        words = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)
        return Dataset.from_dict({**words, "labels": [row["label"] for row in rows]})

    return Task(
        train=encode(customer.train),
        test=encode(customer.test),
        collator=DataCollatorWithPadding(tokenizer),
        n_labels=len(customer.intents),
    )


def fresh_base(task: Task, *, seed: int) -> PreTrainedModel:
    """The base model under a new head; the same seed gives the same head to every method.

    Args:
        task: Gives the number of labels.
        seed: Seed of the head.
    """
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=task.n_labels)


def train(
    task: Task,
    adapt: Callable[[PreTrainedModel], nn.Module],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    head_learning_rate: float,
    scratch: str,
) -> Trained:
    """Adapt a fresh base, train what is trainable, evaluate.

    Args:
        task: Data.
        adapt: Makes the trainable model from the base.
        seed: Seed of head, adapter and batches.
        steps: Optimizer steps (AdamW, linear decay).
        batch_size: Rows per step.
        learning_rate: Peak, of the adapter.
        head_learning_rate: Peak, of the head.
        scratch: Folder for the trainer's own files.
    """
    model = adapt(fresh_base(task, seed=seed))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=64,
            learning_rate=learning_rate,
            warmup_steps=steps // 10,
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
        optimizers=(_optimizer(model, learning_rate, head_learning_rate), None),
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logits = predict(model, task)
    return Trained(model.eval(), seconds, logits, accuracy(logits, task))


def _optimizer(model: nn.Module, learning_rate: float, head_learning_rate: float) -> torch.optim.Optimizer:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trainable.items() if "classifier" in name]
    adapter = [p for name, p in trainable.items() if "classifier" not in name]
    groups = [{"params": head, "lr": head_learning_rate}, {"params": adapter, "lr": learning_rate}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


@torch.no_grad()
def predict(model: nn.Module, task: Task, *, batch_size: int = 64) -> np.ndarray:
    """(n_test, n_labels) logits of a model on the test rows.

    Args:
        model: Any sequence classifier.
        task: Data.
        batch_size: Rows at a time.
    """
    model.eval()
    # Rows of nearly equal length together: half of a batch would be padding otherwise.
    order = np.argsort([len(ids) for ids in task.test["input_ids"]], kind="stable")
    logits = np.empty((len(order), task.n_labels), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = task.collator([task.test[int(i)] for i in places])
        logits[places] = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    return logits


def accuracy(logits: np.ndarray, task: Task) -> float:
    """Share of test rows whose largest logit is the label's.

    Args:
        logits: (n_test, n_labels).
        task: Data.
    """
    # Not `evaluate.load("accuracy")`: it fetches its script from the Hub, and the demo must run offline.
    return float((logits.argmax(axis=1) == np.asarray(task.test["labels"])).mean())
