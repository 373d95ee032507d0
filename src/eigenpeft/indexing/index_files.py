"""The folder of an adapter index: read without trust, its hash checked; and its card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenpeft.artifacts import storage
from eigenpeft.artifacts.plain_text import for_card
from eigenpeft.errors import ArtifactError

INDEX = storage.ArtifactKind("adapter index", "index_config.json", "index.safetensors")
_LISTED = 100


@dataclass(frozen=True, eq=False)
class SavedIndex:
    """What the files of an index say.

    Attributes:
        rows: Adapter to the embeddings (n, d) of its rows, float16.
        encoder: Name of the encoder.
        is_model: Whether that is a base model's, which can be loaded.
        max_rows: Rows of each task that are kept.
    """

    rows: Mapping[str, Tensor]
    encoder: str
    is_model: bool
    max_rows: int


def read_index(where: storage.Location) -> SavedIndex:
    """The index of a located artifact.

    Args:
        where: Place of the artifact.

    Raises:
        ArtifactError: If a part is missing or does not fit the others, or the numbers do not have the hash that the config names.
    """
    config = storage.read_config(where)
    said: tuple[Any, Any, Any] = (config.get("names"), config.get("encoder"), config.get("max_rows"))
    names, encoder, max_rows = said
    right = (
        isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) and name.isprintable() for name in names)
        and len(set(names)) == len(names)
        and isinstance(encoder, str)
        and type(max_rows) is int
        and max_rows >= 1
    )
    if not right or not isinstance(config.get("encoder_is_model"), bool):
        raise ArtifactError(
            f"The {INDEX.config_name} of {where.origin!r} lists no names, encoder and max_rows as eigenpeft writes them: it was "
            "altered. Get a fresh copy."
        )
    expected = [f"{place:06d}" for place in range(len(names))]
    with storage.open_tensors(where) as file:
        found = list(file.keys())  # noqa: SIM118 (not a mapping)
        if sorted(found) != expected:
            raise ArtifactError(
                f"The file of the index at {where.origin!r} has {len(found)} tensors for {len(names)} adapters. Get a fresh copy."
            )
        tensors = {key: file.get_tensor(key) for key in expected}
    widths = {tensor.shape[1] if tensor.ndim == 2 else 0 for tensor in tensors.values()}
    sound = len(widths) == 1 and 0 not in widths
    sound = sound and all(len(each) and each.dtype == torch.float16 for each in tensors.values())
    if not sound or not all(bool(each.isfinite().all()) for each in tensors.values()):
        raise ArtifactError(
            f"The index at {where.origin!r} holds numbers of unequal width, of another type or not finite. Get a fresh copy."
        )
    sha256 = storage.fingerprint(tensors)
    if sha256 != config.get("sha256"):
        raise ArtifactError(
            f"The numbers of the index at {where.origin!r} have fingerprint {sha256}, its {INDEX.config_name} says "
            f"{config.get('sha256')}: a file was altered. Get a fresh copy."
        )
    return SavedIndex(dict(zip(names, tensors.values(), strict=True)), encoder, config["encoder_is_model"], max_rows)


def index_card(names: Sequence[str], *, encoder: str) -> str:
    """Text of the card.

    Args:
        names: Adapters.
        encoder: Name of the encoder.
    """
    shown = "\n".join(f"- {for_card(name)}" for name in names[:_LISTED])
    more = f"\n- and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"""---
library_name: eigenpeft
---

# Index of {len(names)} adapters

From a few rows of a task to the adapter for it. Embeddings by {for_card(encoder)}.

```python
from eigenpeft.indexing import AdapterIndex  # pip install eigenpeft

index = AdapterIndex.from_pretrained("<this repository or its local path>")
index.query(["a row of the task", "another one"]).text
```

`index.safetensors` holds the embeddings of rows of each adapter's task, in the order of `names` in `index_config.json`. Texts can
partly be guessed from embeddings: share it as you would share the rows.

## Adapters

{shown}{more}
"""
