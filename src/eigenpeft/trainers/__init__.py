"""Trainers: LoRe's on TRL's conventions (needs `pip install "eigenpeft[trl]"`), one without gradients, and callbacks."""

from typing import TYPE_CHECKING

from eigenpeft.deprecation import moved_names
from eigenpeft.lazy import lazy_names

if TYPE_CHECKING:
    from eigenpeft.trainers.collator import DataCollatorForUserPreference
    from eigenpeft.trainers.float32_callback import Float32Callback
    from eigenpeft.trainers.lore_config import LoReConfig
    from eigenpeft.trainers.lore_trainer import LoReTrainer
    from eigenpeft.trainers.policy_sync import PolicySyncCallback
    from eigenpeft.trainers.zeroth_order import ZerothOrderMixin, ZerothOrderTrainer

__all__ = [
    "DataCollatorForUserPreference",
    "Float32Callback",
    "LoReConfig",
    "LoReTrainer",
    "PolicySyncCallback",
    "ZerothOrderMixin",
    "ZerothOrderTrainer",
]

# Only the file that is needed is imported: some of them do without TRL.
_PLACES = {
    "DataCollatorForUserPreference": "eigenpeft.trainers.collator",
    "Float32Callback": "eigenpeft.trainers.float32_callback",
    "LoReConfig": "eigenpeft.trainers.lore_config",
    "LoReTrainer": "eigenpeft.trainers.lore_trainer",
    "PolicySyncCallback": "eigenpeft.trainers.policy_sync",
    "ZerothOrderMixin": "eigenpeft.trainers.zeroth_order",
    "ZerothOrderTrainer": "eigenpeft.trainers.zeroth_order",
}
__getattr__ = lazy_names(__name__, _PLACES, otherwise=moved_names(__name__, {}))
