"""Train one classifier in a short loop of its own and judge it; the head alone in milliseconds, on frozen features."""

import random
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from customers import Rows
from packing import Packed, embedded, first_trained_layer, forward
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from eigenpeft.demo.assets import base_model

MAX_LENGTH, BATCH_SIZE = 40, 16


@dataclass(frozen=True)
class Task:
    """A tokenised task: ids and classes of its training and of its test rows.

    `below` and `test_below` are what enters the first layer that any method changes, where that is not the first of all.
    """

    ids: list[list[int]]
    labels: Tensor
    test_ids: list[list[int]]
    test_labels: Tensor
    n_labels: int
    below: Packed | None = None
    test_below: Packed | None = None


@lru_cache(maxsize=1)
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model())


def tokenized(train: Rows, test: Rows, *, first_layer: int = 0, max_length: int = MAX_LENGTH) -> Task:
    def ids(rows: Rows) -> list[list[int]]:
        return tokenizer()(rows.texts, truncation=True, max_length=max_length)["input_ids"]

    labels = torch.tensor(train.labels)
    task = Task(ids(train), labels, ids(test), torch.tensor(test.labels), int(labels.max()) + 1)
    if not first_layer:
        return task
    bert = fresh_base(2, seed=0).bert
    below, test_below = (prefix(bert, each, layer=first_layer) for each in (task.ids, task.test_ids))
    return replace(task, below=below, test_below=test_below)


@lru_cache(maxsize=1)
def _base() -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(base_model())


def fresh_base(n_labels: int, *, seed: int) -> PreTrainedModel:
    """The base with a head drawn by seed, in evaluation mode: nothing here uses dropout."""
    model = deepcopy(_base())
    model.config.num_labels = model.num_labels = n_labels
    model.classifier = nn.Linear(model.config.hidden_size, n_labels)
    with torch.no_grad():
        model.classifier.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
        model.classifier.bias.zero_()
    return model.eval()


def inner(model: nn.Module) -> nn.Module:
    """The BERT classifier inside a PEFT model, or itself."""
    return model.base_model.model if hasattr(model, "peft_config") else model


def prefix(
    bert: nn.Module, ids: Sequence[Sequence[int]], *, layer: int, start: Packed | None = None, at_once: int = 64
) -> Packed:
    """All texts through the layers before `layer`, without gradients; from `start`, if that is known already."""
    start = start or embedded(bert, ids)
    if layer <= start.layer:
        return start
    n_layers, parts = len(bert.encoder.layer), []
    with torch.no_grad():
        for i in range(0, len(ids), at_once):
            chosen = range(i, min(i + at_once, len(ids)))
            parts.append(forward(bert, start.batch(chosen, n_layers), until=layer if layer < n_layers else None))
    return Packed(torch.cat([part.hidden for part in parts]), start.lengths, parts[0].layer)


def batches(n_rows: int, *, steps: int, seed: int, size: int = BATCH_SIZE) -> list[list[int]]:
    """Indices of every step: passes over all rows in random order."""
    generator, order, found = random.Random(f"batches/{seed}"), [], []
    for _ in range(steps):
        while len(order) < min(size, n_rows):
            order += generator.sample(range(n_rows), n_rows)
        found.append(order[:size])
        order = order[size:]
    return found


def optimizer_of(groups: list[dict], *, steps: int):
    """AdamW without decay, warm-up over a tenth and then linear to zero; and its schedule."""
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    warmup = max(1, steps // 10)

    def share(i: int) -> float:
        return (i + 1) / warmup if i < warmup else (steps - i) / (steps - warmup)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def train_head(features: Tensor, labels: Tensor, n_labels: int, *, rate: float, steps: int, seed: int) -> nn.Module:
    """A head alone on frozen features, as `train` trains it."""
    head = nn.Linear(features.shape[1], n_labels)
    with torch.no_grad():
        head.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    optimizer, schedule = optimizer_of([{"params": list(head.parameters()), "lr": rate}], steps=steps)
    for chosen in batches(len(features), steps=steps, seed=seed):
        nn.functional.cross_entropy(head(features[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return head


def train(
    model: nn.Module, task: Task, *, rate: float, head_rate: float, steps: int, seed: int, size: int = BATCH_SIZE
) -> tuple[int, float]:
    """Train adapter and head; the number of trained adapter values and the seconds."""
    classifier = inner(model)
    bert, head = classifier.bert, classifier.classifier
    n_layers = len(bert.encoder.layer)
    of_head = [p for p in head.parameters() if p.requires_grad]
    known = {id(p) for p in of_head}
    adapter = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": of_head, "lr": head_rate}, {"params": adapter, "lr": rate}]
    optimizer, schedule = optimizer_of(groups, steps=steps)
    start = time.perf_counter()
    # What is trained may lie outside the layers that use it, such as a vector bank of the whole model.
    inside = {id(p) for p in bert.encoder.layer.parameters()}
    first = first_trained_layer(bert) if all(id(p) in inside for p in adapter) else 0
    fixed = prefix(bert, task.ids, layer=first, start=task.below)
    for chosen in batches(len(task.ids), steps=steps, seed=seed, size=size):
        logits = head(forward(bert, fixed.batch(chosen, n_layers)).hidden)
        nn.functional.cross_entropy(logits, task.labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return sum(p.numel() for p in adapter), time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, ids: Sequence[Sequence[int]], labels: Tensor, *, start: Packed | None = None) -> float:
    classifier = inner(model)
    pooled = prefix(classifier.bert, ids, layer=len(classifier.bert.encoder.layer), start=start).hidden
    return float((classifier.classifier(pooled).argmax(1) == labels).double().mean())


@torch.no_grad()
def difference_to_transformers() -> float:
    """The largest difference of a logit between the packed model and `BertForSequenceClassification` on a padded batch."""
    model = fresh_base(5, seed=0)
    texts = [
        "card",
        "where is my card",
        "i was charged twice for one payment and want my money back",
        "transfer",
        "top up",
    ]
    ids = tokenizer()(texts)["input_ids"]
    packed = model.classifier(prefix(model.bert, ids, layer=len(model.bert.encoder.layer)).hidden)
    padded = tokenizer().pad({"input_ids": ids}, return_tensors="pt")
    return float((packed - model(**padded).logits).abs().max())
