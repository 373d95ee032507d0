"""Damaged and hostile files: whatever the bytes are, the collection opens or says what is wrong, and nothing else."""

import random

import pytest

from eigenpeft.collection import AdapterCollection
from eigenpeft.errors import CollectionError
from tests.factories import random_factors, write_adapter


def damaged(content, rng):
    """The bytes with one to eight of them changed, removed or inserted."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place, kind = rng.randrange(len(content)), rng.random()
        if kind < 0.6:
            content[place] = rng.randrange(256)
        elif kind < 0.8:
            del content[place : place + rng.randrange(1, 9)]
        else:
            content[place:place] = rng.randbytes(rng.randrange(1, 9))
    return bytes(content)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_damage_is_an_error_of_the_collection_or_none(tmp_path, name):
    write_adapter(tmp_path, random_factors(modules={"a.q": (4, 6)}, rank=2), as_bin=name.endswith(".bin"))
    rng, original, n_refused = random.Random(0), (tmp_path / name).read_bytes(), 0
    for _ in range(100):
        (tmp_path / name).write_bytes(damaged(original, rng))
        try:
            AdapterCollection.from_pretrained(tmp_path).diagnose(progress=False)
        except CollectionError:
            n_refused += 1
    assert n_refused > 20
