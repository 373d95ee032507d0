"""Keys of adapter state dicts: which module and factor a tensor belongs to; and the order of names."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

_PREFIX = "base_model.model."
# Wrappers of torch.compile, FSDP and activation checkpointing that end up in the keys of hand-made checkpoints.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?")
# Trained with the factors but no part of a matrix B A: biases, embedding factors unless they are asked for; VeLoRA's is
# needed in training only.
_ASIDE = re.compile(r"\.lora_(?:B(?:\.[^.]+)?\.bias|embedding_[AB](?:\.[^.]+)?|velora_\w+(?:\..+)?)$")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<word>\w+)")
# Tensors by which PEFT's variants, its relatives and other tools are known, wherever they stand.
_VARIANTS = frozenset(
    {"A", "B", "AB", "E", "ranknum", "diag", "magnitude_vector", "monteclora_sampler", "down", "up", "mid", "a", "b"}
)


@dataclass(frozen=True)
class ParsedKey:
    """What one tensor of an adapter file is.

    Attributes:
        kind: "factor" for lora_A and lora_B; "aside" for tensors that are not part of a weight update B A (heads, biases,
            base weights, and embedding factors unless they are asked for); "foreign" for LoRA tensors of a method other
            than plain LoRA; "doubtful" for a name with `lora_` that is foreign if its module is adapted, and else aside.
        module: Canonical name of the module that a factor, a foreign or a doubtful tensor belongs to.
        factor: "A" or "B", for factors.
        adapter: Name of the adapter inside the key (`.lora_A.default.weight`), if it has one.
    """

    kind: Literal["factor", "aside", "foreign", "doubtful"]
    module: str = ""
    factor: str = ""
    adapter: str | None = None


# Adapters of one collection have the same keys, so that parsing 500 of them costs little more than one.
@lru_cache(maxsize=1 << 16)
def parse_key(key: str, *, embeddings: bool = False) -> ParsedKey:
    """Read the key of a tensor as PEFT writes it, with or without the adapter's name and the model's prefix.

    Args:
        key: For example "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight".
        embeddings: Whether the factors of embeddings are factors here.

    Example:
        >>> parse_key("base_model.model.h.0.attn.c_attn.lora_A.weight").module
        'h.0.attn.c_attn'
    """
    if match := _FACTOR.fullmatch(key) or (_EMBEDDING_FACTOR.fullmatch(key) if embeddings else None):
        return ParsedKey("factor", canonical_module(match["module"]), match["factor"], match["adapter"])
    if (match := _LORA.match(key)) and not _ASIDE.search(key):
        # A head may be called "lora_head": such a tensor is only of another method where it belongs to an adapted module.
        kind = "foreign" if match["word"] in _VARIANTS else "doubtful"
        return ParsedKey(kind, canonical_module(match["module"]))
    return ParsedKey("aside")


def canonical_module(name: str) -> str:
    """A module's name in the base model: no "base_model.model." in front, no wrappers of torch inside.

    Args:
        name: Key without its `.lora_A.weight` ending.
    """
    name = without_wrappers(name)
    # A PeftModel inside another one, or a wrapper around it, puts its own prefix in front of PEFT's: only what follows the
    # last one is the base model's own name. DistributedDataParallel's "module." is only recognisable beside it.
    _, prefix, own = f".{name}".rpartition(f".{_PREFIX}")
    return own.removeprefix("module.") if prefix else name


def without_wrappers(name: str) -> str:
    """A name or key without the words that torch.compile, FSDP and activation checkpointing put into it.

    Args:
        name: Name of a module, or key of a tensor.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@lru_cache(maxsize=1 << 16)
def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key that puts "layer.2" before "layer.10".

    Args:
        name: Module or folder name.
    """
    parts = re.split(r"([0-9]+)", name)  # text and numbers take turns
    # Numbers by their length and then as text: a name may have more digits than Python makes a number of. Text has length
    # -1, so that it comes before the numbers.
    keys: list[tuple[int, str]] = []
    for place, part in enumerate(parts):
        digits = part.lstrip("0")
        keys += [(len(digits), digits), (-1, part)] if place % 2 else [(-1, part)]
    return tuple(keys)
