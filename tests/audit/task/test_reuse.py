"""Downhill cosines against dense gradients in float64; the adapter that was made from the task's own gradient comes first."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eigenpeft import AdapterCollection
from eigenpeft.audit.task.gradient import modules_in
from eigenpeft.audit.task.reuse import downhill, nearest_adapters, reuse_answer
from eigenpeft.audit.task.task_gradients import gather_tokens
from eigenpeft.building import SubspaceBuilder
from eigenpeft.errors import SubspaceError
from eigenpeft.linalg.scores.nulls import matched_null
from tests.factories import tiny_bert, write_adapter

NAMES = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A model, a batch, its dense gradients, and four adapters of which "own" descends."""
    model = tiny_bert(hidden_dropout_prob=0.0).eval()
    generator = torch.Generator().manual_seed(5)
    batch = {"input_ids": torch.randint(3, 64, (12, 7), generator=generator), "labels": torch.arange(12) % 2}
    weights = [model.get_submodule(name).weight for name in NAMES]
    gradients = dict(zip(NAMES, torch.autograd.grad(model(**batch).loss, weights), strict=True))
    folder = tmp_path_factory.mktemp("adapters")
    for i in range(3):
        factors = {
            name: (torch.randn(len(g), 2, generator=generator), torch.randn(2, g.shape[1], generator=generator))
            for name, g in gradients.items()
        }
        write_adapter(folder / f"other-{i}", factors, task_type="SEQ_CLS")
    own = {name: (-u[:, :2] * s[:2], vh[:2]) for name, g in gradients.items() for u, s, vh in [torch.linalg.svd(g)]}
    write_adapter(folder / "own", own, task_type="SEQ_CLS")
    return model, batch, gradients, AdapterCollection.from_pretrained(folder)


def found(task):
    model, batch, _, collection = task
    subspace = SubspaceBuilder(2).fit(collection).subspace_
    tokens, _ = gather_tokens(model, targets=modules_in(model, subspace), batches=[batch])
    return downhill(collection, tokens=tokens)


def test_cosines_are_those_of_dense_matrices(task):
    _, _, gradients, collection = task
    wide = torch.cat([gradients[name].double().flatten() for name in NAMES])
    updates = {}
    for name in collection.names:
        parts = [read for module in NAMES for read in collection.factors(module) if read.adapter == name]
        updates[name] = torch.cat([(read.lora_B.double() @ read.lora_A.double()).flatten() for read in parts])
    measured = found(task)
    for name, update in updates.items():
        expected = float(torch.nn.functional.cosine_similarity(-wide, update, dim=0))
        assert measured.adapters[name] == pytest.approx(expected, abs=1e-5)
    mean = torch.stack(list(updates.values())).mean(0)
    assert measured.mean == pytest.approx(float(torch.nn.functional.cosine_similarity(-wide, mean, dim=0)), abs=1e-5)


def test_the_adapter_that_descends_comes_first(task):
    measured = found(task)
    assert next(iter(measured.adapters)) == "own"
    assert measured.adapters["own"] > 0.5


def test_chance_is_what_the_best_of_as_many_random_updates_exceeds_once_in_twenty(task):
    """Against draws of `matched_null` and dense products in float64."""
    _, _, gradients, collection = task
    wide = torch.cat([gradients[name].double().flatten() for name in NAMES])
    factors = {name: [(read.lora_B, read.lora_A) for read in collection.factors(name)] for name in NAMES}
    generator, best = torch.Generator().manual_seed(0), []
    for _ in range(600):
        drawn = [
            [b.double() @ a.double() for b, a in matched_null(factors[name], generator=generator)] for name in NAMES
        ]
        updates = [torch.cat([update.flatten() for update in each]) for each in zip(*drawn, strict=True)]
        best.append(max(float(torch.nn.functional.cosine_similarity(-wide, update, dim=0)) for update in updates))
    chance = found(task).chance
    above = sum(value > chance for value in best) / len(best)
    assert 0.02 <= above <= 0.09  # 0.05 with a standard error of 0.009; adapters of unequal tails make it less


def test_the_answer_says_that_none_is_near_with_the_figure_it_is_judged_by(task):
    near = found(task)
    said = reuse_answer(near)
    assert (said.answer, said.chance) == ("yes", near.chance)
    assert "Start from own" in said.text
    assert "once in 20 draws" in said.text
    assert f"the last {min(near.adapters.values()):+.3f}" in said.text
    far = replace(near, adapters={name: near.chance * 0.9 for name in near.adapters})
    said = reuse_answer(far)
    assert said.answer == "no"
    assert said.text.startswith("No. None of the adapters is near this task")
    assert f"{near.chance:+.4f} once in 20 draws" in said.text
    assert reuse_answer(replace(far, adapters=dict.fromkeys(far.adapters, -0.2), chance=0.0)).answer == "no"


def test_a_gradient_of_zero_is_refused(task):
    *_, collection = task
    tokens = {name: (torch.zeros(1, 16), torch.zeros(1, 16)) for name in NAMES}
    with pytest.raises(SubspaceError, match="zero in all modules"):
        downhill(collection, tokens=tokens)


@pytest.mark.parametrize("adapted", [False, True])
def test_one_call_finds_the_modules_itself(task, adapted):
    model, batch, _, collection = task
    training = model.training
    inner = copy.deepcopy(model)
    given = get_peft_model(inner, LoraConfig(r=2, target_modules=["query"])) if adapted else inner
    measured = nearest_adapters(collection, model=given, batches=[batch])
    assert measured.adapters == pytest.approx(found(task).adapters, abs=1e-6)
    assert model.training == training
    by_loss = nearest_adapters(collection, model=given, batches=[batch], loss=lambda m, rows: 3 * m(**rows).loss)
    assert by_loss.adapters == pytest.approx(measured.adapters, abs=1e-6)  # cosines
    with pytest.raises(SubspaceError, match=r"None of the adapters' 2 modules, .* is in the model \(Linear\)"):
        nearest_adapters(collection, model=torch.nn.Linear(2, 2), batches=[batch])
