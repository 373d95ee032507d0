"""Paired directions from the fit to the export: what assumes orthonormal rows elsewhere is right here, or refused by name."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

import eigenpeft
from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, PrincipalSubspace, SubspaceBuilder
from eigenpeft.audit.task.gradient import gradient_share
from eigenpeft.building import build_shared_subspace
from eigenpeft.errors import AdapterConfigError, ArtifactError, SubspaceError
from eigenpeft.subspace import AdapterMember, Core, random_subspace
from eigenpeft.tuners.serving.bank import AdapterBank
from tests.factories import make_collection
from tests.tuners.conftest import VOCABULARY, logits, tiny_llama

MODULES = {
    f"model.layers.{layer}.self_attn.{name}": (width, 32)
    for layer in (0, 1)
    for name, width in (("q_proj", 32), ("v_proj", 16))
}
K = 7


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of five LoRA adapters, the open collection)."""
    folder = tmp_path_factory.mktemp("zoo")
    make_collection(folder, n_adapters=5, modules=MODULES, rank=(4, 2, 3), n_shared=6, noise=0.3)
    return folder, AdapterCollection.from_pretrained(folder)


@pytest.fixture(scope="module")
def paired(made):
    return SubspaceBuilder(n_components=K, method="paired").fit(made[1]).subspace_


@pytest.fixture(scope="module")
def store(made, paired, tmp_path_factory):
    place = tmp_path_factory.mktemp("store") / "store"
    AdapterStore.from_collection(paired, made[1]).save_pretrained(place)
    return AdapterStore.from_pretrained(place)


def tokens(rows=3, length=6):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def dense_updates(collection, name):
    read = {module: collection.factors(module, names=[name])[0] for module in collection.modules}
    return {module: (each.lora_B.double() @ each.lora_A.double()).numpy() for module, each in read.items()}


def nearest(update, bank):
    """The nearest sum of the bank's pairs, by least squares on the flattened matrices."""
    pairs = zip(bank.components_out.double().numpy(), bank.components_in.double().numpy(), strict=True)
    atoms = np.stack([np.outer(left, right).ravel() for left, right in pairs], axis=1)
    found = np.linalg.lstsq(atoms, update.ravel(), rcond=None)[0]
    return found, (atoms @ found).reshape(update.shape)


def test_members_are_the_nearest_diagonal_cores_and_say_their_error(made, paired, store):
    for name in store.names:
        for module, update in dense_updates(made[1], name).items():
            core, (expected, kept) = store[name][module], nearest(update, paired[module])
            assert core.kind == "diagonal"
            np.testing.assert_allclose(core.parts["coefficients_out"].numpy(), expected, rtol=1e-3, atol=1e-4)
            error = np.linalg.norm(update - kept) / np.linalg.norm(update)
            assert store[name].relative_errors[module] == pytest.approx(error, abs=1e-5)
            assert 0.01 < error < 1.0


def test_the_same_is_read_back_and_a_changed_flag_is_noticed(made, paired, store, tmp_path):
    paired.save_pretrained(tmp_path / "s")
    again = PrincipalSubspace.from_pretrained(tmp_path / "s")
    assert again == paired
    assert set(again.paired_banks) == set(MODULES)
    assert store.subspace.paired_banks == paired.paired_banks
    path = tmp_path / "s" / "subspace_config.json"
    config = json.loads(path.read_text())
    del config["paired_banks"]
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="a file was altered"):
        PrincipalSubspace.from_pretrained(tmp_path / "s")
    for wrong, message in ((["no such"], "there are no such banks"), ("all", "not a list of names")):
        path.write_text(json.dumps(config | {"paired_banks": wrong}))
        with pytest.raises(ArtifactError, match=message):
            PrincipalSubspace.from_pretrained(tmp_path / "s")


def test_a_build_from_a_work_folder_keeps_the_pairs(made, paired, tmp_path):
    builder = SubspaceBuilder(n_components=K, method="paired")
    assert builder.fit(made[1], work_dir=tmp_path / "work").subspace_ == paired


def test_a_bank_for_all_layers_can_be_paired(made):
    shared = build_shared_subspace(made[1], n_components=8, method="paired", progress=False)
    assert len(shared.paired_banks) == 2
    assert AdapterStore.from_collection(shared, made[1]).names == made[1].names


def test_served_and_exported_members_are_what_the_cores_say(store, tmp_path):
    names, ids = list(store.names[:3]), tokens()
    model = tiny_llama()
    bank = AdapterBank.from_store(store)
    with bank.attached(model), bank.use(names):
        served = logits(model, ids)
    for row, name in enumerate(names):
        eigenpeft.export_lora(store, tmp_path / name, adapter_name=name)
        plain = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / name).eval(), ids)
        torch.testing.assert_close(served[row], plain[row], atol=2e-5, rtol=2e-4)
        assert not torch.allclose(plain[row], logits(tiny_llama(), ids)[row], atol=1e-3)


def test_to_orthonormal_bases_that_hold_the_pairs_and_back_nothing_is_lost(made, paired, store):
    whole = SubspaceBuilder(n_components={"*": 1.0}, method="balanced").fit(made[1]).subspace_
    moved = store.rebase(whole)
    name = store.names[0]
    for module in MODULES:
        assert moved[name][module].kind == "full"
        before, after = (
            left.double() @ right.double()
            for left, right in (
                store.subspace.reconstruct({module: store[name][module]})[module],
                whole.reconstruct({module: moved[name][module]})[module],
            )
        )
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
        assert moved[name].relative_errors[module] == pytest.approx(store[name].relative_errors[module], abs=1e-3)
    back = moved.rebase(paired)
    for module, core in back[name].items():
        assert core.kind == "diagonal"
        torch.testing.assert_close(
            core.parts["coefficients_out"], store[name][module].parts["coefficients_out"], atol=1e-3, rtol=1e-2
        )


def test_training_in_the_pairs_is_stored_bit_for_bit(paired, store, tmp_path):
    model = get_peft_model(tiny_llama(), EigenLoraConfig(subspace=paired, core="diagonal", lora_alpha=8, r=8))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = tokens()
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model.eval(), ids)
    for module, layer in ((name, model.get_submodule(f"base_model.model.{name}")) for name in MODULES):
        lora_A, lora_B = layer.lora_A["default"], layer.lora_B["default"]
        d = lora_B.coefficients.detach()
        bank = paired[module]
        update = (bank.components_out.mT * d) @ bank.components_in
        torch.testing.assert_close(lora_B.weight @ lora_A.weight, update, atol=1e-6, rtol=1e-5)
    fresh = AdapterStore(paired)
    fresh.add(model, name="mine")
    assert fresh["mine"]["model.layers.0.self_attn.q_proj"].kind == "diagonal"
    eigenpeft.export_lora(model, tmp_path / "plain")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval(), ids), expected, atol=2e-5, rtol=2e-4
    )


def test_a_warm_start_is_the_nearest_diagonal_core(made, paired):
    source = str(made[0] / made[1].names[0])
    config = EigenLoraConfig(subspace=paired, core="diagonal", init_from=source, r=8, lora_alpha=8)
    model = get_peft_model(tiny_llama(), config)
    module = next(iter(MODULES))
    layer = model.get_submodule(f"base_model.model.{module}")
    started = layer.get_delta_weight("default").detach().double().numpy()
    np.testing.assert_allclose(
        started, nearest(dense_updates(made[1], made[1].names[0])[module], paired[module])[1], atol=1e-4
    )


def test_a_merged_start_holds_the_whole_mean(made, paired, tmp_path):
    """The diagonal cores hold a part of the mean, an offset the rest: together all of it."""
    config = EigenLoraConfig(
        subspace=paired, core="diagonal", init_from="mean", init_adapters=str(made[0]), r=8, lora_alpha=8
    )
    model = get_peft_model(tiny_llama(), config)
    module = next(iter(MODULES))
    updates = [dense_updates(made[1], name)[module] for name in made[1].names]
    mean = sum(updates) / len(updates)
    eigenpeft.export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    found = plain.get_submodule(f"base_model.model.{module}").get_delta_weight("default").detach().double().numpy()
    np.testing.assert_allclose(found, mean, atol=1e-4)
    assert np.linalg.norm(mean - nearest(mean, paired[module])[1]) > 1e-3 * np.linalg.norm(mean)


@pytest.mark.parametrize("core", ["low_rank", "full"])
def test_other_cores_are_refused(core, paired):
    with pytest.raises(AdapterConfigError, match=f"core='{core}': the subspace was built with method='paired'"):
        get_peft_model(tiny_llama(), EigenLoraConfig(subspace=paired, core=core, r=2))


def test_fewer_pairs_with_a_warm_start_are_refused(made, paired):
    config = EigenLoraConfig(
        subspace=paired, core="diagonal", n_components=3, init_from=str(made[0] / made[1].names[0]), r=3
    )
    with pytest.raises(AdapterConfigError, match="coefficients of an adapter on fewer of the 7 paired directions"):
        get_peft_model(tiny_llama(), config)


def test_members_of_other_cores_are_refused(paired):
    module = next(iter(MODULES))
    member = AdapterMember({module: Core("full", {"coefficients_out": torch.eye(K)})})
    with pytest.raises(
        SubspaceError, match="of kind 'full', and paired directions have cores of kind 'diagonal' alone"
    ):
        AdapterStore(paired, members={"mine": member})


def test_banks_with_unequal_sides_are_refused(paired):
    bank = paired[next(iter(MODULES))]
    with pytest.raises(SubspaceError, match="as many components of the input as of the output; got 7 and 3"):
        replace(bank, components_out=bank.components_out[:3], singular_values_out=bank.singular_values_out[:3])
    with pytest.raises(SubspaceError, match=r"asks for 3 and 2 paired directions"):
        bank.truncate((3, 2))
    assert bank.truncate(3).paired


@pytest.mark.parametrize("value", [0.9, "auto", {"*": 0.5}])
def test_shares_of_pairs_are_refused(value, made):
    with pytest.raises(SubspaceError, match=r"with method='paired': pairs of fewer directions are not part"):
        SubspaceBuilder(n_components=value, method="paired").fit(made[1])


def test_more_adapters_cannot_be_merged_in(made, paired):
    with pytest.raises(SubspaceError, match="method='paired' cannot be updated"):
        SubspaceBuilder(n_components=K, method="paired").fit(made[1]).partial_fit(made[1])


def test_random_controls_are_orthonormal_and_not_paired(paired):
    assert random_subspace(like=paired).paired_banks == ()


def test_the_gradient_share_is_that_of_the_span_and_of_the_pairs(paired):
    model, ids = tiny_llama(), tokens()
    found = gradient_share(model, batches=[{"input_ids": ids, "labels": ids}], subspace=paired, seeds=(0,))
    model(input_ids=ids, labels=ids).loss.backward()
    total, spans, pairs = 0.0, 0.0, 0.0
    for name, bank in paired.items():
        gradient = model.get_submodule(name).weight.grad.double().numpy()
        axes = [
            np.linalg.svd(rows.double().numpy(), full_matrices=False)[2]
            for rows in (bank.components_out, bank.components_in)
        ]
        total += np.sum(gradient**2)
        spans += np.sum((axes[0] @ gradient @ axes[1].T) ** 2)
        pairs += np.sum(nearest(gradient, bank)[1] ** 2)
    assert found.share == pytest.approx(spans / total, rel=1e-3)
    assert found.diagonal == pytest.approx(pairs / total, rel=1e-3)
    assert found.diagonal < found.share


def test_later_adapters_are_not_absorbed(made, store):
    with pytest.raises(SubspaceError, match="Paired directions cannot absorb further adapters"):
        AdapterStore(store.subspace).absorb(made[1])
