"""Rounds of seeds and scalars: server, clients and latecomers rebuild the same bits, and these are the mean of the clients'."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eigenpeft import EigenLoraConfig
from eigenpeft.combining.federation import average, load_round, no_steps, round_update, train_steps
from eigenpeft.combining.federation.seeds import COUNT, SEEDS, STEPS
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.zeroth_order import replay
from tests.tuners.conftest import random_subspace, tiny_bert


@pytest.fixture(scope="module")
def subspace():
    return random_subspace(tiny_bert(), ("query",), n_components=6)


@pytest.fixture
def fresh(subspace):
    """Models that all start at the same values."""

    def make(core="full"):
        torch.manual_seed(0)
        config = EigenLoraConfig(subspace=subspace, core=core, r=2, task_type="SEQ_CLS")
        return get_peft_model(tiny_bert(), config)

    return make


def batches(seed, n=3):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(1, 40, (8, 6), generator=generator) for _ in range(n)]
    return [{"input_ids": tokens, "labels": tokens[:, 0] % 3} for tokens in drawn]


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


def train(model, seed, **settings):
    return train_steps(model, batches=batches(seed), learning_rate=0.1, epsilon=1e-2, seed=seed, **settings)


def update(model, steps, number=0, n=1.0):
    return round_update(model, name=f"client-{number}", n_rows=n, rule="seeds", steps=steps)


def test_what_a_client_sends_is_where_it_went(fresh):
    model = fresh()
    before = values(model)
    steps = train(model, 1)
    names = sorted(before)
    again = replay([before[name] for name in names], steps[SEEDS].tolist(), steps[STEPS].tolist())
    assert same(values(model), dict(zip(names, again, strict=True)))
    assert not same(values(model), before)
    assert update(model, steps).n_bytes == 3 * 12 + 8
    assert not any(p.grad is not None for p in model.parameters())


def test_server_clients_and_latecomers_rebuild_the_same_bits(fresh):
    server, clients = fresh(), {number: fresh() for number in range(3)}
    tensors, n_rows = no_steps(server), {0: 10, 1: 30, 2: 60}
    for round_number in range(2):
        updates = []
        for number, model in clients.items():
            load_round(model, tensors=tensors)
            updates.append(update(model, train(model, 10 * round_number + number), number, n_rows[number]))
        averaged = average(updates, expected=tensors, rule="seeds", base=updates[0].base)
        assert averaged.used == {"client-0": 0.1, "client-1": 0.3, "client-2": 0.6}
        tensors = averaged.tensors
        load_round(server, tensors=tensors)
        trained = [values(model) for model in clients.values()]
        for name, value in values(server).items():
            mean = sum(w * each[name].double() for w, each in zip((0.1, 0.3, 0.6), trained, strict=True))
            torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)
    assert averaged.n_bytes == 2 * 3 * 3 * 12 + 8
    latecomer = fresh()
    for model in (*clients.values(), latecomer):
        load_round(model, tensors=tensors)
        assert same(values(model), values(server))
    assert not same(values(server), values(fresh()))


def test_a_pool_of_seeds_bounds_the_list(fresh):
    model = fresh("diagonal")
    tensors = no_steps(model)
    for number in range(4):
        load_round(model, tensors=tensors)
        tensors = average([update(model, train(model, number, pool=5))], expected=tensors, rule="seeds").tensors
    assert len(tensors[SEEDS]) == len(set(tensors[SEEDS].tolist())) <= 5
    load_round(model, tensors=tensors)
    late = fresh("diagonal")
    load_round(late, tensors=tensors)
    assert same(values(model), values(late))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({STEPS: torch.tensor([1.0, float("nan"), 0.0])}, "1 of its 3 tensors holds NaN"),
        ({STEPS: torch.ones(2)}, "it sent 3 seeds and 2 steps"),
        ({SEEDS: torch.ones(3)}, "and must be whole numbers from 0 on; send what"),
        ({SEEDS: torch.tensor([1, 2, -1])}, "and must be whole numbers from 0 on; send what"),
        ({COUNT: torch.tensor([7])}, "it trains 7 values, and the server 171"),
    ],
)
def test_steps_that_cannot_be_used_are_named(fresh, changes, reason):
    model = fresh()
    steps = {SEEDS: torch.tensor([1, 2, 3]), STEPS: torch.ones(3), COUNT: no_steps(model)[COUNT]}
    good, bad = update(model, steps, 1), update(model, steps | changes, 2)
    round_ = average([good, bad], expected=no_steps(model), rule="seeds")
    assert round_.used == {"client-1": 1.0}
    assert reason in round_.left_out["client-2"]
    assert round_.tensors[STEPS].tolist() == [1.0, 1.0, 1.0]


def test_a_model_that_trains_other_values_is_refused(fresh):
    other = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(AdapterConfigError, match=r"trains 355 values, and the steps are of one that trains 171"):
        load_round(other, tensors=no_steps(fresh()))


def test_arguments_that_do_not_fit_are_refused(fresh):
    model = fresh()
    for settings in (
        {"learning_rate": 0.0},
        {"learning_rate": 1.0, "epsilon": -1.0},
        {"learning_rate": 1.0, "pool": 0},
    ):
        with pytest.raises(AdapterConfigError, match="must be above 0, and pool="):
            train_steps(model, batches=[], **settings)
    with pytest.raises(AdapterConfigError, match="steps of train_steps go with rule='seeds'"):
        round_update(model, name="a", rule="seeds")
    with pytest.raises(AdapterConfigError, match="steps of train_steps go with rule='seeds'"):
        round_update(model, name="a", steps=no_steps(model))
    with pytest.raises(AdapterConfigError, match="density is not an option of rule='seeds'"):
        average([update(model, no_steps(model))], expected=no_steps(model), rule="seeds", density=0.1)
    before = values(model)
    with pytest.raises(AdapterConfigError, match="The objective is nan at step 0"):
        train_steps(model, batches=batches(0), learning_rate=0.1, objective=lambda *_: float("nan"))
    assert same(values(model), before)
    with pytest.raises(AdapterConfigError, match="no trained values"):
        no_steps(model.requires_grad_(False))
