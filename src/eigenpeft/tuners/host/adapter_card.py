"""What an adapter's README tells a reader who opens it without this package, and how it was trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import LoraConfig, PeftModel

from eigenpeft.artifacts.plain_text import for_card
from eigenpeft.collection.base_models import hub_id
from eigenpeft.subspace.card import shown_base
from eigenpeft.version import __version__

HEADING = "## Loading this adapter"
_NOTE = """{heading}

This is a{article} {method} adapter, which PEFT knows only with the package `eigenpeft`:

```bash
pip install eigenpeft
```

```python
import eigenpeft  # makes the method {kind} known to PEFT
from peft import {loader}

model = {call}
```

{export}
"""
_EXPORT = (
    '`eigenpeft.export_lora(model, "plain-lora")` turns it into a plain LoRA adapter, which needs nothing but PEFT.'
)
_NO_EXPORT = "No plain LoRA adapter does the same: its update depends on the token."


@dataclass
class ExplainedConfig(LoraConfig):
    """A configuration that, saved beside an adapter, says what to install and leaves a README saying how to load it."""

    method_name = "PEFT"
    is_exportable = True

    requires_package: str = field(
        default="eigenpeft",
        metadata={"help": "Written to adapter_config.json to tell readers what to install: pip install eigenpeft."},
    )
    eigenpeft_version: str = field(default=__version__, metadata={"help": "Version that wrote the adapter."})

    def __post_init__(self):
        # Users leave the type out, and PEFT's files always have it.
        self.is_from_file = self.peft_type is not None
        super().__post_init__()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT does, and add the section on loading to README.md, once.

        Args:
            save_directory: Folder of the adapter.
            **kwargs: PEFT's own.
        """
        super().save_pretrained(save_directory, **kwargs)
        explain_loading(Path(save_directory), config=self, method=self.method_name)


def explain_loading(folder: Path, *, config: LoraConfig, method: str) -> None:
    """Append the section on loading to the folder's README.md, unless it is there.

    Args:
        folder: Folder of the adapter.
        config: Its configuration.
        method: What its readers call the method.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if HEADING in text:
        return
    automatic = {"CAUSAL_LM": "AutoPeftModelForCausalLM", "SEQ_CLS": "AutoPeftModelForSequenceClassification"}
    loader = automatic.get(str(getattr(config.task_type, "value", config.task_type)), "PeftModel")
    where = '"<path or Hub id of this adapter>"'
    call = f"{loader}.from_pretrained({where if loader != 'PeftModel' else 'base_model, ' + where})"
    article = "n" if method[0] in "AEIOU" else ""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    export = _EXPORT if getattr(config, "is_exportable", True) else _NO_EXPORT
    note = _NOTE.format(
        heading=HEADING, article=article, method=method, kind=kind, loader=loader, call=call, export=export
    )
    _write(path, f"{text.rstrip()}\n\n{note}".lstrip())


def trained_card(folder: Path, model: PeftModel, *, made_by: str, facts: Mapping[str, str]) -> None:
    """Write README.md of a folder into which a trained adapter was saved, complete without editing.

    Args:
        folder: Folder of the adapter.
        model: The trained model.
        made_by: The command that trained it.
        facts: Name and text of each row of its table.
    """
    config: Any = model.peft_config[str(model.active_adapter)]
    base = config.base_model_name_or_path
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    data = ModelCardData(base_model=hub_id(base), library_name="peft", tags=["eigenpeft", kind])
    rows = {"base model": shown_base(base), **{name: for_card(text) for name, text in facts.items()}}
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    text = f"""---
{data.to_yaml()}
---

# {for_card(Path(folder).resolve().name)}

Trained with `{made_by}` (eigenpeft {__version__}).

| | |
|---|---|
{table}
"""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "README.md", text)
    if isinstance(config, ExplainedConfig):
        explain_loading(folder, config=config, method=config.method_name)


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(".README.md.partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
