"""Sizes on the command line."""

import pytest

from eigenpeft.cli.app import number_of_bytes
from eigenpeft.errors import EigenPeftError


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("200000", 200_000), ("64k", 64_000), ("8B", 8)],
)
def test_sizes(text, size):
    assert number_of_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "0", "1.5.2GB", "12 parsecs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(EigenPeftError, match="is not a size in bytes; write it like 500MB"):
        number_of_bytes(text)
