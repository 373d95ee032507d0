"""Parameter groups with learning rates of their own for mixers and coefficients, and what LoRA-FA can take."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from eigenpeft.errors import AdapterConfigError

_OUTPUT_SIDE = re.compile(r"\.lora_(embedding_)?B\.")
# The names of our own parameters; those of the base model and of plain LoRA are none of our business.
_MIXED = re.compile(r"\.lora_(embedding_)?B\.[^.]+\.(factor|mixer)$")
_WEIGHTS = re.compile(r"\.lora_(embedding_)?B\.[^.]+\.mixing\.weights$")
_SHARDS = re.compile(r"\.lora_[AB]\.[^.]+\.(public|private)$")
_COEFFICIENTS = re.compile(r"\.lora_(embedding_)?[AB]\.[^.]+\.coefficients$")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    mixer_learning_rate: float | None = None,
    coefficients_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: MoSLoRA's mixers, EigenLoRA's coefficients, and whatever else is trained.

    Coefficients multiply components of unit norm, so that they bear, and mostly need, a larger rate than LoRA's factors;
    MoSLoRA (arXiv 2406.11909, equation 3: `ΔW = B W A`) trains its mixer W at the common rate.

    Args:
        model: Model with adapters; only parameters that require gradients are taken.
        learning_rate: Learning rate of everything else (factors, heads, biases).
        mixer_learning_rate: Learning rate of MoSLoRA's mixers; None takes `learning_rate`.
        coefficients_learning_rate: Learning rate of EigenLoRA's coefficients and the weights of its mixtures; None takes
            `learning_rate`.

    Returns:
        Groups with "params", "lr" and "name" ("mixer", "coefficients", "other"); empty ones are left out.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from eigenpeft import MosLoraConfig
        >>> from eigenpeft.tuners.parameter_groups import parameter_groups
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), MosLoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-4, mixer_learning_rate=1e-3))
        >>> {group["name"]: (group["lr"], len(group["params"])) for group in optimizer.param_groups}
        {'mixer': (0.001, 1), 'other': (0.0001, 2)}
    """
    rates = {
        "mixer": learning_rate if mixer_learning_rate is None else mixer_learning_rate,
        "coefficients": learning_rate if coefficients_learning_rate is None else coefficients_learning_rate,
        "other": learning_rate,
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ending = "coefficients" if _WEIGHTS.search(name) else name.rpartition(".")[2]
            members[ending if ending in rates else "other"].append(parameter)
    return [
        {"name": name, "params": parameters, "lr": rates[name]} for name, parameters in members.items() if parameters
    ]


def check_lorafa_pairs(names: Sequence[str]) -> None:
    """Refuse parameters that PEFT's LoRA-FA optimizer would pair wrongly: it takes LoRA's tensors two by two, A and B.

    EigenLoRA's core "low_rank" has such pairs: A Aᵀ = C_in C_inᵀ, the components being orthonormal, so that LoRA-FA (arXiv
    2308.03303: A is frozen, the gradient of B is `∂L/∂B (A Aᵀ)⁻¹ / s²`) does within the subspace what it does for LoRA.

    Args:
        names: Names of the parameters, as the optimizer gets them.

    Raises:
        AdapterConfigError: If there is a mixer, a shared shard, or an output side without an input side.
    """
    known = set(names)
    for name in names:
        if _MIXED.search(name):
            raise AdapterConfigError(
                f"LoRA-FA cannot train {name!r}: it pairs A with B, and MoSLoRA has a mixer between them. Use "
                "eigenpeft.tuners.parameter_groups with torch.optim.AdamW, or LoraConfig."
            )
        if _SHARDS.search(name):
            raise AdapterConfigError(
                f"LoRA-FA cannot train {name!r}: it pairs A with B layer by layer, and ShardLoRA's layers share theirs. Use "
                "torch.optim.AdamW, or LoraConfig."
            )
        ours = _COEFFICIENTS.search(name) or _WEIGHTS.search(name)
        if ours and _OUTPUT_SIDE.sub(r".lora_\1A.", name) not in known:
            raise AdapterConfigError(
                f"LoRA-FA cannot train {name!r}: it pairs A with B, and this core's input side is frozen already, with "
                "orthonormal rows, so that there is nothing to project. Use torch.optim.AdamW, or core='low_rank'."
            )
