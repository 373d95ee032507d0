"""The zoos: one plain LoRA r 8 per customer, each from a seed of its own, kept as float16 folders; and parts of them."""

import hashlib
import json
import random
import shutil
from functools import lru_cache
from pathlib import Path

import torch
from customers import ZOOS, Customer, members, rows_of_member
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training import accuracy, fresh_base, tokenized, train

from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.assets import BASE_MODEL, shipped_adapters

STEPS, RATE, HEAD_RATE = 60, 3e-3, 3e-2
MODULES = ["query", "value"]
TASKS = ("cr", "mpqa", "mr", "mrpc", "sick_entail", "sst2", "subj", "trec6", "tweet_emotion", "tweet_irony")
Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]


def seed_of(customer: Customer) -> int:
    return int(hashlib.sha256(customer.name.encode()).hexdigest()[:6], 16)


def train_member(
    customer: Customer,
    *,
    data: Path,
    folder: Path,
    modules: list[str] | str = MODULES,
    first_layer: int = 0,
    per_intent: int = 60,
    steps: int = STEPS,
) -> dict:
    """Train and save one adapter; its record."""
    seed = seed_of(customer)
    torch.manual_seed(seed)
    train_rows, test_rows = rows_of_member(customer, data, per_intent=per_intent)
    task = tokenized(train_rows, test_rows, first_layer=first_layer)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=modules, task_type="SEQ_CLS")
    model = get_peft_model(fresh_base(task.n_labels, seed=seed), config).eval()
    _, seconds = train(model, task, rate=RATE, head_rate=HEAD_RATE, steps=steps, seed=seed)
    for each in model.peft_config.values():
        each.base_model_name_or_path = BASE_MODEL
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    weights = unfinished / "adapter_model.safetensors"
    save_file({name: value.half().contiguous() for name, value in load_file(weights).items()}, weights)
    record = {
        "name": customer.name,
        "source": customer.source,
        "group": customer.group,
        "intents": list(customer.intents),
        "seed": seed,
        "n_train": len(task.ids),
        "n_test": len(task.test_ids),
        "accuracy": round(accuracy(model, task.test_ids, task.test_labels, start=task.test_below), 4),
        "seconds": round(seconds, 1),
        "steps": steps,
        "batch_size": 16,
        "learning_rate": RATE,
        "head_learning_rate": HEAD_RATE,
    }
    (unfinished / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    (unfinished / "README.md").unlink(missing_ok=True)
    unfinished.rename(folder)
    return record


def missing_members(zoo: str, size: int, *, data: Path, work: Path) -> list[Customer]:
    wanted = [zoo] if zoo in ZOOS else list(ZOOS) if zoo == "mixed" else []
    number = -(-size // 4) if zoo == "mixed" else size
    folder = work / "zoos"
    return [c for each in wanted for c in members(each, data)[:number] if not (folder / c.name).exists()]


def zoo_names(zoo: str, size: int, draw: int) -> list[str]:
    """The names of a zoo's adapters; draws after the first take others of the first 20 (or of the first `size`).

    "without_NAME" is the tasks of starts.py without one of them.
    """
    if zoo.startswith("without_"):
        return [name for name in TASKS if name != zoo.removeprefix("without_")]
    if zoo == "mixed":
        return [f"{each}_{i:02}" for each in ZOOS for i in range(size // 4)]
    order = list(range(max(size, 20)))
    if draw:
        random.Random(f"{zoo}/{draw}").shuffle(order)
    return [f"{zoo}_{i:02}" for i in sorted(order[:size])]


@lru_cache(maxsize=4)
def collection(zoo: str, size: int, draw: int, work: Path) -> AdapterCollection:
    if zoo == "shipped":
        return AdapterCollection.from_pretrained(shipped_adapters())
    return AdapterCollection.from_pretrained([work / "zoos" / name for name in zoo_names(zoo, size, draw)])


@lru_cache(maxsize=4)
def factors(zoo: str, size: int, draw: int, work: Path) -> dict[str, list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """Module to (name, lora_B with its scaling, lora_A) of every adapter."""
    adapters = collection(zoo, size, draw, work)
    return {
        module: [(read.adapter, read.lora_B.float(), read.lora_A.float()) for read in adapters.factors(module)]
        for module in adapters.modules
    }


@lru_cache(maxsize=4)
def mean_update(zoo: str, size: int, draw: int, work: Path) -> dict[str, torch.Tensor]:
    """Module to the mean ΔW, (out, in)."""
    found = factors(zoo, size, draw, work)
    return {module: torch.stack([b @ a for _, b, a in parts]).mean(0) for module, parts in found.items()}
