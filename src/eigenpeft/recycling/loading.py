"""README.md of the result: the lines that load it."""

from typing import Any

_CLASSIFIER = """```python
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base, adapter = {base!r}, {adapter!r}  # {where}
labels = {labels!r}
# Transformers reports a new head here, as it should: the adapter brings the trained one.
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels), ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, adapter).eval()  # a plain LoRA with the task's head: needs no eigenpeft
tokenizer = AutoTokenizer.from_pretrained(base)
with torch.no_grad():
    logits = model(**tokenizer(["a text"], return_tensors="pt")).logits
print(labels[int(logits[0].argmax())])
```"""
_LANGUAGE_MODEL = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter = {base!r}, {adapter!r}  # {where}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()  # a plain LoRA
tokenizer = AutoTokenizer.from_pretrained(base)
tokens = model.generate(**tokenizer("A prompt", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```"""
_OTHER = """```py
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, {adapter!r})  # the base model as the trials had it
```"""
_KINDS = {"SEQ_CLS": _CLASSIFIER, "CAUSAL_LM": _LANGUAGE_MODEL}


def readme(*, base: str, adapter: str, config: Any, task_type: str | None, text: str) -> str:
    """Text of the card.

    Args:
        base: Folder or Hub id of the base model, as it was loaded.
        adapter: Folder of the adapter.
        config: The model's configuration, for a classifier's labels.
        task_type: PEFT's.
        text: What won, in words.
    """
    labels = [str(config.id2label[i]) for i in range(config.num_labels)] if task_type == "SEQ_CLS" else []
    lines = _KINDS.get(task_type or "", _OTHER).format(
        base=base, adapter=adapter, labels=labels, where="or wherever they lie now"
    )
    serving = (
        "## How to keep it in a store\n\nBeside the adapters of other tasks, in bases that grow by what they lack of it: "
        f"`eigenpeft store absorb STORE {adapter}`. `eigenpeft store add` keeps only what the store's bases hold, and says how "
        "much that is.\n"
    )
    return f"# A LoRA adapter, chosen by `eigenpeft recycle`\n\n{text}\n\n## How to load it\n\n{lines}\n\n{serving}"
