"""An adapter folded into its base model, which then needs neither PEFT nor eigenpeft."""

import warnings
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners.host.factor_model import write_names

LOADERS = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": AutoModelForSequenceClassification}
# Merging rounds the weights to their own dtype; more than this share of the largest output is another model.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def merge_into_base(
    adapter: str, *, base: str | None = None, num_labels: int | None = None
) -> tuple[PreTrainedModel, str]:
    """Load a base model and fold an adapter of any PEFT method into its weights.

    A tied pair of input and output embeddings is untied where the adapter changes one of them; it stays tied where both end up
    the same. The merged model's outputs are compared with the adapter's before it is returned.

    Args:
        adapter: Folder or Hub id.
        base: Folder or Hub id of the base model; None takes what the adapter names, at the revision that it names.
        num_labels: Labels of a classifier's head, where they are not the base model's.

    Returns:
        The merged model, and the base model's name.

    Raises:
        AdapterConfigError: If there is no such adapter, it names no base model or task, does not fit the base model, or the
            merged model would have other outputs.

    Examples:
        >>> from eigenpeft.demo import base_model, shipped_adapters
        >>> model, base = merge_into_base(str(shipped_adapters() / "cr"), base=base_model())
        >>> type(model).__name__
        'BertForSequenceClassification'
    """
    config: Any = _reading(
        lambda: PeftConfig.from_pretrained(adapter), f"{adapter!r} is not an adapter that PEFT can read"
    )
    revision = None if base else config.revision
    base = base or config.base_model_name_or_path
    task = str(getattr(config.task_type, "value", config.task_type))
    if base is None or task not in LOADERS:
        raise AdapterConfigError(
            f"{adapter} names the base model {base!r} and the task type {task!r}; merge-base needs a base model (pass "
            f"--model) and one of {', '.join(LOADERS)}."
        )
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if num_labels is not None:
        options |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    named: str = base
    model = _reading(
        lambda: LOADERS[task].from_pretrained(named, dtype="auto", **options),
        f"The base model {base!r} cannot be loaded",
    )
    return _merged(_with_adapter(model, adapter, base), adapter), base


def _reading(load: Any, what: str) -> Any:
    try:
        return load()
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise AdapterConfigError(f"{what}: {' '.join(str(error).split())[:500]}.") from error


def _with_adapter(model: PreTrainedModel, adapter: str, base: str) -> PeftModel:
    what = (
        f"The adapter {adapter!r} does not fit the base model {base!r}. If it was trained on a resized vocabulary or another "
        "number of labels, pass --num-labels, or save the base model with those sizes and pass it as --model"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = _reading(lambda: PeftConfig.from_pretrained(adapter), what)
        _reading(lambda: write_names(config, model), what)
        adapted = _reading(lambda: PeftModel.from_pretrained(model, adapter, config=config), what)
    missing = [str(each.message) for each in caught if "missing adapter keys" in str(each.message)]
    if missing:
        raise AdapterConfigError(f"{what}: {' '.join(missing[0].split())[:500]}")
    for each in caught:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return adapted.eval()


def _merged(adapted: PeftModel, adapter: str) -> PreTrainedModel:
    wanted = _outputs(adapted)
    was_tied = _untie(adapted.get_base_model())
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise AdapterConfigError(f"The adapter {adapter!r} cannot be merged: {error}") from error
    if was_tied:
        _tie_again_if_equal(merged)
    found = _outputs(merged)
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    if not error <= _TOLERANCE.get(merged.dtype, 0.1):
        raise AdapterConfigError(
            f"The adapter {adapter!r} cannot be merged: the merged model's outputs are off by {error:.2g} of the largest one. "
            "What it trained cannot be expressed in the base model's weights (activated LoRA, for one); serve it with PEFT."
        )
    return merged


@torch.no_grad()
def _outputs(model: Any) -> Tensor:
    """Logits of a few tokens, float32."""
    n_tokens = min(8, model.config.get_text_config().vocab_size)
    return model(input_ids=torch.arange(n_tokens, device=model.device)[None]).logits.float()


def _weight_of(layer: Any) -> Tensor | None:
    layer = getattr(layer, "original_module", layer)
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return getattr(layer, "weight", None)


def _untie(model: Any) -> bool:
    """Give the output layer a weight of its own where an adapter changes one of a tied pair; whether that was so."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) for layer in (inputs, outputs)):
        return False
    shared = None if outputs is None else _weight_of(outputs)
    if shared is None or shared is not _weight_of(inputs):
        return False
    layer: Any = getattr(outputs, "original_module", outputs)
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    return True


def _tie_again_if_equal(model: Any) -> None:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(inputs.weight, outputs.weight)
    if equal:
        outputs.weight = inputs.weight
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = equal
