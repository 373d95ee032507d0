"""One model that sees tasks one after another: what earlier tasks used is remembered, and later ones are kept off it."""

from eigenpeft.tuners.sequence.callback import OrthogonalSubspaceCallback
from eigenpeft.tuners.sequence.growing import GrowingClassifier
from eigenpeft.tuners.sequence.history import SubspaceHistory
from eigenpeft.tuners.sequence.inputs import collect_inputs, init_lora_from_inputs

__all__ = [
    "GrowingClassifier",
    "OrthogonalSubspaceCallback",
    "SubspaceHistory",
    "collect_inputs",
    "init_lora_from_inputs",
]
