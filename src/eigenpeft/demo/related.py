"""Related adapters: sixteen customers of one bank, and new customers whose questions none of them has seen."""

import json
from dataclasses import dataclass
from pathlib import Path

from eigenpeft.demo.assets import banking77
from eigenpeft.errors import EigenPeftError

_FOLDER = Path(__file__).parent / "data" / "related"


@dataclass(frozen=True, kw_only=True)
class NewCustomer:
    """A task that the related adapters were not trained on.

    Attributes:
        name: "new_0" to "new_3".
        intents: What the classes 0, 1, ... mean, as banking77 names them.
        train: Rows `{"text": str, "label": int}`, as many of each intent as can be.
        test: Held-out rows.
    """

    name: str
    intents: tuple[str, ...]
    train: list[dict]
    test: list[dict]


def related_adapters() -> Path:
    """Folder of sixteen LoRA adapters of all-MiniLM-L6-v2 (query and value, r = 8) that are related: customers of one bank.

    Each is a classifier with its head: 8 of 38 intents of banking77, from a seed of its own (`benchmarks/regimes`, the zoo
    "bank_a"). `RECORD.json` in the folder has each adapter's intents, settings and accuracy.

    Examples:
        >>> from eigenpeft import AdapterCollection
        >>> from eigenpeft.demo import related_adapters
        >>> len(AdapterCollection.from_pretrained(related_adapters()))
        16
    """
    return _FOLDER


def new_customer(number: int, *, n_rows: int = 64) -> NewCustomer:
    """A new customer of the same bank: 8 intents that none of the related adapters has seen.

    Args:
        number: 0 to 3; no two of them share an intent.
        n_rows: Training rows, at most; up to 20 of each intent ship.

    Raises:
        EigenPeftError: If there is no such customer, or n_rows is less than 1.

    Examples:
        >>> customer = new_customer(0)
        >>> len(customer.intents), len(customer.train)
        (8, 64)
    """
    record = json.loads((_FOLDER / "RECORD.json").read_text(encoding="utf-8"))
    customers = record["new_customers"]
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(customers):
        raise EigenPeftError(
            f"number={number!r} names no new customer; there are {len(customers)}: 0 to {len(customers) - 1}."
        )
    if not isinstance(n_rows, int) or isinstance(n_rows, bool) or n_rows < 1:
        raise EigenPeftError(f"n_rows={n_rows!r} must be a whole number of at least 1.")
    found = customers[number]
    classes = {label: i for i, label in enumerate(found["labels"])}
    splits = {split: [row for row in banking77(split) if row["label"] in classes] for split in ("train", "test")}
    by_class = [[row["text"] for row in splits["train"] if row["label"] == label] for label in classes]
    most = max(map(len, by_class))
    train = [
        {"text": texts[i], "label": label}
        for i in range(most)
        for label, texts in enumerate(by_class)
        if i < len(texts)
    ]
    test = [{"text": row["text"], "label": classes[row["label"]]} for row in splits["test"]]
    return NewCustomer(name=f"new_{number}", intents=tuple(found["intents"]), train=train[:n_rows], test=test)
