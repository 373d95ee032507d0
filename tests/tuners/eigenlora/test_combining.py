"""Weighted combinations, weight tying, parameter groups, the mixer's controls, and the README of an adapter."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from eigenpeft import EigenLoraConfig, MosLoraConfig
from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.factored import balance
from eigenpeft.linalg.merging import merge_updates
from eigenpeft.tuners.parameter_groups import parameter_groups
from tests.peft_suite.random_subspaces import random_subspace as subspace_of_all
from tests.tuners.conftest import logits, random_subspace, tiny_llama, train

TARGETS = ["q_proj", "v_proj"]


def two_adapters(method, *, ranks=(4, 4)):
    model = tiny_llama()
    subspace = random_subspace(model, TARGETS)

    def config(r, alpha):
        common = {"r": r, "lora_alpha": alpha, "target_modules": set(TARGETS), "init_lora_weights": False}
        if method == "moslora":
            return MosLoraConfig(**common)
        return EigenLoraConfig(subspace=subspace, core=method, **common)

    torch.manual_seed(3)
    model = get_peft_model(model, config(ranks[0], 8))
    model.add_adapter("second", config(ranks[1], 20))
    return model


def updates(model, name):
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {path: layer.get_delta_weight(name).detach() for path, layer in layers.items()}


@pytest.mark.parametrize("method", ["moslora", "low_rank", "full", "diagonal"])
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_sum_is_exact(method, combination):
    model = two_adapters(method)
    rank = {"svd_rank": 8} if combination == "svd" and method in ("moslora", "low_rank") else {}
    model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "sum", combination, **rank)
    first, second, both = (updates(model, name) for name in ("default", "second", "sum"))
    for path, update in both.items():
        torch.testing.assert_close(update, 0.7 * first[path] - 1.5 * second[path], atol=2e-5, rtol=1e-4)


def test_svd_of_a_smaller_rank_is_the_best_approximation():
    model = two_adapters("low_rank")
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "svd", svd_rank=3)
    first, second, both = (updates(model, name) for name in ("default", "second", "sum"))
    for path, update in both.items():
        whole = (first[path] + second[path]).double()
        best = torch.linalg.svdvals(whole)[3:].square().sum().sqrt()
        torch.testing.assert_close(torch.linalg.norm(update.double() - whole), best, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["low_rank", "full", "diagonal"])
def test_sums_of_one_subspace_stay_coefficients(method, tmp_path):
    model = two_adapters(method)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "cat")
    assert isinstance(model.peft_config["sum"], EigenLoraConfig)
    expected = updates(model, "sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum")
    for path, update in updates(loaded, "default").items():
        assert torch.equal(update, expected[path])


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("combination", ["ties", "magnitude_prune"])
def test_entrywise_combinations_of_coefficients_stay_coefficients(core, combination):
    model = two_adapters(core)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.5], "sum", combination, density=0.5)
    assert isinstance(model.peft_config["sum"], EigenLoraConfig)
    first, second, both = (updates(model, name) for name in ("default", "second", "sum"))
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        weights = 0.7 * layer.scaling["default"], -0.5 * layer.scaling["second"]
        tensors = [layer.lora_B[name].coefficients.detach() for name in ("default", "second")]
        kept = [each * (each.abs() >= each.abs().flatten().topk(each.numel() // 2).values[-1]) for each in tensors]
        expected = weights[0] * kept[0] + weights[1] * kept[1]
        if combination == "ties":  # the mean over the entries whose sign is that of the larger one
            agree = [torch.sign(each) == torch.where(kept[0] + kept[1] >= 0, 1, -1) for each in kept]
            expected = weights[0] * kept[0] * agree[0] + weights[1] * kept[1] * agree[1]
            expected /= (agree[0].float() + agree[1].float()).clamp(min=1)
        torch.testing.assert_close(layer.lora_B["sum"].coefficients, expected)
    for path, update in both.items():
        expected = 0.7 * first[path] - 0.5 * second[path]
        assert torch.corrcoef(torch.stack([update.flatten(), expected.flatten()]))[0, 1] > 0.5


def test_entrywise_combinations_need_a_density():
    with pytest.raises(AdapterConfigError, match="needs density="):
        two_adapters("full").add_weighted_adapter(["default", "second"], [1, 1], "sum", "ties")


@pytest.mark.parametrize("method", ["moslora", "low_rank"])
def test_combinations_of_lora_factors_become_plain_lora(method, tmp_path, tokens):
    model = two_adapters(method)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "ties", density=0.5)
    model.set_adapter("sum")
    expected = logits(model.eval(), tokens)
    assert type(model.peft_config["sum"]) is LoraConfig
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_ranks_that_differ_cannot_be_summed_linearly():
    with pytest.raises(ValueError, match="must have the same r value"):
        two_adapters("low_rank", ranks=(4, 2)).add_weighted_adapter(["default", "second"], [1, 1], "sum", "linear")


@pytest.mark.parametrize("method", ["moslora", "low_rank", "full"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_tied_weights_share_what_is_trained(method, tmp_path, tokens):
    def make():
        return tiny_llama(tie_word_embeddings=True)

    common = {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    if method == "moslora":
        config = MosLoraConfig(**common)
    else:
        subspace = subspace_of_all(make(), parameters=False)
        config = EigenLoraConfig(subspace=subspace, core=method, **common)
    model = get_peft_model(make(), config)
    bases = [module.components_in for module in model.modules() if hasattr(module, "components_in")]
    assert all(
        frozen_bank.abs().max() > 0 for frozen_bank in bases
    )  # PEFT zeroes the factors of the tied layer in place
    expected = train(model, tokens, lr=0.05)
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    torch.testing.assert_close(embedding.get_delta_weight("default"), head.get_delta_weight("default"))
    assert embedding.get_delta_weight("default").abs().max() > 1e-5
    assert not list(head.lora_A["default"].parameters())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), expected, atol=1e-6, rtol=1e-6)


def test_parameter_groups():
    model = two_adapters("moslora")
    groups = {group["name"]: group for group in parameter_groups(model, learning_rate=1e-3, mixer_learning_rate=1e-2)}
    assert {name: group["lr"] for name, group in groups.items()} == {"mixer": 1e-2, "other": 1e-3}
    assert all(p.shape == (4, 4) for p in groups["mixer"]["params"])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups.values()) == len(trained)
    eigen = {
        group["name"]: group
        for group in parameter_groups(two_adapters("full"), learning_rate=1e-3, coefficients_learning_rate=0.1)
    }
    assert {name: group["lr"] for name, group in eigen.items()} == {"coefficients": 0.1}


def test_a_frozen_mixer_is_saved_and_never_trained(tmp_path, tokens):
    model = get_peft_model(tiny_llama(), MosLoraConfig(r=4, target_modules=TARGETS, train_mixer=False))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    before = layer.lora_B["default"].mixer.clone()
    expected = train(model, tokens)
    assert torch.equal(layer.lora_B["default"].mixer, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), expected)


def test_folded_start_is_plain_lora_from_moslora_s_start(tmp_path, tokens):
    made = []
    for fold in (False, True):
        torch.manual_seed(5)
        made.append(get_peft_model(tiny_llama(), MosLoraConfig(r=4, target_modules=TARGETS, fold=fold)))
    mixed, folded = made
    for ours, plain in zip(mixed.modules(), folded.modules(), strict=False):
        if isinstance(ours, LoraLayer) and isinstance(plain, LoraLayer):
            expected = ours.lora_B["default"].mixer @ ours.lora_A["default"].weight
            torch.testing.assert_close(plain.lora_A["default"].weight, expected)
            assert type(plain.lora_B["default"]) is torch.nn.Linear
            break
    expected = train(folded, tokens)
    folded.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval(), tokens), expected)


def test_folding_needs_one_mixer_a_layer():
    grouped = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1, groups=2))
    with (
        pytest.warns(UserWarning, match="groups > 1"),
        pytest.raises(AdapterConfigError, match="fold=True is not defined for '0', whose mixer has 2 blocks"),
    ):
        get_peft_model(grouped, MosLoraConfig(r=2, target_modules=["0"], fold=True))


@pytest.mark.parametrize(("method", "word"), [("moslora", "a MoSLoRA"), ("low_rank", "an EigenLoRA")])
def test_an_adapter_says_how_to_load_it(method, word, tmp_path):
    model = two_adapters(method)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        card = (folder / "README.md").read_text()
        assert card.count("pip install eigenpeft") == 1
        assert "import eigenpeft" in card
        assert f"This is {word} adapter" in card
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


CORE_RULES = ["task_arithmetic", "mean", "tsv", "iso_c", "iso_cts", "boosting", "svc", "pico", "wudi", "dare"]


@pytest.mark.parametrize("core", ["low_rank", "full"])
@pytest.mark.parametrize("rule", CORE_RULES)
def test_rules_merge_the_cores_where_adapters_share_a_subspace(rule, core):
    model = two_adapters(core)
    sources = [updates(model, name) for name in ("default", "second")]
    model.add_weighted_adapter(["default", "second"], [0.7, 1.0], "merged", combination_type=rule, svd_rank=16)
    assert model.peft_config["merged"].core == core
    for path, found in updates(model, "merged").items():
        if rule == "dare":
            assert found.isfinite().all()
            continue
        # The same rule on the whole updates, as `eigenpeft.merge` would: what a rule gives does not depend on the axes.
        factors = [balance(source[path], torch.eye(source[path].shape[1])) for source in sources]
        expected = merge_updates(factors, rule=rule, weights=[0.7, 1.0])
        expected = expected.lora_B @ expected.lora_A
        torch.testing.assert_close(found.double(), expected, atol=2e-4 * float(expected.norm()), rtol=0)


def test_rules_on_cores_refuse_what_has_no_common_core():
    model = two_adapters("diagonal")
    with pytest.raises(AdapterConfigError, match="'tsv' works on cores .* diagonal cores is not diagonal"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "merged", combination_type="tsv")
    model = two_adapters("full")
    with pytest.raises(AdapterConfigError, match="density=0.5 is not an option of rule='tsv'"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "merged", combination_type="tsv", density=0.5)
    model.add_adapter(
        "plain", EigenLoraConfig(subspace=random_subspace(model.get_base_model(), TARGETS, seed=9), core="full")
    )
    with pytest.raises(AdapterConfigError, match="these differ in core or subspace"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "merged2", combination_type="iso_c")


def test_no_rule_merges_biases_of_lora():
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    config = EigenLoraConfig(subspace=random_subspace(base, ("0",), n_components=4), core="full", r=4, lora_bias=True)
    model = get_peft_model(base, config)
    model.add_adapter("second", config)
    with pytest.raises(
        AdapterConfigError, match="'tsv': no rule merges the biases of lora_bias=True; combine with 'lin"
    ):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "merged", combination_type="tsv")


def test_adapters_whose_biases_of_lora_differ_are_not_combined():
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    shared = {"subspace": random_subspace(base, ("0",), n_components=4), "core": "full", "r": 4}
    model = get_peft_model(base, EigenLoraConfig(**shared, lora_bias=True))
    model.add_adapter("second", EigenLoraConfig(**shared))
    message = r"their lora_bias differ \('default' has True, 'second' has None\)\. Combine adapters that agree"
    with pytest.raises(AdapterConfigError, match=message):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="linear")
