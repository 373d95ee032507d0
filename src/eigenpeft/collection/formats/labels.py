"""Names of a classifier's labels, in a file beside its adapter: adapter_config.json has no place for them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eigenpeft.artifacts.reading import read_json

LABELS_NAME = "labels.json"
_logger = logging.getLogger(__name__)
_FORMAT = 'write {"id2label": {"0": "first", "1": "second"}} with a name for every class, or delete it'
_MODEL_CONFIG = "config.json"  # what `model.config.save_pretrained` writes


def label_names(config: Any) -> list[str] | None:
    """The names that a model's configuration gives its labels; None if it has none, or only "LABEL_0" and so on.

    Args:
        config: A configuration of transformers, or what its file says; anything else has no names.

    Examples:
        >>> label_names({"id2label": {"0": "no", "1": "yes"}})
        ['no', 'yes']
    """
    found = config.get("id2label") if isinstance(config, dict) else getattr(config, "id2label", None)
    if not isinstance(found, dict) or not found:
        return None
    by_number = {str(number): name for number, name in found.items()}
    names = [by_number.get(str(number)) for number in range(len(by_number))]
    if not all(isinstance(name, str) for name in names):
        return None
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else [str(name) for name in names]


def labels_of(folder: Path) -> list[str] | None:
    """The names of an adapter's labels, from labels.json or a model's config.json beside it; None if neither says.

    A labels.json of another form is passed over with a warning.

    Args:
        folder: Folder of the adapter.
    """
    for name in (LABELS_NAME, _MODEL_CONFIG):
        try:
            content = read_json(folder / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            content = error
        if found := label_names(content):
            return found
        if name == LABELS_NAME:
            reason = f" ({content})" if isinstance(content, Exception) else ""
            _logger.warning("%s does not name labels%s and is passed over; %s.", folder / name, reason, _FORMAT)
    return None


def label_file(names: Sequence[str]) -> bytes:
    """Content of labels.json.

    Args:
        names: By number.
    """
    return (json.dumps({"id2label": dict(enumerate(names))}, indent=2, ensure_ascii=False) + "\n").encode()
