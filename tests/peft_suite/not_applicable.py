"""Tests of PEFT that look at LoRA's own tensors, so that no other method could pass them, with the reason for each."""

import re

# (pattern of the test's name, methods, reason).
NOT_APPLICABLE: tuple[tuple[str, tuple[str, ...], str], ...] = ()


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
