"""An adapter as a GGUF file for llama.cpp: one plain LoRA whose tensors are named and laid out as the base model's are."""

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from eigenpeft.artifacts.atomic import atomic_file, check_file
from eigenpeft.artifacts.reading import read_start
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.subspace import AdapterStore
from eigenpeft.tuners.files.export import read_adapter
from eigenpeft.tuners.files.lora_files import LoraUpdate, with_one_rank_and_alpha

try:
    import gguf  # pyright: ignore[reportMissingImports] (an extra)
except ImportError:
    gguf: Any = None

# Architectures of transformers that llama.cpp runs as "llama", with the rows of q and k in the order that `permuted` makes.
LLAMA_FAMILY = ("llama", "mistral")
_MAGIC = b"GGUF"


def export_gguf(
    model_or_store: PeftModel | AdapterStore,
    out_file: str | Path,
    *,
    adapter_name: str = "default",
    rank: int | None = None,
    base_model: str | Path | PretrainedConfig | None = None,
    overwrite: bool = False,
) -> None:
    """Write one adapter as a GGUF file for llama.cpp (`llama-server --lora FILE`): one LoRA of one rank and one alpha.

    For base models of the Llama family. The rows of B on q and k are reordered as llama.cpp reorders the base's
    (`permuted`), and an embedding's A is transposed. Factors are written in float32; no matrix of the size of a weight is
    formed. Needs the package `gguf` (`pip install 'eigenpeft[gguf]'`).

    Args:
        model_or_store: A PEFT model with the adapter, or a store with it as a member.
        out_file: File to write, whole or not at all.
        adapter_name: Which adapter.
        rank: Truncate each update to this rank, in the least Frobenius error; None keeps it exact.
        base_model: Configuration of the base model, or the folder or Hub id to read it from; None takes the PEFT model's
            own, or the base model that the store names.
        overwrite: Whether to replace a GGUF file that is there.

    Raises:
        AdapterConfigError: If the package gguf is missing, there is no such adapter, the base model's configuration cannot be
            read, is of another architecture or has other sizes, or the adapter has what the format cannot hold: heads, biases,
            experts, convolutions, numbers that are not finite, or an update of an output layer that is tied to the embeddings.
        ArtifactError: If something is in the way that is not replaced, or the file cannot be written; or if a member cannot be
            read.
        KeyError: If the store has no member `adapter_name`.
        OSError: If the file that is there cannot be read.

    Examples:
        Not run with the tests, because the package gguf is needed:

        >>> from eigenpeft import AdapterStore
        >>> from eigenpeft.tuners import export_gguf
        >>> store = AdapterStore.from_pretrained("my-store")  # doctest: +SKIP
        >>> export_gguf(store, "legal.gguf", adapter_name="legal", rank=16)  # doctest: +SKIP
    """
    if gguf is None:
        raise AdapterConfigError(
            "Writing GGUF needs the package gguf, which is not installed: pip install 'eigenpeft[gguf]'."
        )
    out_file = Path(out_file)
    _check_place(out_file, overwrite)
    updates, fields, others = read_adapter(model_or_store, adapter_name, rank=rank)
    config = _base_config(model_or_store, base_model, named=fields.get("base_model_name_or_path"))
    # PEFT saves the frozen weight of an adapted embedding too; the base model's own file has it.
    others = [key for key in others if not key.endswith(".base_layer.weight")]
    if others:
        raise AdapterConfigError(
            f"{adapter_name!r} trained {len(others)} tensors in full, such as {others[0]!r}, which a LoRA in GGUF "
            "cannot hold. Merge the adapter into the base model and convert that, or train it without them."
        )
    if tokens := fields.get("alora_invocation_tokens"):
        raise AdapterConfigError(
            f"{adapter_name!r} acts from its invocation tokens {tokens} on, and the file would act on every token; serve it "
            "with PEFT or vLLM as an activated LoRA."
        )
    biased = [update.target for update in updates if update.bias is not None]
    if biased:
        raise AdapterConfigError(
            f"{adapter_name!r} has a trained bias (lora_bias) on {biased[0]!r}, which a LoRA in GGUF cannot hold; merge it."
        )
    updates = with_one_rank_and_alpha(updates)
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for update in updates:
        name, pair = _renamed(update, names, config)
        tensors[name] = pair
    # llama.cpp takes an alpha of 0 for "none given": fold that scaling into B.
    scaling = updates[0].scaling
    if scaling == 0.0:
        tensors, scaling = {name: (a, torch.zeros_like(b)) for name, (a, b) in tensors.items()}, 1.0
    lora_alpha = scaling * updates[0].rank
    base = fields.get("base_model_name_or_path")
    _write(out_file, tensors, lora_alpha=lora_alpha, name=adapter_name, base=base, overwrite=overwrite)


def permuted(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of a q or k weight, or of its B, in llama.cpp's order: the two halves of each head interleaved.

    transformers rotates feature i of a head of d together with feature i + d/2; llama.cpp's "llama" rotates neighbours
    2i and 2i + 1 (RoFormer, arXiv 2104.09864, equation 15). Its converter moves row `h d + s d/2 + i` to
    `h d + 2i + s`, for s in 0, 1.

    Args:
        rows: (n_heads * d, n) with d even.
        n_heads: Heads: those of the queries for q, of the keys for k.

    Returns:
        (n_heads * d, n).

    Examples:
        >>> import torch
        >>> permuted(torch.arange(4)[:, None], 1).flatten().tolist()
        [0, 2, 1, 3]
    """
    return rows.view(n_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _check_place(out_file: Path, overwrite: bool) -> None:
    check_file(out_file, overwrite=overwrite)
    if out_file.is_file() and read_start(out_file, limit=len(_MAGIC)) != _MAGIC:
        raise ArtifactError(f"{str(out_file)!r} is not a GGUF file and is not replaced; choose another name.")


def _base_config(
    model_or_store: Any, base_model: str | Path | PretrainedConfig | None, *, named: Any
) -> PretrainedConfig:
    """The configuration of the base model, of an architecture whose layout is known."""
    config: Any = base_model
    if base_model is None and isinstance(model_or_store, PeftModel):
        config = model_or_store.get_base_model().config
    elif not isinstance(base_model, PretrainedConfig):
        where = base_model or named
        try:
            config = AutoConfig.from_pretrained(where)
        except (OSError, ValueError, TypeError, HFValidationError) as error:
            raise AdapterConfigError(
                f"The configuration of the base model {str(where)!r} cannot be read ({str(error).strip().splitlines()[0]}); "
                "pass base_model (--model), the folder or Hub id of the base model."
            ) from error
    kind = getattr(config, "model_type", None)
    if kind not in LLAMA_FAMILY:
        raise AdapterConfigError(
            f"The base model is of the architecture {kind!r}; GGUF is written for {' and '.join(map(repr, LLAMA_FAMILY))}. "
            "Export a plain LoRA folder and use llama.cpp's own convert_lora_to_gguf.py."
        )
    return config


def _renamed(update: LoraUpdate, names: Any, config: Any) -> tuple[str, tuple[Tensor, Tensor]]:
    """Name of the base's tensor, and (A, B) as llama.cpp keeps them beside it."""
    found = names.get_type_and_name(update.target)
    if found is None or update.kind != "module" or update.lora_A.ndim != 2:
        raise AdapterConfigError(
            f"{update.target!r} has no place in a GGUF file of the architecture {config.model_type!r} with "
            f"{config.num_hidden_layers} layers. Export a plain LoRA folder instead, or check base_model (--model)."
        )
    tensor, name = found
    lora_A, lora_B = update.lora_A.detach().float().cpu(), update.lora_B.detach().float().cpu()
    kinds = gguf.MODEL_TENSOR
    if tensor == kinds.OUTPUT and config.tie_word_embeddings:
        raise AdapterConfigError(
            f"{update.target!r} is tied to the embeddings of this base model, and GGUF has no tensor of its own for it. "
            "Merge the adapter into an untied model, or leave that layer out of target_modules."
        )
    shape, wanted = (len(lora_B), lora_A.shape[1]), _shapes(config)[tensor]
    if shape != wanted:
        raise AdapterConfigError(
            f"{update.target!r} is {shape} (out_features, in_features) in the adapter and {wanted} in the base model; pass the "
            "base model that the adapter was trained on."
        )
    if not (lora_A.isfinite().all() and lora_B.isfinite().all()):
        raise AdapterConfigError(f"{update.target!r} has factors that are not finite numbers; train the adapter again.")
    if tensor in (kinds.ATTN_Q, kinds.ATTN_K):
        is_q = tensor == kinds.ATTN_Q
        lora_B = permuted(lora_B, config.num_attention_heads if is_q else config.num_key_value_heads)
    elif tensor == kinds.TOKEN_EMBD:
        lora_A = lora_A.mT  # llama.cpp looks tokens up in its rows
    return f"{name}.weight", (lora_A.contiguous(), lora_B.contiguous())


def _shapes(config: Any) -> dict[Any, tuple[int, int]]:
    """(out_features, in_features) of the base's tensors; (embedding size, tokens) of the embeddings."""
    kinds, width, inner = gguf.MODEL_TENSOR, config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    return {
        kinds.TOKEN_EMBD: (width, config.vocab_size),
        kinds.OUTPUT: (config.vocab_size, width),
        kinds.ATTN_Q: (queries, width),
        kinds.ATTN_K: (keys, width),
        kinds.ATTN_V: (keys, width),
        kinds.ATTN_OUT: (width, queries),
        kinds.FFN_GATE: (inner, width),
        kinds.FFN_UP: (inner, width),
        kinds.FFN_DOWN: (width, inner),
    }


def _write(
    out_file: Path,
    tensors: dict[str, tuple[Tensor, Tensor]],
    *,
    lora_alpha: float,
    name: str,
    base: Any,
    overwrite: bool,
) -> None:
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it reports each step as information
    with atomic_file(out_file, overwrite=overwrite) as scratch:
        writer = gguf.GGUFWriter(scratch, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora_alpha)
        writer.add_name(name)
        if base:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, str(base))
        for tensor, (lora_A, lora_B) in tensors.items():
            writer.add_tensor(f"{tensor}.lora_a", lora_A.numpy())
            writer.add_tensor(f"{tensor}.lora_b", lora_B.numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
