"""LoRA files of other tools, known by their keys, configs and file names: which format it is, and the way out."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# How a key ends: what the format is, and what to do with it. All of them are updates s B A.
_ENDINGS = {
    (".lora_down.weight", ".lora_up.weight"): "kohya's (sd-scripts): lora_down, lora_up and an alpha for each module",
    (".lora_A", ".lora_B"): "loralib's: `lora_A` and `lora_B` without `.weight`, their alpha in the training script",
    (".lora_a", ".lora_b"): "MLX's: `lora_a` and `lora_b`, transposed, with a scale in its config",
    (".lora.down.weight", ".lora.up.weight"): "diffusers' old one: `lora.down` and `lora.up`",
    (".hada_w1_a", ".hada_w2_a"): "LyCORIS' LoHa, whose update is not a single product B A",
    (".lokr_w1", ".lokr_w2"): "LyCORIS' LoKr, whose update is a Kronecker product",
}
_FILES = {
    "pytorch_lora_weights.safetensors": "diffusers' (pytorch_lora_weights.safetensors)",
    "pytorch_lora_weights.bin": "diffusers' (pytorch_lora_weights.bin)",
    "adapters.safetensors": "MLX's (adapters.safetensors)",
    "adapters.npz": "MLX's (adapters.npz)",
}
_WAY_OUT = (
    "name its tensors `base_model.model.<module>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), write an "
    "adapter_config.json with peft_type 'LORA', r and lora_alpha, and pass that folder"
)


def format_of_keys(keys: Collection[str]) -> str | None:
    """What is to be said of a file whose tensors another tool named, as a clause to put behind the adapter's name.

    Args:
        keys: Keys of the file.
    """
    for (first, second), name in _ENDINGS.items():
        if any(key.endswith(first) for key in keys) and any(key.endswith(second) for key in keys):
            return f"is a LoRA in another format, {name}; {_WAY_OUT}"
    return None


def format_of_config(config: Mapping[str, Any]) -> str | None:
    """The same of a config that is not PEFT's.

    Args:
        config: Content of adapter_config.json.
    """
    if "peft_type" not in config and "fine_tune_type" in config:
        return f"is a LoRA in another format, MLX's, whose update is scale * (lora_a lora_b)ᵀ; {_WAY_OUT}"
    return None


def format_of_folder(folder: Path) -> str | None:
    """The same of a folder without an adapter of PEFT.

    Args:
        folder: The folder.
    """
    for name, what in _FILES.items():
        if (folder / name).is_file():
            return f"holds a LoRA in another format, {what}; {_WAY_OUT}"
    if found := sorted(folder.glob("*.gguf")):
        return f"holds {found[0].name!r}, a GGUF file; pass the adapter that it was converted from"
    return None
