"""What the demo found, as frozen plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One method of the comparison.

    Attributes:
        method: Its name.
        n_parameters: Trained numbers, the classification head not counted (it is the same for all).
        accuracies: One per new customer.
        gap: EigenLoRA's accuracy minus this one's, over the test rows of all customers.
        gap_error: Twice the standard error of that gap; EigenLoRA and this method were judged on the same test rows.
        seconds: Mean training time.
    """

    method: str
    n_parameters: int
    accuracies: tuple[float, ...]
    gap: float
    gap_error: float
    seconds: float


@dataclass(frozen=True)
class Checks:
    """Whether the trained, the served and the exported models are one, and what they take on disk.

    Attributes:
        served_difference: Largest |logit difference| between the trained models, each alone, and the bank's mixed batches.
        served_accuracy: Accuracy of the mixed batches, mean over customers.
        export_difference: Largest |logit difference| between a trained model and its plain LoRA in PEFT.
        member_bytes: Bytes of one adapter in the store, its head included.
        subspace_bytes: Bytes of the bases, which all share.
        lora_bytes: Bytes of the plain LoRA's file, its head included.
    """

    served_difference: float
    served_accuracy: float
    export_difference: float
    member_bytes: int
    subspace_bytes: int
    lora_bytes: int


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found, and where it put it.

    Attributes:
        audit: The audit's answers in words, by question.
        rows: The comparison.
        n_customers: New customers.
        n_train: Training rows of each.
        n_test: Held-out rows of all together.
        checks: Store, batch, export.
        out: Folder with subspace, store, plain LoRA and picture.
    """

    audit: Mapping[str, str]
    rows: tuple[Row, ...]
    n_customers: int
    n_train: int
    n_test: int
    checks: Checks
    out: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)
