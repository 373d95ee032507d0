"""LoRA whose layers share their vectors: mixtures of shards, or one common A or B."""

from eigenpeft.tuners.shardlora.config import ShardLoraConfig
from eigenpeft.tuners.shardlora.model import ShardLoraModel

__all__ = ["ShardLoraConfig", "ShardLoraModel"]
