"""AdapterFedAvg in Flower: real models train as clients of an in-process grid; faults are named, a stopped run goes on."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

pytest.importorskip("flwr", reason="needs the extra federated: make federated")

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from eigenpeft import EigenLoraConfig  # noqa: E402
from eigenpeft.combining.federation import no_steps, round_update, sent_keys, train_steps  # noqa: E402
from eigenpeft.errors import AdapterConfigError, ArtifactError  # noqa: E402
from eigenpeft.federated import AdapterFedAvg, reply, start_from  # noqa: E402
from eigenpeft.federated.messages import to_record  # noqa: E402
from tests.tuners.conftest import random_subspace, tiny_bert  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
LAYER = "base_model.model.bert.encoder.layer.1.attention.self.query"


@pytest.fixture(autouse=True)
def task():
    """Flower's server sets who it is before its app runs; outside of its processes that is done here."""
    before = {name: value for name, value in vars(TaskIdentity).items() if name.startswith("_") and "__" not in name}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


class LocalGrid:
    """Delivers messages to client apps in this process, in the order of the nodes."""

    def __init__(self, app, n_nodes, *, silent=(), errors=()):
        self.app, self.nodes, self.silent, self.errors = app, range(1, n_nodes + 1), silent, errors
        self.contexts = {node: Context(0, node, {"partition-id": node - 1}, RecordDict(), {}) for node in self.nodes}

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, *, timeout=None):
        answers = []
        for message in sorted(messages, key=lambda each: each.metadata.dst_node_id):
            node = message.metadata.dst_node_id
            if node in self.errors:
                answers.append(Message(Error(code=0, reason="out of memory"), reply_to=message))
            elif node not in self.silent:
                answers.append(self.app(message, self.contexts[node]))
        return answers


def lora(rank=2, alpha=4):
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=["query"], task_type="SEQ_CLS")


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (16, 6), generator=generator)
    return {"input_ids": tokens, "labels": tokens[:, 0] % 3}


def client_app(make, seen=None, *, spoil=None):
    """A client that trains a few steps; its partition decides its data."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        model = make(number)
        start_from(message, model=model)
        if seen is not None:
            seen.append((message.content.config_records["config"]["server-round"], number))
        torch.manual_seed(number)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step in range(3):
            loss = model(**batch(100 * number + step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if spoil is not None:
            spoil(number, model)
        base = "another" if spoil is not None and number == 3 else "tiny"
        return reply(
            message,
            model=model,
            name=f"client-{number}",
            n_rows=16 * (number + 1),
            metrics={"loss": float(loss)},
            base=base,
        )

    return app


def settings(**changes):
    return {"fraction_evaluate": 0.0, "min_train_nodes": 2, "base": "tiny", **changes}


def initial(model, rule="exact"):
    update = round_update(model, name="server", rule=rule)
    return to_record(update.tensors), update.scaling


@pytest.mark.parametrize("rule", ["exact", "fedex", "ffa", "fedsa", "fedit", "ties"])
def test_rounds_average_what_clients_trained(rule):
    made = {number: get_peft_model(tiny_bert(), lora()) for number in range(3)}
    arrays, scaling = initial(made[0], rule)
    strategy = AdapterFedAvg(rule=rule, scaling=scaling, **settings())
    result = strategy.start(LocalGrid(client_app(made.__getitem__), 3), arrays, num_rounds=2)
    assert [record["round"] for record in strategy.rounds] == [1, 2]
    assert strategy.rounds[0]["clients"] == pytest.approx({"client-0": 1 / 6, "client-1": 1 / 3, "client-2": 1 / 2})
    averaged = result.arrays.to_torch_state_dict()
    assert set(sent_keys(averaged, rule=rule)) | {key for key in averaged if ".residue_" in key} == set(averaged)
    assert any(not torch.equal(averaged[key], tensor) for key, tensor in arrays.to_torch_state_dict().items())
    assert "loss" in result.train_metrics_clientapp[2]
    assert result.train_metrics_clientapp[2]["adapter-bytes-from-clients"] > 0


def test_one_round_is_the_mean_of_the_updates_of_clients_of_mixed_rank():
    ranks = {0: 1, 1: 2, 2: 4}
    made = {number: get_peft_model(tiny_bert(), lora(rank, alpha=3)) for number, rank in ranks.items()}
    server = get_peft_model(tiny_bert(), lora(8, alpha=8))
    arrays, scaling = initial(server)
    strategy = AdapterFedAvg(scaling=scaling, **settings())
    result = strategy.start(LocalGrid(client_app(made.__getitem__), 3), arrays, num_rounds=1)
    assert strategy.rounds[0]["left_out"] == {}
    tensors = result.arrays.to_torch_state_dict()
    averaged = tensors[f"{LAYER}.lora_B.weight"].double() @ tensors[f"{LAYER}.lora_A.weight"].double() * scaling
    deltas = [made[number].get_submodule(LAYER).get_delta_weight("default").double() for number in ranks]
    expected = deltas[0] / 6 + deltas[1] / 3 + deltas[2] / 2
    torch.testing.assert_close(averaged, expected, rtol=0, atol=1e-6)
    assert expected.norm() > 1e-3


@pytest.mark.parametrize("core", ["full", "diagonal", "low_rank"])
def test_cores_in_one_subspace_travel_without_their_bases(core):
    subspace = random_subspace(tiny_bert(), ("query",), n_components=6)
    config = EigenLoraConfig(subspace=subspace, core=core, r=2, task_type="SEQ_CLS")
    made = {number: get_peft_model(tiny_bert(), config) for number in range(2)}
    arrays, scaling = initial(made[0])
    strategy = AdapterFedAvg(scaling=scaling, **settings(base=None))
    strategy.start(LocalGrid(client_app(made.__getitem__), 2), arrays, num_rounds=1)
    n_core = {"full": 36, "diagonal": 6, "low_rank": 24}[core]
    assert strategy.rounds[0]["bytes_from_clients"] == 2 * 4 * (2 * n_core + 3 * 33)


def test_seeds_and_scalars_travel_in_the_place_of_tensors(tmp_path):
    config = EigenLoraConfig(
        subspace=random_subspace(tiny_bert(), ("query",), n_components=6), core="diagonal", task_type="SEQ_CLS"
    )

    def fresh():
        torch.manual_seed(0)
        return get_peft_model(tiny_bert(), config)

    app = ClientApp()

    @app.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        model = fresh()
        start_from(message, model=model)
        batches = [batch(100 * number + step) for step in range(3)]
        steps = train_steps(model, batches=batches, learning_rate=0.1, epsilon=1e-2, seed=number)
        return reply(message, model=model, name=f"client-{number}", n_rows=10, steps=steps)

    server = fresh()
    first = round_update(server, name="server", rule="seeds", steps=no_steps(server))
    whole = AdapterFedAvg(rule="seeds", **settings(base=first.base))
    result = whole.start(LocalGrid(app, 2), to_record(first.tensors), num_rounds=3)
    assert [record["bytes_from_clients"] for record in whole.rounds] == [2 * (3 * 12 + 8)] * 3
    assert whole.rounds[-1]["left_out"] == {}
    for n_rounds in (1, 3):  # goes on from the list that was saved
        resumed = AdapterFedAvg(rule="seeds", out_dir=tmp_path / "seeds", **settings(base=first.base))
        again = resumed.start(LocalGrid(app, 2), to_record(first.tensors), num_rounds=n_rounds)
    tensors = result.arrays.to_torch_state_dict()
    assert all(torch.equal(again.arrays.to_torch_state_dict()[key], tensor) for key, tensor in tensors.items())


def test_bad_clients_are_named_once_and_the_round_goes_on(caplog):
    made = {number: get_peft_model(tiny_bert(), lora()) for number in range(6)}
    made[2] = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))

    def spoil(number, model):
        if number == 1:
            with torch.no_grad():
                model.get_submodule(LAYER).lora_B["default"].weight[0, 0] = float("nan")

    arrays, scaling = initial(made[0])
    strategy = AdapterFedAvg(scaling=scaling, **settings(min_train_nodes=6))
    grid = LocalGrid(client_app(made.__getitem__, spoil=spoil), 6, errors=(5,), silent=(6,))
    with caplog.at_level(logging.WARNING, logger="eigenpeft"):
        strategy.start(grid, arrays, num_rounds=1)
    (record,) = strategy.rounds
    assert record["clients"] == {"client-0": 1.0}
    assert record["n_silent"] == 1
    assert set(record["left_out"]) == {"client-1", "client-2", "client-3", "node 5"}
    messages = [each.getMessage() for each in caplog.records if each.name.startswith("eigenpeft")]
    assert len(messages) == 1
    for part in (
        "Round 1 goes on with 1 of 6 clients, without ",
        "client-1: 1 of its 6 tensors holds NaN",
        "client-2: it has ",
        "client-3: it was trained on the base 'another'",
        "node 5: it did not answer (out of memory)",
        "1 did not answer in time",
    ):
        assert part in messages[0]


def test_a_round_without_any_client_changes_nothing(tmp_path):
    made = get_peft_model(tiny_bert(), lora())
    arrays, scaling = initial(made)
    strategy = AdapterFedAvg(scaling=scaling, out_dir=tmp_path / "federation", **settings())
    result = strategy.start(LocalGrid(client_app(lambda _: made), 2, silent=(1, 2)), arrays, num_rounds=1)
    before, after = arrays.to_torch_state_dict(), result.arrays.to_torch_state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_stopped_run_goes_on_from_its_last_round(tmp_path):
    def fresh():
        return {number: get_peft_model(tiny_bert(), lora()) for number in range(2)}

    def run(n_rounds, folder, seen, stop=None):
        made = fresh()
        arrays, scaling = initial(made[0])

        def make(number):
            if stop is not None and len(seen) >= stop:
                raise KeyboardInterrupt
            return made[number]

        strategy = AdapterFedAvg(scaling=scaling, out_dir=folder, **settings())
        numbers = []
        result = strategy.start(
            LocalGrid(client_app(make, seen), 2),
            arrays,
            num_rounds=n_rounds,
            evaluate_fn=lambda n, _: numbers.append(n),
        )
        return result.arrays.to_torch_state_dict(), strategy, numbers

    whole, strategy, _ = run(3, tmp_path / "whole", [])
    assert len(strategy.rounds) == 3
    with pytest.raises(KeyboardInterrupt):
        run(3, tmp_path / "stopped", [], stop=3)  # in the second round
    seen = []
    resumed, strategy, numbers = run(3, tmp_path / "stopped", seen)
    assert sorted(seen) == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert numbers == [1, 2, 3]
    assert [record["round"] for record in strategy.rounds] == [1, 2, 3]
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    again, _, _ = run(3, tmp_path / "stopped", seen := [])
    assert not seen
    assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())
    with pytest.raises(ArtifactError, match=r"holds a federation with rule='exact', and this one has rule='ties'"):
        AdapterFedAvg(rule="ties", scaling=2.0, out_dir=tmp_path / "stopped", **settings()).start(None, ArrayRecord())
    state = tmp_path / "stopped" / "federation.json"
    state.write_text(json.dumps({"rounds": 3}))
    with pytest.raises(ArtifactError, match="cannot be read .* name a new folder to start again"):
        AdapterFedAvg(scaling=2.0, out_dir=tmp_path / "stopped", **settings()).start(None, ArrayRecord())


def test_arguments_are_checked_before_the_first_round():
    with pytest.raises(AdapterConfigError, match="rule='fedavg' is unknown"):
        AdapterFedAvg(rule="fedavg")
    with pytest.raises(AdapterConfigError, match=r"scaling=0 must be above 0"):
        AdapterFedAvg(scaling=0)
