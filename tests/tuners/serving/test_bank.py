"""Mixed batches: what one adapter at a time gives, for every row, in the bank and on PEFT's own path."""

import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, PrincipalSubspace, SubspaceBuilder
from eigenpeft.errors import SubspaceError
from eigenpeft.subspace import ModuleSubspace
from eigenpeft.tuners.eigenlora.layer import EigenLinear
from eigenpeft.tuners.serving.bank import AdapterBank
from tests.factories import make_collection, write_adapter
from tests.tuners.conftest import VOCABULARY, logits, random_subspace, tiny_gpt2, tiny_llama

LLAMA_MODULES = {
    f"model.layers.{layer}.self_attn.{name}": (width, 32)
    for layer in (0, 1)
    for name, width in (("q_proj", 32), ("v_proj", 16))
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folders of five LoRA adapters of ranks 2 to 4, one of them without the last layer; the store they lie in)."""
    folder = tmp_path_factory.mktemp("zoo")
    made = make_collection(folder, n_adapters=4, modules=LLAMA_MODULES, rank=(4, 2, 3), n_shared=6)
    some = {
        name: (made.components_out[name].mT[:, :2].float(), made.components_in[name][:2].float())
        for name in list(LLAMA_MODULES)[:2]
    }
    write_adapter(folder / "partial", some, r=2, lora_alpha=2)
    folders = {name: folder / name for name in [*made.names, "partial"]}
    collection = AdapterCollection.from_pretrained(list(folders.values()))
    subspace = SubspaceBuilder(n_components=6).fit(collection).subspace_
    return folders, AdapterStore.from_collection(subspace, collection)


@pytest.fixture(scope="module")
def store(made, tmp_path_factory):
    """The same from disk, where it is read lazily."""
    place = tmp_path_factory.mktemp("store") / "store"
    made[1].save_pretrained(place)
    return AdapterStore.from_pretrained(place)


def batch(rows, length, seed=1):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain_lora(folders, name, tokens):
    """PEFT's own model with one adapter on all rows."""
    return logits(PeftModel.from_pretrained(tiny_llama(), folders[name]).eval(), tokens)


@pytest.mark.parametrize("length", [1, 4, 40])  # on the components and, with ranks padded to 4 of 6, on factors
def test_every_row_gets_its_own_task(made, store, length):
    names = ["adapter-2", "partial", "__base__", "adapter-0", "adapter-2", "adapter-1"]
    tokens = batch(len(names), length)
    model = tiny_llama()
    bank = AdapterBank.from_store(store)
    with bank.attached(model), bank.use(names):
        mixed = logits(model, tokens)
    for row, name in enumerate(names):
        expected = logits(tiny_llama(), tokens) if name == "__base__" else plain_lora(made[0], name, tokens)
        torch.testing.assert_close(mixed[row], expected[row], atol=2e-4, rtol=2e-4)
        assert name == "__base__" or not torch.allclose(mixed[row], logits(tiny_llama(), tokens)[row], atol=1e-3)


def test_outside_of_a_block_the_model_is_the_base_model(store):
    model, tokens = tiny_llama(), batch(2, 5)
    before = logits(model, tokens)
    bank = AdapterBank.from_store(store)
    with bank.attached(model):
        assert torch.equal(logits(model, tokens), before)
        with bank.use(["adapter-0", "adapter-1"]):
            changed = logits(model, tokens)
            with bank.use(["__base__"] * 2):
                torch.testing.assert_close(logits(model, tokens), before)
            assert torch.equal(logits(model, tokens), changed)
        assert torch.equal(logits(model, tokens), before)
    with bank.use(["adapter-0", "adapter-1"]):
        assert torch.equal(logits(model, tokens), before)
    assert not torch.allclose(changed, before, atol=1e-3)


def test_generation_greedy_and_with_beams(made, store):
    names, tokens = ["adapter-0", "adapter-1", "partial"], batch(3, 4)
    model, bank = tiny_llama(), AdapterBank.from_store(store)
    for n_beams in (1, 3):
        settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": n_beams}
        with bank.attached(model), bank.use(names, n_repeats=n_beams):
            mixed = model.generate(input_ids=tokens, **settings)
        for row, name in enumerate(names):
            alone = PeftModel.from_pretrained(tiny_llama(), made[0][name]).eval()
            expected = alone.generate(input_ids=tokens[row : row + 1], **settings)[0]
            assert mixed[row, : len(expected)].tolist() == expected.tolist()


def test_prompts_of_several_lengths_padded_on_the_left_generate_what_each_does_alone(made, store):
    names, prompts = ["adapter-0", "__base__", "partial"], [batch(1, length)[0] for length in (4, 7, 2)]
    model, bank = tiny_llama(), AdapterBank.from_store(store)
    settings = {"max_new_tokens": 5, "do_sample": False}
    pads = [7 - len(prompt) for prompt in prompts]
    tokens = torch.stack([torch.nn.functional.pad(each, (pad, 0)) for each, pad in zip(prompts, pads, strict=True)])
    mask = torch.stack([(torch.arange(7) >= pad).long() for pad in pads])
    with bank.attached(model), bank.use(names):
        mixed = model.generate(tokens, attention_mask=mask, **settings)[:, 7:]
    answers = []
    for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        alone = tiny_llama() if name == "__base__" else PeftModel.from_pretrained(tiny_llama(), made[0][name]).eval()
        expected = alone.generate(input_ids=prompt[None], **settings)[0, len(prompt) :]
        assert mixed[row, : len(expected)].tolist() == expected.tolist()
        answers.append(tuple(expected.tolist()))
    assert len(set(answers)) > 1


def test_unknown_tasks_are_one_error_with_their_likeness(store):
    bank = AdapterBank.from_store(store)
    with (
        pytest.raises(SubspaceError, match=r"2 of the members .* 'adapter-9' \(did you mean 'adapter-\d'\?\), 'zzz'\."),
        bank.use(["adapter-9", "adapter-0", "zzz"]),
    ):
        pass


def test_rows_and_tasks_must_agree(store):
    model, bank = tiny_llama(), AdapterBank.from_store(store)
    with bank.attached(model), bank.use(["adapter-0"]), pytest.raises(SubspaceError, match="got 3 rows for 1 members"):
        logits(model, batch(3, 2))


def test_another_base_is_refused(store):
    bank = AdapterBank.from_store(store)
    with pytest.raises(SubspaceError, match=r"4 of the bank's 4 modules, such as 'model\.layers\.0"):
        bank.attach(tiny_gpt2())
    with pytest.raises(SubspaceError, match=r"weight of \(64, 64\) in the model and takes 32"):
        bank.attach(tiny_llama(hidden_size=64, num_attention_heads=4))


def test_names_must_be_unique(store):
    with pytest.raises(SubspaceError, match="rename a"):
        AdapterBank(store.subspace, names=["a", "a"], coefficients={})
    with pytest.raises(SubspaceError, match="rename adapter-0"):
        AdapterBank.from_store(store, names=["adapter-0", "adapter-0"])
    with pytest.raises(KeyError, match="'nobody' is not in the store"):
        AdapterBank.from_store(store, names=["nobody"])


def test_both_sides_may_be_one_tensor():
    basis = torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)))[0].mT
    spectrum = torch.ones(4)
    module = "model.layers.0.self_attn.q_proj"
    subspace = PrincipalSubspace(
        {
            module: ModuleSubspace(
                basis,
                basis,
                singular_values_in=spectrum,
                singular_values_out=spectrum,
                explained_variance_ratio=spectrum / 4,
            )
        }
    )
    bank = AdapterBank(subspace, names=["a"], coefficients={module: (torch.ones(1, 2, 4), torch.ones(1, 4, 2))})
    model, tokens = tiny_llama(), batch(1, 3)
    with bank.attached(model), bank.use(["a"]):
        served = logits(model, tokens)
    model.model.layers[0].self_attn.q_proj.weight.data += basis.mT @ torch.full((4, 4), 2.0) @ basis
    torch.testing.assert_close(served, logits(model, tokens), atol=1e-5, rtol=1e-4)


def test_some_members_in_another_order(made, store):
    bank = AdapterBank.from_store(store, names=["partial", "adapter-1"])
    assert bank.names == ("partial", "adapter-1")
    tokens, model = batch(2, 3), tiny_llama()
    with bank.attached(model), bank.use(["adapter-1", "partial"]):
        mixed = logits(model, tokens)
    torch.testing.assert_close(mixed[0], plain_lora(made[0], "adapter-1", tokens)[0], atol=2e-4, rtol=2e-4)


def test_bytes_are_one_copy_of_the_bases_and_the_coefficients(store):
    bank = AdapterBank.from_store(store)
    bases = sum(4 * 6 * (width + 32) for width, _ in LLAMA_MODULES.values())
    coefficients = 4 * len(LLAMA_MODULES) * (len(store) + 1) * 2 * 4 * 6  # ranks padded to 4, a task of zeros
    assert bank.n_bytes == bases + coefficients
    assert AdapterBank.from_store(store, dtype=torch.bfloat16).n_bytes == bank.n_bytes // 2


def test_threads_choose_their_tasks_apart(store):
    model, bank, tokens = tiny_llama(), AdapterBank.from_store(store), batch(2, 3)
    expected, got = {}, {}
    names = ("adapter-0", "adapter-1")
    barrier = threading.Barrier(2)

    def serve(name, outputs, wait):
        with bank.use([name] * 2):
            if wait:
                barrier.wait(timeout=900)
            outputs[name] = logits(model, tokens)

    with bank.attached(model):
        for name in names:
            serve(name, expected, False)
        threads = [threading.Thread(target=serve, args=(name, got, True)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got[name], expected[name]) for name in names)


@pytest.mark.parametrize(("make", "suffixes"), [(tiny_llama, ("q_proj", "v_proj")), (tiny_gpt2, ("c_attn",))])
@pytest.mark.parametrize("length", [1, 30])
def test_adapter_names_of_peft_with_many_adapters_of_one_subspace(make, suffixes, length):
    model = make()
    subspace = random_subspace(model, suffixes)
    model = get_peft_model(model, EigenLoraConfig(subspace=subspace, r=4, lora_alpha=4))
    model.add_adapter("second", EigenLoraConfig(subspace=subspace, r=2, lora_alpha=6))
    only_first_layer = [
        name for name, _ in model.base_model.model.named_modules() if ".0." in name and name.endswith(suffixes)
    ]
    model.add_adapter("partial", EigenLoraConfig(subspace=subspace, r=3, target_modules=only_first_layer))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "coefficients" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    names, tokens = ["partial", "default", "__base__", "second", "default"], batch(5, length)
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=names).logits
        for layer in model.modules():
            if isinstance(layer, EigenLinear):
                layer.__class__ = Linear  # PEFT's own loop
        expected = model(input_ids=tokens, adapter_names=names).logits
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[1], mixed[2], atol=1e-3)
