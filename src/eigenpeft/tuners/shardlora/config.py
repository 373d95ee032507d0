"""Configuration of LoRA with shared shards."""

from dataclasses import dataclass, field
from typing import Any, Literal

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.adapter_card import ExplainedConfig
from eigenpeft.tuners.host.registration import peft_type
from eigenpeft.tuners.host.restrictions import check_lora_options
from eigenpeft.tuners.shardlora.sharing import SHARINGS

# Variants whose factors are blocks, have a diagonal between them or a magnitude beside them; and starts and layers that are
# made of one layer's factors alone.
_OF_ONE_LAYER = (
    "use_dora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "ensure_weight_tying",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
)


@dataclass
class ShardLoraConfig(ExplainedConfig):
    """LoRA whose layers share their vectors: a mixture of shards (MoS, arXiv 2410.00938, section 3), or one A or B.

    Layers of one kind and shape (all `q_proj` of a model) have one pool of shards for A and another one for B. With
    `sharing="shards"` each layer's r vectors are `shards_per_vector` shards end to end: r - `private_rank` vectors of shards
    that are drawn from the public ones, by `seed`, for A and B apart, and `private_rank` vectors of shards that no other layer
    has. A pool is as large as the A (or B) of a LoRA of rank `pool_rank` on all these layers, so that this is the number of
    trained values, whatever r is. `sharing="input"` is one A for all layers of a kind and a B per layer, `ΔW_l = B_l A`
    (ASLoRA, arXiv 2412.10135, without its merging of B); `sharing="output"` is the mirror image, `ΔW_l = B A_l`.

    All of `peft.LoraConfig`'s fields apply, on linear layers and Conv1D. It is exactly a LoRA of rank r when merged or exported.

    Raises:
        AdapterConfigError: If a field has a value that the method does not define; when a model is made, if a pool has fewer
            shards than a layer needs, or a weight's width is not a multiple of `shards_per_vector`.

    Examples:
        >>> from eigenpeft.tuners import ShardLoraConfig
        >>> ShardLoraConfig(r=8, pool_rank=2, private_rank=1, shards_per_vector=4, target_modules=["q_proj"]).sharing
        'shards'
    """

    method_name = "ShardLoRA"

    sharing: Literal["shards", "input", "output"] = field(
        default="shards",
        metadata={
            "help": "'shards': A and B of shards from common pools, some private (MoS). 'input': one A for all layers of a "
            "kind, a B per layer (ASLoRA). 'output': one B, an A per layer."
        },
    )
    pool_rank: int = field(
        default=2,
        metadata={
            "help": "Size of the pools of 'shards': as many trained numbers as LoRA of this rank has. The paper's e; without "
            "meaning for the others. 2 is chosen here, as a LoRA of few numbers; it is not tuned."
        },
    )
    private_rank: int = field(
        default=1,
        metadata={
            "help": "Vectors of each layer's own with 'shards', out of `pool_rank` and r: the paper's shard privatization. 1, the "
            "least that has any, is chosen here; it is not tuned."
        },
    )
    shards_per_vector: int = field(
        default=2,
        metadata={
            "help": "Shards that make a vector with 'shards', l in the paper, 2 as in its Figure 2; widths must be multiples of it."
        },
    )
    share: Any = field(
        default="layers",
        metadata={
            "help": "Which layers share: 'layers' for those whose names end alike, or patterns such as ['*.q_proj', '*.k_proj']; "
            "layers of different shapes never do."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the draw of shards, chosen here; the adapter's file has what was drawn."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("SHARDLORA")
        if self.sharing not in SHARINGS:
            raise AdapterConfigError(f"sharing={self.sharing!r} must be one of {', '.join(map(repr, SHARINGS))}.")
        check_lora_options(self, method="ShardLoRA", unsupported=_OF_ONE_LAYER)
        for name, least in (("pool_rank", 1), ("private_rank", 0), ("shards_per_vector", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise AdapterConfigError(f"{name}={value!r} must be a whole number of at least {least}.")
        if self.sharing == "shards" and self.private_rank > min(self.pool_rank, self.r):
            raise AdapterConfigError(
                f"private_rank={self.private_rank} is a part of pool_rank={self.pool_rank} and of r={self.r}; pass at most "
                f"{min(self.pool_rank, self.r)}."
            )
        share = self.share
        if share != "layers" and not (
            isinstance(share, list | tuple) and share and all(isinstance(each, str) for each in share)
        ):
            raise AdapterConfigError(f"share={share!r} must be 'layers' or a list of patterns such as ['*.q_proj'].")
