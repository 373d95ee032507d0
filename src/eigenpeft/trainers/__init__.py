"""Trainers: LoRe's on TRL's conventions (needs `pip install "eigenpeft[trl]"`), and one without gradients; imported by name."""

from typing import TYPE_CHECKING

from eigenpeft.deprecation import moved_names
from eigenpeft.lazy import lazy_names

if TYPE_CHECKING:
    from eigenpeft.trainers.collator import DataCollatorForUserPreference
    from eigenpeft.trainers.lore_config import LoReConfig
    from eigenpeft.trainers.lore_trainer import LoReTrainer
    from eigenpeft.trainers.zeroth_order import ZerothOrderMixin, ZerothOrderTrainer

__all__ = ["DataCollatorForUserPreference", "LoReConfig", "LoReTrainer", "ZerothOrderMixin", "ZerothOrderTrainer"]

# Only the file that is needed is imported: the one without gradients does without TRL.
_PLACES = {
    "DataCollatorForUserPreference": "eigenpeft.trainers.collator",
    "LoReConfig": "eigenpeft.trainers.lore_config",
    "LoReTrainer": "eigenpeft.trainers.lore_trainer",
    "ZerothOrderMixin": "eigenpeft.trainers.zeroth_order",
    "ZerothOrderTrainer": "eigenpeft.trainers.zeroth_order",
}
__getattr__ = lazy_names(__name__, _PLACES, otherwise=moved_names(__name__, {}))
