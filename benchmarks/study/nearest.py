"""The source adapter that suits a task: each attached frozen, a ridge head on its features, cross-validated."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from eigenpeft.collection import AdapterCollection
from eigenpeft.demo.assets import base_model

TARGETS = ["query", "value"]
_FOLDS = 4
_RIDGE = 0.3  # of the mean squared length of a feature; a head for choosing, not for judging


def lora_with_factors(base: PreTrainedModel, sources: AdapterCollection, name: str) -> PeftModel:
    """A plain LoRA r 8 on the base with the factors of a source adapter, whose scaling is folded into lora_B."""
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, task_type="SEQ_CLS"))
    for module in sources.modules:
        (read,) = sources.factors(module, names=[name])
        layer = model.base_model.model.get_submodule(module)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(read.lora_A)
            layer.lora_B["default"].weight.copy_(read.lora_B)
    return model


@torch.no_grad()
def scores(task, sources: AdapterCollection) -> dict[str, float]:
    """Cross-validated accuracy of a ridge head behind each source adapter, on the training rows of the task alone."""
    found = {}
    for name in sources.names:
        base = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=task.n_labels)
        model = lora_with_factors(base, sources, name).base_model.model.eval()
        parts = []
        for start in range(0, len(task.train), 64):
            batch = task.collator([task.train[i] for i in range(start, min(start + 64, len(task.train)))])
            parts.append(model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output)
        found[name] = cross_validated(torch.cat(parts).double(), torch.tensor(task.train["labels"]), task.n_labels)
    return found


def cross_validated(features: torch.Tensor, labels: torch.Tensor, n_labels: int) -> float:
    """Accuracy of ridge regression on one-hot labels; features (n, d), labels (n,)."""
    targets = torch.nn.functional.one_hot(labels, n_labels).double()
    fold = torch.arange(len(labels)) % _FOLDS
    right = 0
    for k in range(_FOLDS):
        mean, target_mean = features[fold != k].mean(0), targets[fold != k].mean(0)
        x = features[fold != k] - mean
        gram = x.mT @ x
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weights = torch.linalg.solve(gram + ridge, x.mT @ (targets[fold != k] - target_mean))
        predicted = ((features[fold == k] - mean) @ weights + target_mean).argmax(1)
        right += int((predicted == labels[fold == k]).sum())
    return right / len(labels)
