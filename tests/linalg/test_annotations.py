"""The shapes in the signatures are executed while the tests run (pyproject: --jaxtyping-packages)."""

import pytest
import torch
from jaxtyping import TypeCheckError

from eigenpeft.linalg.factored import frobenius_norm
from eigenpeft.linalg.preference.users import PaddedPairs


def test_shapes_that_do_not_fit_are_caught_by_the_annotations():
    with pytest.raises(TypeCheckError, match="lora_A"):
        frobenius_norm(torch.zeros(3, 2), torch.zeros(4, 5))


def test_shapes_of_fields_are_caught_too():
    with pytest.raises(TypeCheckError, match="present"):
        PaddedPairs(margins=torch.zeros(2, 5, 3), present=torch.zeros(2, 4, dtype=torch.bool))
