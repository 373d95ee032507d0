"""The demo from end to end: recycle, train beside controls, save, reload, export, compare, draw."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from peft import PeftModel
from torch import nn

from eigenpeft.audit import AuditReport, audit_adapters
from eigenpeft.building import SubspaceBuilder
from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.assets import shipped_adapters
from eigenpeft.demo.methods import BATCH_SIZE, HEAD_LEARNING_RATE, N_COMPONENTS, STEPS, Method, methods
from eigenpeft.demo.training import Task, Trained, fresh_base, load_task, predict, train
from eigenpeft.errors import ArtifactError
from eigenpeft.report.plots import new_figure, save_figure
from eigenpeft.tuners import export_lora


@dataclass(frozen=True)
class Row:
    """One method of the comparison.

    Attributes:
        method: Its name.
        parameters: Trainable numbers, the classification head not counted (it is the same for all).
        head_parameters: Trainable numbers of the head.
        adapter_bytes: Size of the saved adapter file, the head's tensors taken off; None for the head alone.
        accuracies: One a seed.
        gap: EigenLoRA's accuracy minus this one's, mean over the seeds.
        gap_error: Twice the standard error of the gap over the test rows, which both were judged on.
        seconds: Mean training time.
    """

    method: str
    parameters: int
    head_parameters: int
    adapter_bytes: int | None
    accuracies: tuple[float, ...]
    gap: float
    gap_error: float
    seconds: float


@dataclass(frozen=True)
class Checks:
    """Whether the trained, the reloaded and the exported model are one.

    Attributes:
        reload_difference: Largest |logit difference| after save and load.
        export_difference: The same for the exported plain LoRA.
        same_predictions: Whether all three predict the same class for every test row.
        adapter_bytes: Size of the whole saved adapter file.
        export_bytes: Size of the exported one.
    """

    reload_difference: float
    export_difference: float
    same_predictions: bool
    adapter_bytes: int
    export_bytes: int


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found, and where it put it.

    Attributes:
        rows: The comparison.
        checks: Save, reload, export.
        n_train: Training rows of the new task.
        n_test: Held-out rows.
        n_adapters: Adapters recycled.
        explained_share: Of the adapters' updates, by the subspace.
        held_out_share: Of each adapter's update, by a subspace of that size fitted to the others.
        chance_share: The same of random adapters with the same singular values.
        audit_verdict: Whether the adapters share a subspace, by `audit`.
        out: Folder with subspace, adapter, plain LoRA and picture.
    """

    rows: tuple[Row, ...]
    checks: Checks
    n_train: int
    n_test: int
    n_adapters: int
    explained_share: float
    held_out_share: float
    chance_share: float
    audit_verdict: str
    out: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)


def run_demo(
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Run the demo.

    Args:
        out: Folder to write into: `subspace`, `adapter`, `plain-lora`, `demo.png`.
        seeds: One training a method and seed.
        steps: Optimiser steps of each training.
        overwrite: Whether the folder may hold an earlier demo, which is replaced.
        report: Called with one line about each step.

    Raises:
        EigenPeftError: If a part that the demo needs is not installed.
        ArtifactError: If the folder is not empty and `overwrite` is False, or holds something that is not replaced.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ArtifactError(
            f"{str(out)!r} is not empty; pass overwrite=True (--overwrite on the command line) to replace an earlier demo, "
            "or choose another folder."
        )
    report("Reading the shipped adapters and building their principal subspace")
    with AdapterCollection.from_pretrained(shipped_adapters()) as collection:
        subspace = SubspaceBuilder(n_components=N_COMPONENTS).fit(collection).subspace_
        n_adapters = len(collection)
        shared = audit_adapters(collection, n_components=2 * N_COMPONENTS, progress=False)
    subspace.save_pretrained(out / "subspace", overwrite=overwrite)
    task = load_task()
    report(f"New task: banking77, {task.n_labels} intents, {len(task.train)} examples; none of the adapters saw it")
    rows, right = [], {}
    kept = None
    with tempfile.TemporaryDirectory() as scratch:
        for method in methods(subspace):
            report(
                f"Training: {method.name} ({steps} steps, learning rate {method.learning_rate:g}, seeds {list(seeds)})"
            )
            results = [_train(task, method, seed=seed, steps=steps, scratch=scratch) for seed in seeds]
            rows.append(_row(method, results, scratch=Path(scratch)))
            right[method.name] = np.mean([result.logits.argmax(1) == task.test["labels"] for result in results], axis=0)
            if method.name == "EigenLoRA":
                kept = results[-1]
    assert kept is not None  # it is one of the methods
    report("Saving, reloading and exporting the EigenLoRA adapter")
    checks = _check(kept, task, out=out, seed=seeds[-1], overwrite=overwrite)
    result = DemoResult(
        rows=tuple(_compared(row, right["EigenLoRA"] - right[row.method]) for row in rows),
        checks=checks,
        n_train=len(task.train),
        n_test=len(task.test),
        n_adapters=n_adapters,
        explained_share=subspace.explained_share,
        held_out_share=shared.held_out.real[N_COMPONENTS - 1],
        chance_share=shared.held_out.null[N_COMPONENTS - 1],
        audit_verdict=shared.verdict,
        out=str(out),
    )
    _draw(result, shared, out / "demo.png", overwrite=overwrite)
    return result


def _train(task: Task, method: Method, *, seed: int, steps: int, scratch: str) -> Trained:
    return train(
        task,
        lambda base: method.adapt(base, seed),
        seed=seed,
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=method.learning_rate,
        head_learning_rate=HEAD_LEARNING_RATE,
        scratch=scratch,
    )


def _row(method: Method, results: Sequence[Trained], *, scratch: Path) -> Row:
    model = results[-1].model
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trainable.items() if "classifier" in name)
    size = None
    if isinstance(model, PeftModel):
        model.save_pretrained(str(scratch / "adapter"))
        size = (scratch / "adapter" / "adapter_model.safetensors").stat().st_size - 4 * head
    return Row(
        method=method.name,
        parameters=sum(trainable.values()) - head,
        head_parameters=head,
        adapter_bytes=size,
        accuracies=tuple(result.accuracy for result in results),
        gap=0.0,
        gap_error=0.0,
        seconds=fmean(result.seconds for result in results),
    )


def _compared(row: Row, difference: np.ndarray) -> Row:
    """The row with its gap; `difference` (n_test,) is EigenLoRA's score of each test row minus the method's."""
    error = 2 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return replace(row, gap=float(difference.mean()), gap_error=error)


def _check(trained: Trained, task: Task, *, out: Path, seed: int, overwrite: bool) -> Checks:
    model = trained.model
    assert isinstance(model, PeftModel)  # EigenLoRA is a PEFT method
    model.save_pretrained(str(out / "adapter"))
    export_lora(model, out / "plain-lora", overwrite=overwrite)
    logits = {"trained": trained.logits}
    for name in ("adapter", "plain-lora"):
        loaded: nn.Module = PeftModel.from_pretrained(fresh_base(task, seed=seed + 1), out / name)
        logits[name] = predict(loaded, task)
    predictions = [values.argmax(axis=1) for values in logits.values()]
    return Checks(
        reload_difference=float(np.abs(logits["adapter"] - logits["trained"]).max()),
        export_difference=float(np.abs(logits["plain-lora"] - logits["trained"]).max()),
        same_predictions=all(bool((values == predictions[0]).all()) for values in predictions),
        adapter_bytes=(out / "adapter" / "adapter_model.safetensors").stat().st_size,
        export_bytes=(out / "plain-lora" / "adapter_model.safetensors").stat().st_size,
    )


def _draw(result: DemoResult, shared: AuditReport, path: Path, *, overwrite: bool) -> None:
    figure, (left, right) = new_figure(1, 2, width=12, height=4.4)
    for place, row in enumerate(reversed(result.rows)):
        mean = fmean(row.accuracies)
        error = 2 * (mean * (1 - mean) / result.n_test) ** 0.5
        colour = "tab:red" if row.method == "EigenLoRA" else "tab:grey"
        left.errorbar(mean, place, xerr=error, marker="o", capsize=3, color=colour)
    labels = [f"{row.method}\n{row.parameters:,} parameters" for row in reversed(result.rows)]
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    left.set(xlabel="accuracy on banking77, twice its standard error", title="A task that the adapters never saw")
    steps = range(1, len(shared.held_out.real) + 1)
    for curve, colour, label in (
        (shared.explained, "tab:blue", "of the adapters it was fitted to"),
        (shared.held_out, "tab:red", "of an adapter left out"),
    ):
        right.plot(steps, curve.real, color=colour, label=label)
        right.plot(steps, curve.null, color=colour, linestyle="--", label=f"{label}, random adapters")
    right.set(xlabel="components K", ylabel="share of ‖ΔW‖² in the subspace", ylim=(0, 1.02))
    right.set_title(f"What {result.n_adapters} adapters share: {shared.verdict}")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path, overwrite=overwrite)
