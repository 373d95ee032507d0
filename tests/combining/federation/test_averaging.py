"""Averages of a round against dense updates in float64, and clients that cannot be used."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eigenpeft import EigenLoraConfig, MosLoraConfig
from eigenpeft.combining.federation import (
    AVERAGING,
    ClientUpdate,
    average,
    fit_rank,
    load_round,
    round_update,
    sent_keys,
)
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.merging.registry import RULES
from tests.tuners.conftest import random_subspace, tiny_bert

A, B, HEAD = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", "base_model.model.head.weight"


def client(seed, *, rank=3, n=1.0, scaling=2.0, **changes):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        A: torch.randn(rank, 9, generator=generator),
        B: torch.randn(12, rank, generator=generator),
        HEAD: torch.randn(4, 12, generator=generator),
    }
    return ClientUpdate(f"client-{seed}", tensors, n_rows=n, scaling=scaling, **{"base": "base", **changes})


def update(tensors, scaling):
    return scaling * tensors[B].double() @ tensors[A].double()


def mean(clients):
    total = sum(each.n_rows for each in clients)
    return sum(each.n_rows / total * update(each.tensors, each.scaling) for each in clients)


def test_exact_is_the_weighted_mean_of_updates_of_mixed_ranks_and_scalings():
    clients = [client(1, rank=2, n=30), client(2, rank=3, n=10, scaling=0.5), client(3, rank=1, n=60)]
    round_ = average(clients, expected=client(0).tensors, rank=6, scaling=4.0)
    torch.testing.assert_close(update(round_.tensors, 4.0), mean(clients), rtol=0, atol=1e-5)
    assert round_.used == pytest.approx({"client-1": 0.3, "client-2": 0.1, "client-3": 0.6})
    assert round_.relative_errors["base_model.model.q"] < 1e-6
    head = sum(w * each.tensors[HEAD].double() for w, each in zip((0.3, 0.1, 0.6), clients, strict=True))
    torch.testing.assert_close(round_.tensors[HEAD].double(), head, rtol=0, atol=1e-6)
    assert round_.bytes_received == sum(4 * (r * 21 + 48) for r in (2, 3, 1))
    assert round_.n_bytes == 4 * (6 * 21 + 48)


def test_exact_is_truncated_best_and_says_what_it_lost():
    clients = [client(seed) for seed in range(1, 5)]
    round_ = average(clients, expected=client(0).tensors, scaling=2.0)
    U, S, Vh = torch.linalg.svd(mean(clients))
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    torch.testing.assert_close(update(round_.tensors, 2.0), best, rtol=0, atol=1e-5)
    assert round_.relative_errors["base_model.model.q"] == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-5)


def test_the_mean_of_factors_is_another_update():
    clients = [client(seed) for seed in (1, 2)]
    round_ = average(clients, expected=client(0).tensors, rule="fedit", scaling=2.0)
    assert torch.equal(
        round_.tensors[A], (clients[0].tensors[A].double() / 2 + clients[1].tensors[A].double() / 2).float()
    )
    off = torch.linalg.norm(update(round_.tensors, 2.0) - mean(clients)) / torch.linalg.norm(mean(clients))
    assert off > 0.3
    assert round_.relative_errors["base_model.model.q"] == pytest.approx(float(off), rel=1e-4)


def test_fedex_adds_what_the_factors_lack_over_several_rounds():
    expected, base = dict(client(0).tensors), torch.zeros(12, 9, dtype=torch.float64)
    for round_number in range(3):
        clients = [client(10 * round_number + seed, n=seed) for seed in (1, 2, 3)]
        # A client's weight is W_0 + all residuals so far + its own update.
        wanted = base + mean(clients)
        round_ = average(clients, expected=expected, rule="fedex", scaling=2.0)
        base = (
            round_.tensors["base_model.model.q.residue_B"].double()
            @ round_.tensors["base_model.model.q.residue_A"].double()
        )
        torch.testing.assert_close(base + update(round_.tensors, 2.0), wanted, rtol=0, atol=1e-4)
        expected = dict(round_.tensors)
    assert len(expected["base_model.model.q.residue_A"]) <= 9


def test_fedsa_and_ffa_send_one_side():
    keys = list(client(0).tensors)
    assert sent_keys(keys, rule="fedsa") == [A]
    assert sent_keys(keys, rule="ffa") == [B, HEAD]
    clients = [client(seed, n=seed) for seed in (1, 3)]
    for rule in ("fedsa", "ffa"):
        sent = [
            ClientUpdate(
                each.name,
                {key: each.tensors[key] for key in sent_keys(keys, rule=rule)},
                n_rows=each.n_rows,
                scaling=2.0,
            )
            for each in clients
        ]
        round_ = average(sent, expected=sent[0].tensors, rule=rule, scaling=2.0)
        for key in round_.tensors:
            expected = 0.25 * clients[0].tensors[key].double() + 0.75 * clients[1].tensors[key].double()
            torch.testing.assert_close(round_.tensors[key].double(), expected, rtol=0, atol=1e-6)


def test_ffa_is_exact_when_a_is_common():
    clients = [client(seed, n=seed) for seed in (1, 2)]
    common = client(0).tensors[A]
    for each in clients:
        each.tensors[A] = common
    sent = [ClientUpdate(c.name, {B: c.tensors[B]}, n_rows=c.n_rows, scaling=c.scaling) for c in clients]
    averaged = average(sent, expected={B: client(0).tensors[B]}, rule="ffa", scaling=2.0).tensors[B]
    torch.testing.assert_close(update({A: common, B: averaged}, 2.0), mean(clients), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", [name for name, row in RULES.items() if not row.needs and name != "tsv"])
def test_clients_that_agree_keep_their_update_up_to_the_rule(rule):
    """All rules take the same clients; the sums among them leave an update that all share as it is."""
    one = client(1)
    clients = [ClientUpdate(f"c{i}", one.tensors, n_rows=1.0, scaling=2.0) for i in range(4)]
    options = {"density": 1.0} if "density" in RULES[rule].options else {}
    averaged = average(clients, expected=one.tensors, rule=rule, scaling=2.0, **options).tensors
    alike = torch.nn.functional.cosine_similarity(
        update(averaged, 2.0).flatten(), update(one.tensors, 2.0).flatten(), dim=0
    )
    assert alike > 0.75
    if rule not in ("pico", "iso_c", "iso_cts", "boosting", "compress"):
        torch.testing.assert_close(update(averaged, 2.0), update(one.tensors, 2.0), rtol=0.01, atol=0.05)


@pytest.mark.parametrize(
    ("change", "rule", "reason"),
    [
        ({"rank": 2}, "fedit", r"has the shape \(2, 9\), and \(3, 9\) is expected; this rule needs equal ranks"),
        ({"missing": A}, "exact", r"it lacks base_model\.model\.q\.lora_A\.weight"),
        ({"extra": "base_model.model.k.lora_A.weight"}, "exact", "which the server does not know"),
        ({"nan": B}, "exact", "1 of its 3 tensors holds NaN or infinite numbers"),
        ({"base": "another/base"}, "exact", "trained on the base 'another/base', and this federation trains on 'base'"),
        ({"n": 0.0}, "exact", "number of rows is 0.0"),
        ({"n": float("nan")}, "exact", "number of rows is nan"),
        ({"scaling": -1.0}, "exact", r"scaling is -1\.0"),
        ({"odd": B}, "exact", "have different ranks"),
        ({"head": True}, "exact", r"head\.weight has the shape \(5, 12\)"),
    ],
)
def test_a_client_that_cannot_be_used_is_named_and_the_round_goes_on(change, rule, reason):
    clients = [client(1), client(2)]
    names = {key: change[key] for key in ("rank", "base", "n", "scaling") if key in change}
    bad = client(3, **names)
    if "missing" in change:
        del bad.tensors[change["missing"]]
    if "extra" in change:
        bad.tensors[change["extra"]] = torch.ones(3, 9)
    if "nan" in change:
        bad.tensors[change["nan"]][0, 0] = float("nan")
    if "odd" in change:
        bad.tensors[B] = torch.ones(12, 2)
    if "head" in change:
        bad.tensors[HEAD] = torch.ones(5, 12)
    expected = client(0).tensors
    round_ = average([clients[0], bad, clients[1]], expected=expected, rule=rule, base="base", scaling=2.0)
    assert list(round_.left_out) == ["client-3"]
    assert re.search(reason, round_.left_out["client-3"])
    without = average(clients, expected=expected, rule=rule, base="base", scaling=2.0)
    assert all(torch.equal(tensor, without.tensors[key]) for key, tensor in round_.tensors.items())


def test_without_any_usable_client_the_server_keeps_what_it_has():
    expected = client(0).tensors
    round_ = average([client(1, base="x"), client(1, base="base")], expected=expected, base="base")
    assert round_.left_out["client-1"] == "it sent a second update in one round"
    assert not round_.used
    assert all(torch.equal(round_.tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("fedavg", {}, r"rule='fedavg' is unknown; pass one of 'exact', 'fedex'"),
        ("regmean", {}, "needs statistics, which clients do not send"),
        ("ties", {"colour": 1}, "is not an option of rule='ties'"),
        ("fedit", {"density": 0.1}, "is not an option of rule='fedit'"),
    ],
)
def test_unknown_rules_and_options_are_refused(rule, options, message):
    with pytest.raises(AdapterConfigError, match=message):
        average([client(1)], expected=client(0).tensors, rule=rule, **options)


def test_an_average_starts_clients_of_other_ranks():
    clients = [client(seed) for seed in (1, 2)]
    averaged = average(clients, expected=client(0).tensors, rank=6, scaling=2.0).tensors
    whole = update(averaged, 2.0)
    U, S, Vh = torch.linalg.svd(whole)
    for rank in (2, 6, 8):
        own = fit_rank(averaged, rank=rank, scaling=2.0, own_scaling=0.5)
        assert own[A].shape == (rank, 9)
        kept = min(rank, 6)
        torch.testing.assert_close(update(own, 0.5), (U[:, :kept] * S[:kept]) @ Vh[:kept], rtol=0, atol=1e-5)
        assert bool((own[A].norm(dim=1) > 0).all()), "a row of zeros beside a column of zeros would never train"


def test_directions_that_an_average_does_not_fill_can_train():
    averaged = average([client(1, rank=1)], expected=client(0).tensors, scaling=2.0).tensors
    assert bool((averaged[A].norm(dim=1) > 0).all())
    torch.testing.assert_close(update(averaged, 2.0), update(client(1, rank=1).tensors, 2.0), rtol=0, atol=1e-5)


def trained(config, *, seed):
    """An adapter on a tiny BERT with other numbers than at its start."""
    model = get_peft_model(tiny_bert(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 13).reshape(2, 6)).logits


@pytest.mark.parametrize("core", ["full", "diagonal", "low_rank"])
def test_averaged_cores_are_the_core_of_the_averaged_updates(core):
    subspace = random_subspace(tiny_bert(), ("query", "value"), n_components=6)
    config = EigenLoraConfig(subspace=subspace, core=core, r=2, lora_alpha=6, task_type="SEQ_CLS")
    models = [trained(config, seed=seed) for seed in (1, 2)]
    updates = [round_update(model, name=str(i), n_rows=1 + 2 * i) for i, model in enumerate(models)]
    assert {each.base for each in updates} == {subspace.fingerprint}
    sizes = {"full": 36, "diagonal": 6, "low_rank": 24}
    head = sum(t.numel() for key, t in updates[0].tensors.items() if "lora_" not in key)
    assert sum(t.numel() for t in updates[0].tensors.values()) - head == 4 * sizes[core]
    # "low_rank" goes through its dense core: two of rank 2 make one of rank 4.
    round_ = average(updates, expected=updates[0].tensors, scaling=updates[0].scaling, rank=4)
    server = get_peft_model(
        tiny_bert(), EigenLoraConfig(subspace=subspace, core=core, r=4, lora_alpha=12, task_type="SEQ_CLS")
    )
    load_round(server, tensors=round_.tensors, scaling=updates[0].scaling)
    for name in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"):
        deltas = [
            m.get_submodule(f"base_model.model.{name}").get_delta_weight("default").double() for m in (*models, server)
        ]
        torch.testing.assert_close(deltas[2], 0.25 * deltas[0] + 0.75 * deltas[1], rtol=0, atol=1e-6)
        assert deltas[2].norm() > 0.1


@pytest.mark.parametrize("rule", ["exact", "fedex", "task_arithmetic"])
def test_real_loras_average_to_the_mean_of_what_they_add_to_the_weights(rule):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS")
    models = [trained(config, seed=seed) for seed in (1, 2)]
    updates = [round_update(model, name=str(i), rule=rule, base="tiny") for i, model in enumerate(models)]
    round_ = average(updates, expected=updates[0].tensors, rule=rule, scaling=2.0, rank=None if rule == "fedex" else 4)
    server = get_peft_model(tiny_bert(), LoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS"))
    if rule == "fedex":
        server = get_peft_model(tiny_bert(), config)
    load_round(server, tensors=round_.tensors, scaling=2.0)
    load_round(
        server, tensors=round_.tensors, scaling=2.0
    )  # again: a residual is added to the first weight, not to the last
    layer = "base_model.model.bert.encoder.layer.1.attention.self.query"
    weights = []
    for model in (*models, server):
        module = model.get_submodule(layer)
        weights.append(module.base_layer.weight.double() + module.get_delta_weight("default").double())
    torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2, rtol=0, atol=1e-5)


def test_fedsa_leaves_a_client_its_own_side():
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = trained(config, seed=1)
    before = {
        key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_B" in key or "classifier" in key
    }
    update_ = round_update(model, name="a", rule="fedsa")
    load_round(model, tensors={key: tensor + 1 for key, tensor in update_.tensors.items()})
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    key = next(iter(update_.tensors))
    assert torch.equal(after[key.replace(".weight", ".default.weight")], update_.tensors[key] + 1)


def test_what_has_no_place_is_refused():
    model = trained(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), seed=1)
    with pytest.raises(AdapterConfigError, match="have no place in the adapter 'default'"):
        load_round(model, tensors={"base_model.model.nowhere.lora_A.weight": torch.ones(2, 2)})
    patterned = LoraConfig(
        r=2, target_modules=["query"], alpha_pattern={"layer.0.attention.self.query": 9}, task_type="SEQ_CLS"
    )
    with pytest.raises(AdapterConfigError, match=r"has the scalings \[.*leave out alpha_pattern"):
        round_update(trained(patterned, seed=1), name="a")
    for config in (
        MosLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
        LoraConfig(r=2, target_modules=["query"], use_dora=True, task_type="SEQ_CLS"),
    ):
        with pytest.raises(AdapterConfigError, match="rounds average LORA and EIGENLORA adapters without DoRA"):
            round_update(get_peft_model(tiny_bert(), config), name="a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_A.weight": (2, 31)}, r"query.lora_A.weight' has the shape \(2, 31\), .*'default' has \(2, 32\) there"),
        ({"lora_A.weight": (2,)}, r"query.lora_A.weight' has the shape \(2,\), .*'default' has \(2, 32\) there"),
        ({"lora_B.weight": (2,)}, r"query.lora_B.weight' has the shape \(2,\), .*'default' has \(32, 2\) there"),
        ({"lora_B.weight": (33, 2)}, r"query.lora_B.weight' has the shape \(33, 2\), .*'default' has \(32, 2\) there"),
        ({"lora_B.weight": (32, 3)}, r"factors of '.*query' are A \(2, 32\) and B \(32, 3\); pass two of one rank"),
        ({"residue_A": (3, 31)}, r"residual of '.*query' has B \(32, 3\) and A \(3, 31\), .* is \(32, 32\)"),
        ({"residue_A": (2, 32)}, r"residual of '.*query' has B \(32, 3\) and A \(2, 32\), .* is \(32, 32\)"),
        ({"residue_A": (32,)}, r"residual of '.*query' has B \(32, 3\) and A \(32,\), .* is \(32, 32\)"),
        ({"residue_A": None}, r"residual of '.*query' has B \(32, 3\) and A missing, .* is \(32, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_leave_the_model_as_it_was(changes, message):
    model = trained(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), seed=1)
    update_ = round_update(model, name="a")
    query = [f"base_model.model.bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    tensors = {key: tensor + 1 for key, tensor in update_.tensors.items()}
    for module in query:
        tensors |= {f"{module}.residue_B": torch.ones(32, 3), f"{module}.residue_A": torch.ones(3, 32)}
    for name, shape in changes.items():
        del tensors[f"{query[1]}.{name}"]
        tensors |= {} if shape is None else {f"{query[1]}.{name}": torch.ones(shape)}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(AdapterConfigError, match=message):
        load_round(model, tensors=tensors)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_head_of_another_size_and_a_residual_of_no_module_are_refused():
    model = trained(LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), seed=1)
    tensors = dict(round_update(model, name="a").tensors)
    key = "base_model.model.classifier.weight"
    size = tuple(tensors[key].shape)
    with pytest.raises(
        AdapterConfigError, match=re.escape(f"{key!r} has the shape (9, 32), and the adapter 'default' has {size}")
    ):
        load_round(model, tensors=tensors | {key: torch.ones(9, 32)})
    residual = {f"base_model.model.nowhere.residue_{side}": torch.ones(32, 32) for side in "BA"}
    with pytest.raises(AdapterConfigError, match="'base_model.model.nowhere.residue_B', have no place in the adapter"):
        load_round(model, tensors=tensors | residual)
    for call in (
        lambda: load_round(model, tensors=tensors, adapter_name="b"),
        lambda: round_update(model, name="a", adapter_name="b"),
    ):
        with pytest.raises(KeyError, match="'b' is no adapter of the model, which has 'default'; pass one of these"):
            call()


def test_every_rule_has_its_paper():
    assert all(row.title and row.paper.startswith("arXiv ") for row in AVERAGING.values())
