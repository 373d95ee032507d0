"""The demo from end to end: audit, recycle for new customers beside the controls, store, serve in one batch, export, draw."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from peft import PeftModel

from eigenpeft.audit import AuditReport, audit_adapters
from eigenpeft.building import SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.combining import merge
from eigenpeft.demo.methods import BATCH_SIZE, N_COMPONENTS, OURS, RANK, STEPS, Method, methods
from eigenpeft.demo.picture import draw
from eigenpeft.demo.related import NewCustomer, new_customer, related_adapters
from eigenpeft.demo.result import Checks, DemoResult, Row
from eigenpeft.demo.training import Task, Trained, accuracy, fresh_base, load_task, predict, train
from eigenpeft.demo.trunk import padded
from eigenpeft.errors import ArtifactError, EigenPeftError
from eigenpeft.linalg.scores.intervals import mean_error
from eigenpeft.subspace import AdapterStore, PrincipalSubspace
from eigenpeft.tuners import AdapterBank, export_lora

N_CUSTOMERS, MOST_CUSTOMERS = 3, 4  # what a run takes, and what ships
SERVED_BATCH = 64


def run_demo(
    out_dir: str | Path,
    *,
    n_customers: int = N_CUSTOMERS,
    seed: int = 0,
    steps: int = STEPS,
    overwrite: bool = False,
    progress: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Run the demo.

    Args:
        out_dir: Folder to write into: `subspace`, `store`, `plain-lora`, `demo.png`.
        n_customers: New customers, 1 to 4; each is one training per method.
        seed: Seed of heads, adapters and batches.
        steps: Optimizer steps of each training.
        overwrite: Whether the folder may hold an earlier demo, which is replaced.
        progress: Show progress bars.
        report: Called with one line about each step.

    Raises:
        EigenPeftError: If a part that the demo needs is not installed, or `n_customers` is out of range.
        ArtifactError: If the folder is not empty and `overwrite` is False, or holds something that is not replaced.
        OSError, ValueError: If a file of the adapters is gone or damaged.
    """
    out = Path(out_dir)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ArtifactError(
            f"{str(out)!r} is not empty; pass overwrite=True (--overwrite on the command line) to replace an earlier demo, "
            "or choose another folder."
        )
    if n_customers not in range(1, MOST_CUSTOMERS + 1):
        raise EigenPeftError(f"n_customers={n_customers} must be 1 to {MOST_CUSTOMERS}.")
    report("1 of 4: do sixteen adapters, one per customer of a bank, share anything?")
    with AdapterCollection.from_pretrained(related_adapters()) as collection:
        audit = audit_adapters(collection, progress=progress)
        subspace = SubspaceBuilder(n_components=N_COMPONENTS).fit(collection).subspace_
        merged = merge(collection, rule="mean", scale="auto", progress=progress)
    subspace.save_pretrained(out / "subspace", overwrite=overwrite)
    customers = [new_customer(number) for number in range(n_customers)]
    tasks = [load_task(customer) for customer in customers]
    report(
        f"2 of 4: {n_customers} new customers, 8 intents and {len(tasks[0].train)} labelled rows each; no adapter has seen their "
        "intents"
    )
    rows, trained = _compare(tasks, methods(subspace, merged), seed=seed, steps=steps, progress=progress)
    report(f"3 of 4: {n_customers} adapters in one store, and all customers in one batch")
    store = _store(subspace, customers, trained, out / "store", overwrite=overwrite)
    served = _serve(out / "store", customers, tasks, seed=seed)
    report("4 of 4: one of them as a plain LoRA")
    exported = _export(store, customers[0], tasks[0], out / "plain-lora", seed=seed, overwrite=overwrite)
    result = DemoResult(
        audit=_words(audit),
        rows=rows,
        n_customers=n_customers,
        n_train=len(tasks[0].train),
        n_test=sum(len(task.test) for task in tasks),
        checks=Checks(
            served_difference=max(
                float(np.abs(own - one.logits).max()) for own, one in zip(served, trained, strict=True)
            ),
            served_accuracy=fmean(accuracy(logits, task) for logits, task in zip(served, tasks, strict=True)),
            export_difference=float(np.abs(exported - trained[0].logits).max()),
            member_bytes=max(len(member.to_bytes()) for member in (store[name] for name in store.names)),
            subspace_bytes=subspace.n_bytes,
            lora_bytes=(out / "plain-lora" / "adapter_model.safetensors").stat().st_size,
        ),
        out=str(out),
    )
    draw(result, audit, out / "demo.png", overwrite=overwrite)
    return result


def _words(audit: AuditReport) -> dict[str, str]:
    """The audit's answers to the questions that can be asked before there is a task."""
    return {"compress": audit.compress.text, "train": audit.train.text}


def _compare(
    tasks: Sequence[Task], chosen: Sequence[Method], *, seed: int, steps: int, progress: bool
) -> tuple[tuple[Row, ...], list[Trained]]:
    """Every method on every customer; and the customers' EigenLoRA models."""
    right: dict[str, np.ndarray] = {}
    rows, ours = [], []
    with tqdm(total=len(chosen) * len(tasks), desc="Training", unit="model", disable=not progress) as bar:
        for method in chosen:
            bar.set_postfix_str(method.name)
            results = []
            for task in tasks:
                results.append(_train(task, method, seed=seed, steps=steps))
                bar.update()
            right[method.name] = np.concatenate(
                [one.logits.argmax(1) == task.test["labels"] for one, task in zip(results, tasks, strict=True)]
            )
            rows.append(_row(method, results))
            if method.name == OURS:
                ours = results
    return tuple(_compared(row, 1.0 * right[OURS] - right[row.method]) for row in rows), ours


def _train(task: Task, method: Method, *, seed: int, steps: int) -> Trained:
    return train(
        task,
        lambda base: method.adapt(base, seed),
        seed=seed,
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=method.learning_rate,
        head_learning_rate=method.head_learning_rate,
    )


def _row(method: Method, results: Sequence[Trained]) -> Row:
    trainable = {name: p.numel() for name, p in results[0].model.named_parameters() if p.requires_grad}
    return Row(
        method=method.name,
        n_parameters=sum(count for name, count in trainable.items() if "classifier" not in name),
        accuracies=tuple(result.accuracy for result in results),
        gap=0.0,
        gap_error=0.0,
        seconds=fmean(result.seconds for result in results),
    )


def _compared(row: Row, difference: np.ndarray) -> Row:
    """The row with its gap; `difference` (n_test,) is EigenLoRA's score of each test row minus the method's."""
    error = 2 * mean_error(difference.tolist())
    return replace(row, gap=float(difference.mean()), gap_error=error)


def _store(
    subspace: PrincipalSubspace,
    customers: Sequence[NewCustomer],
    trained: Sequence[Trained],
    folder: Path,
    *,
    overwrite: bool,
) -> AdapterStore:
    """The trained adapters, heads included, in one folder."""
    store = AdapterStore(subspace)
    for customer, one in zip(customers, trained, strict=True):
        store.add(one.model, name=customer.name)
    store.save_pretrained(folder, overwrite=overwrite)
    return store


@torch.no_grad()
def _serve(folder: Path, customers: Sequence[NewCustomer], tasks: Sequence[Task], *, seed: int) -> list[np.ndarray]:
    """Logits of every customer's test rows by one base model, the customers mixed in each batch."""
    model, bank = (
        fresh_base(tasks[0], seed=seed + 1).eval(),
        AdapterBank.from_store(AdapterStore.from_pretrained(folder)),
    )
    ids = [task.test["input_ids"] for task in tasks]
    rows = sorted(
        ((i, number) for i, own in enumerate(ids) for number in range(len(own))), key=lambda at: len(ids[at[0]][at[1]])
    )
    found: list[dict[int, np.ndarray]] = [{} for _ in tasks]
    with bank.attached(model):
        for start in range(0, len(rows), SERVED_BATCH):
            part = rows[start : start + SERVED_BATCH]
            with bank.use([customers[i].name for i, _ in part], logits="list"):
                logits = model(**padded([ids[i][number] for i, number in part])).logits
            for (i, number), own in zip(part, logits, strict=True):
                found[i][number] = own.numpy()
    return [np.stack([each[number] for number in range(len(each))]) for each in found]


def _export(
    store: AdapterStore, customer: NewCustomer, task: Task, folder: Path, *, seed: int, overwrite: bool
) -> np.ndarray:
    """Logits of PEFT alone with the exported adapter."""
    export_lora(store, folder, adapter_name=customer.name, rank=RANK, overwrite=overwrite)
    return predict(PeftModel.from_pretrained(fresh_base(task, seed=seed + 1), folder), task)
