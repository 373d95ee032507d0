"""A download cache of the Hub, made by hand."""

import pytest

from tests.factories import random_factors, write_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    """Adds an adapter to a cache as huggingface_hub lays it out, one repository at one revision; returns the cache."""
    cache = tmp_path / "hub"

    def add(repo, *, revision="main", commit=COMMIT):
        folder = cache / f"models--{repo.replace('/', '--')}"
        write_adapter(folder / "snapshots" / commit, random_factors())
        (folder / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        return cache

    return add
