"""Rows and models that commands open: what is wrong with their names."""

import pytest

from eigenpeft.cli.rows import open_tokenizer
from eigenpeft.errors import EigenPeftError


def test_a_base_model_that_is_nowhere_is_named():
    with pytest.raises(
        EigenPeftError, match=r"The base model 'no-such-model' cannot be loaded \(.+\)\. Pass its folder.* as --model"
    ):
        open_tokenizer("no-such-model")
