"""Train one model on rows and judge it on others, with transformers' `Trainer` or any subclass of it."""

import copy
import math
import tempfile
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from eigenpeft.errors import EigenPeftError

_BATCH = 32


def train(
    model: PeftModel,
    rows: Any,
    *,
    args: TrainingArguments,
    learning_rate: float,
    head_learning_rate: float,
    steps: int,
    data_collator: Callable[[list[Any]], Any] | None,
    trainer: Callable[..., Trainer],
) -> None:
    """Train in place for a number of steps.

    Args:
        model: With its adapter.
        rows: As the trainer takes them.
        args: What steps, rates, output folder and saving do not replace.
        learning_rate: Peak learning rate of the adapter.
        head_learning_rate: Learning rate of `modules_to_save`, which is a new task's head.
        steps: Optimizer steps, a tenth of them for warm-up.
        data_collator: Makes batches of rows.
        trainer: `Trainer`, a subclass or a function that makes one.
    """
    head = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    adapter = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    groups = [{"params": head, "lr": head_learning_rate}, {"params": adapter, "lr": learning_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=args.weight_decay)
    with tempfile.TemporaryDirectory() as scratch:
        own = copy.copy(args)
        changes: dict[str, Any] = {
            "output_dir": scratch,
            "max_steps": steps,
            "warmup_steps": steps // 10,
            "save_strategy": "no",
        }
        changes["dataloader_pin_memory"] = own.dataloader_pin_memory and torch.cuda.is_available()
        for name, value in {**changes, "eval_strategy": "no", "report_to": []}.items():
            setattr(own, name, value)
        set_seed(own.seed)
        made = trainer(
            model=model, args=own, train_dataset=rows, data_collator=data_collator, optimizers=(optimizer, None)
        )
        made.remove_callback(PrinterCallback)  # it prints to stdout, where --json puts its one object
        made.train()


def judge(model: nn.Module, rows: Any, *, data_collator: Callable[[list[Any]], Any]) -> tuple[float, list[float]]:
    """Mean score and losses on rows, as `judge_rows` gives them.

    Args:
        model: Returns `loss` and `logits`, as models of transformers do when they get `labels`.
        rows: With labels.
        data_collator: Makes batches of rows.

    Raises:
        EigenPeftError: If the model gives no loss.
    """
    scores, losses = judge_rows(model, rows, data_collator=data_collator)
    return fmean(scores), losses


@torch.no_grad()
def judge_rows(
    model: nn.Module, rows: Any, *, data_collator: Callable[[list[Any]], Any]
) -> tuple[list[float], list[float]]:
    """Score and loss of each row: 1 or 0 where one row of logits per example meets whole labels, minus the loss otherwise.

    Args:
        model: Returns `loss` and `logits`, as models of transformers do when they get `labels`.
        rows: With labels.
        data_collator: Makes batches of rows.

    Returns:
        Scores and losses. A run that diverged has infinite losses, which is the worst result and no error.

    Raises:
        EigenPeftError: If the model gives no loss.
    """
    was, device = model.training, next(model.parameters()).device
    model.eval()
    right: list[float] = []
    losses: list[float] = []
    classifies, size = True, _BATCH
    while len(losses) < len(rows):
        chosen = [rows[i] for i in range(len(losses), min(len(losses) + size, len(rows)))]
        batch = {name: value.to(device) for name, value in data_collator(chosen).items()}
        found = model(**batch)
        if found.loss is None:
            raise EigenPeftError(f"The model gives no loss for rows with {', '.join(batch)}; rows need labels.")
        labels, logits = batch["labels"], found.logits
        of_rows = logits.ndim == 2 and logits.shape[1] > 1 and labels.ndim == 1 and not labels.is_floating_point()
        classifies = classifies and of_rows
        if of_rows:
            right += (logits.argmax(1) == labels).float().tolist()
            losses += nn.functional.cross_entropy(logits.float(), labels, reduction="none").tolist()
        elif len(chosen) == 1:
            losses.append(float(found.loss))
        else:  # a batch's loss is not that of its rows
            size = 1
    model.train(was)
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return (right if classifies else [-loss for loss in losses]), losses
