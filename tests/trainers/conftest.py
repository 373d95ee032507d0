"""Users of two kinds who compare tiny texts, and tiny models."""

from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset

from tests.reward.conftest import tiny_bert, tiny_llama, tokenizer

__all__ = ["tokenizer"]

collect_ignore = [] if find_spec("trl") else ["test_lore_trainer.py", "test_recipe.py"]  # need the extra trl

CATS = ["cats", "the cats", "a cats is", "cats is funny", "about cats"]
DOGS = ["dogs", "the dogs", "a dogs is", "dogs is funny", "about dogs"]


def comparisons(users, n_pairs, seed=0, name="user"):
    """Even users like texts about cats, odd ones texts about dogs."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for user in users:
        for _ in range(n_pairs):
            cat, dog = (texts[int(torch.randint(5, (1,), generator=generator))] for texts in (CATS, DOGS))
            chosen, rejected = (cat, dog) if user % 2 == 0 else (dog, cat)
            rows.append({"chosen": chosen, "rejected": rejected, "user_id": f"{name}-{user}"})
    return Dataset.from_list(rows)


@pytest.fixture
def data():
    return comparisons


@pytest.fixture(params=[tiny_llama, tiny_bert], ids=["llama", "bert"])
def make_model(request):
    return request.param


@pytest.fixture
def llama():
    return tiny_llama
