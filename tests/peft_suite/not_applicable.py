"""Tests of PEFT that look at LoRA's own tensors, so that no other method could pass them, with the reason for each."""

import re

# (pattern of the test's name, methods, reason).
NOT_APPLICABLE: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        r"TestDynamicDispatch::test_training_works",
        ("eigenlora", "moslora"),
        "looks for LoRA's own tensor lora_B.weight by name",
    ),
    (
        r"TestWeightTying::.*target_modules",
        ("eigenlora", "moslora"),
        "compares addresses of LoRA's bare tensors; tests/tuners/test_combining.py checks that ours are shared",
    ),
    (
        r"test_only_params_are_updated\[Embedding \+ transformers Conv1D [23] LoRA",
        ("eigenlora",),
        "its learning rate suits LoRA's embedding, whose gradients do not spread over orthonormal components; "
        "tests/tuners/test_layer_kinds.py checks that every coefficient learns",
    ),
)


def reason_not_applicable(name: str, method: str) -> str | None:
    """Why a failing test says nothing about a method, or None.

    Args:
        name: The test's node id.
        method: "eigenlora" or "moslora".
    """
    for pattern, methods, reason in NOT_APPLICABLE:
        if method in methods and re.search(pattern, name):
            return reason
    return None
