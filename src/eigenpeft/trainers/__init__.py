"""Trainers on TRL's conventions; need `pip install "eigenpeft[trl]"` and are imported only by name."""

from eigenpeft.trainers.collator import DataCollatorForUserPreference
from eigenpeft.trainers.lore_config import LoReConfig
from eigenpeft.trainers.lore_trainer import LoReTrainer

__all__ = ["DataCollatorForUserPreference", "LoReConfig", "LoReTrainer"]
