"""The reference page has every public name."""

from pathlib import Path

import eigenpeft

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"


def test_every_public_name_is_on_the_page():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    names = [name for name in eigenpeft.__all__ if name != "__version__"]
    assert [name for name in names if f"::: eigenpeft.{name}" not in lines] == []
