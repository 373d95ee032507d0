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
        r"TestHotSwapping::.*(different_ranks|rank_padding|conv2d)",
        ("moslora",),
        "changes the rank in place, and with it the mixer's size; refused, or LoRA's own modules are expected",
    ),
    (
        r"TestHotSwapping::test_hotswap_different_peft_types_raises",
        ("eigenlora", "moslora"),
        "its message names LORA",
    ),
    (
        r"test_weighted_combination_of_adapters\[",
        ("eigenlora-mixer", "eigenlora-diagonal"),
        "asserts the rank r of the result, which these cores do not have",
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


def reason_not_applicable(name: str, label: str) -> str | None:
    """Why a failing test says nothing about a method, or None.

    Args:
        name: The test's node id.
        label: "moslora", or "eigenlora-" and the core.
    """
    for pattern, methods, reason in NOT_APPLICABLE:
        if label.startswith(methods) and re.search(pattern, name):
            return reason
    return None
