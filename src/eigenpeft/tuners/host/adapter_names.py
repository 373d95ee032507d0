"""Which tensors of a model belong to which adapter, whatever the adapters are called."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer
from torch import Tensor

# In a key, the part behind one of these is the adapter's name.
_CONTAINERS = frozenset(
    (
        *LoraLayer.adapter_layer_names,
        "lora_diag",
        "lora_velora_embed",
        "lora_monteclora_sampler",
        "modules_to_save",
        "trainable_tokens_delta",
        "trainable_tokens_original",
    )
)
Value = TypeVar("Value", bound=Tensor)


def owner(key: str) -> str | None:
    """The adapter that a tensor belongs to, or None where LoRA's layers and the heads beside them do not say.

    Args:
        key: Key of the model's state dict.

    Example:
        >>> owner("base_model.model.layers.0.q_proj.lora_B.default.mixer")
        'default'
    """
    parts = key.split(".")
    place = next((i for i, part in enumerate(parts) if part in _CONTAINERS), len(parts))
    return parts[place + 1] if place + 1 < len(parts) else None


def without_adapter_name(key: str, adapter_name: str) -> str:
    """Key of a tensor in the adapter's own file: "lora_A.weight" of "lora_A.default.weight".

    PEFT also strips an adapter's name from the keys of its head when the head has that name ("score", "weight").

    Args:
        key: Key of the model's state dict, or of a head that has left the adapter's name out already.
        adapter_name: The adapter.
    """
    if owner(key) != adapter_name:
        return key
    parts = key.split(".")
    place = next(i for i, part in enumerate(parts) if part in _CONTAINERS)
    return ".".join(parts[: place + 1] + parts[place + 2 :])


def own_tensors(
    state_dict: Mapping[str, Value],
    unwanted_adapter_names: Sequence[str],
    *,
    by_word: Callable[[Mapping[str, Value], Sequence[str]], Mapping[str, Value]],
) -> dict[str, Value]:
    """A state dict without the tensors of other adapters.

    PEFT leaves out each key that has an unwanted name anywhere between its dots. An adapter called "0", "q_proj" or
    "mixer" so takes the tensors of all others away when these are saved. Here the name counts where the adapter's name stands.
    A model that has none of our adapters, and keys of other methods' layers, are left to PEFT's rule.

    Args:
        state_dict: State dict of the model.
        unwanted_adapter_names: The other adapters.
        by_word: PEFT's own rule.
    """
    unwanted = set(unwanted_adapter_names)
    kept_by_word = by_word(state_dict, unwanted_adapter_names)
    if not any(_is_ours(key) for key in state_dict):
        return dict(kept_by_word)
    return {key: value for key, value in state_dict.items() if _is_kept(key, unwanted, by_word=key in kept_by_word)}


def _is_ours(key: str) -> bool:
    # LoRA's own factors are bare, or have a weight and perhaps a bias.
    container, _, rest = key.rpartition(".lora_")[2].partition(".")
    part = rest.partition(".")[2]
    return container in ("A", "B", "embedding_A", "embedding_B") and part not in ("", "weight", "bias")


def _is_kept(key: str, unwanted: set[str], *, by_word: bool) -> bool:
    of = owner(key)
    if of is not None:
        return of not in unwanted
    return by_word or not any(part.partition("_")[0] in _METHODS for part in key.split("."))


_METHODS = frozenset(prefix.partition("_")[0] for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix)
