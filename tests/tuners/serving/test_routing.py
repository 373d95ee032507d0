"""Requests routed by an index: 64 members in one batch, and rows that take a weighted few."""

import pytest
import torch

from eigenpeft import AdapterStore
from eigenpeft.errors import SubspaceError
from eigenpeft.indexing import build_index
from eigenpeft.subspace import AdapterMember, Core
from eigenpeft.tuners.serving.bank import AdapterBank
from tests.tuners.conftest import VOCABULARY, logits, random_subspace, tiny_llama

N = 64


def encode(texts):
    """The number of the task that a text names, as a direction, on top of what all texts have in common."""
    found = torch.full((len(texts), N), 0.5)
    for row, text in enumerate(texts):
        found[row, int(text.split()[-1])] += 1.0
    return found


@pytest.fixture(scope="module")
def store():
    """Members of several kinds of core, one per task."""
    subspace = random_subspace(tiny_llama(), ("q_proj", "v_proj"), n_components=6)
    members = {}
    for number in range(N):
        generator = torch.Generator().manual_seed(number)
        kind, shape = (("diagonal", (6,)), ("full", (6, 6)))[number % 2]
        cores = {
            module: Core(kind, {"coefficients_out": torch.randn(*shape, generator=generator)}) for module in subspace
        }
        members[f"task-{number}"] = AdapterMember(cores)
    return AdapterStore(subspace, members=members)


def tokens(rows):
    return torch.randint(3, VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(2))


def alone(store, model, weights, ids):
    """The base model with the weighted sum of members in its weights."""
    with torch.no_grad():
        for module in store.subspace:
            for name, weight in weights.items():
                left, right = store.subspace.reconstruct({module: store[name][module]})[module]
                model.get_submodule(module).weight += weight * left @ right
    return logits(model, ids)


def test_64_texts_are_routed_to_64_members_in_one_batch(store):
    index = build_index(
        {name: [f"rows of {n}"] * 4 for n, name in enumerate(store.names)}, encoder=encode, progress=False
    )
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    routed = index.route([f"a request for {number}" for number in order])
    assert routed == [f"task-{number}" for number in order]
    model, ids, seen = tiny_llama(), tokens(N), []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    bank = AdapterBank.from_store(store)
    with bank.attached(model), bank.use(routed):
        served = logits(model, ids)
    handle.remove()
    assert seen == [N]
    for row in (0, 17, 63):
        expected = alone(store, tiny_llama(), {routed[row]: 1.0}, ids[row : row + 1])
        torch.testing.assert_close(served[row : row + 1], expected, atol=2e-4, rtol=2e-4)


def test_a_row_can_take_a_weighted_few(store):
    rows = [{"task-0": 0.7, "task-1": 0.2, "task-5": 0.1}, "task-3", {"task-2": 0.5, "__base__": 0.5}, "__base__"]
    model, ids = tiny_llama(), tokens(8)
    bank = AdapterBank.from_store(store)
    with bank.attached(model), bank.use(rows, n_repeats=2):
        served = logits(model, ids)
    for row in range(8):
        weights = rows[row // 2]
        weights = {weights: 1.0} if isinstance(weights, str) else weights
        weights = {name: weight for name, weight in weights.items() if name != "__base__"}
        expected = alone(store, tiny_llama(), weights, ids[row : row + 1])
        torch.testing.assert_close(served[row : row + 1], expected, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(served[0], logits(tiny_llama(), ids)[0], atol=1e-3)


def test_the_index_gives_such_rows(store):
    index = build_index(
        {name: [f"rows of {n}"] * 4 for n, name in enumerate(store.names)}, encoder=encode, progress=False
    )
    model, ids = tiny_llama(), tokens(2)
    bank = AdapterBank.from_store(store)
    with bank.attached(model), bank.use(index.route(["of 3", "of 4"], top_k=3, temperature=1.0)):
        served = logits(model, ids)
    assert not torch.allclose(served, logits(tiny_llama(), ids), atol=1e-3)


def test_weights_that_are_no_numbers_and_unknown_members_are_refused(store):
    bank = AdapterBank.from_store(store)
    for rows, message in (
        ([{"task-0": float("nan")}], r"Row 0 has the weights \{'task-0': nan\}"),
        (["task-0", {}], r"Row 1 has the weights \{\}"),
        ([{"task-99": 1.0}], "1 of the members asked for are not in the bank of 64: 'task-99'"),
    ):
        with pytest.raises(SubspaceError, match=message), bank.use(rows):
            pass
