"""export_lora: plain LoRA folders, exact, loaded where eigenpeft is never imported."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from eigenpeft import EigenLoraConfig, MosLoraConfig, export_lora
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.tuners.files.lora_files import LoraUpdate, with_one_rank_and_alpha
from tests.tuners.conftest import logits, random_subspace, tiny_bert, tiny_llama, train

PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
assert not any(name.startswith("eigenpeft") for name in sys.modules)
tokens, expected = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    assert (model(input_ids=tokens).logits - expected).abs().max() < 1e-4
"""


def trained(tokens, config):
    model = get_peft_model(tiny_llama(), config)
    return model, train(model, tokens)


def configs():
    subspace = random_subspace(tiny_llama(), ["q_proj", "v_proj"])
    common = {"r": 4, "lora_alpha": 10, "task_type": "CAUSAL_LM"}
    return {
        "low_rank": EigenLoraConfig(subspace=subspace, **common),
        "full": EigenLoraConfig(subspace=subspace, core="full", **common),
        "diagonal": EigenLoraConfig(subspace=subspace, core="diagonal", use_rslora=True, **common),
        "patterns": EigenLoraConfig(
            subspace=subspace, rank_pattern={"0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 3}, **common
        ),
        "moslora": MosLoraConfig(target_modules=["q_proj", "v_proj"], **common),
    }


@pytest.mark.parametrize("kind", ["low_rank", "full", "diagonal", "patterns", "moslora"])
def test_export_is_a_plain_lora_with_the_same_logits(tmp_path, tokens, kind):
    model, expected = trained(tokens, configs()[kind])
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not {"subspace", "core", "init_mixer", "requires_package"} & set(config)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_export_loads_where_eigenpeft_is_never_imported(tmp_path, tokens):
    model, expected = trained(tokens, configs()["low_rank"])
    tiny_llama().save_pretrained(tmp_path / "base")
    export_lora(model, tmp_path / "lora")
    torch.save((tokens, expected), tmp_path / "expected.pt")
    subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "base", tmp_path / "lora", tmp_path / "expected.pt"],
        check=True,
        timeout=900,
    )


def test_smaller_rank_is_the_best_approximation(tmp_path, tokens):
    model, _ = trained(tokens, configs()["full"])
    export_lora(model, tmp_path / "lora", rank=3)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    ours, theirs = (
        {name: module for name, module in each.named_modules() if hasattr(module, "lora_A")} for each in (model, plain)
    )
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        update = layer.get_delta_weight("default").detach().double()
        values = torch.linalg.svdvals(update)
        error = torch.linalg.norm(theirs[name].get_delta_weight("default").detach().double() - update)
        torch.testing.assert_close(error, values[3:].square().sum().sqrt(), atol=1e-6, rtol=1e-4)


def test_heads_and_biases_travel(tmp_path, tokens):
    model = get_peft_model(
        tiny_bert(),
        EigenLoraConfig(subspace=random_subspace(tiny_bert(), ["query"]), r=4, task_type="SEQ_CLS", bias="lora_only"),
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=tokens, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    expected = logits(model.eval(), tokens)
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_bert(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-5, rtol=1e-5)


def test_exports_any_lora_again(tmp_path, tokens):
    model, expected = trained(tokens, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-6, rtol=1e-6)


def test_refusals_leave_nothing(tmp_path, tokens):
    model, _ = trained(tokens, configs()["low_rank"])
    with pytest.raises(AdapterConfigError, match="adapter_name='other' is not in the model; it has 'default'"):
        export_lora(model, tmp_path / "lora", adapter_name="other")
    with pytest.raises(AdapterConfigError, match="rank=0 must be None or a whole number"):
        export_lora(model, tmp_path / "lora", rank=0)
    model.peft_config["idle"] = LoraConfig(target_modules=["q_proj"])  # PEFT knows it, and no layer has it
    with pytest.raises(AdapterConfigError, match="'idle' adapts no layer .* has the adapters 'default', 'idle': name"):
        export_lora(model, tmp_path / "lora", adapter_name="idle")
    del model.peft_config["idle"]
    assert not (tmp_path / "lora").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ArtifactError, match="holds files that eigenpeft did not write: thesis.tex"):
        export_lora(model, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def written(folder):
    """(config, tensors by key) of an exported adapter."""
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def test_every_module_has_the_one_rank_and_alpha_that_the_config_and_the_card_name(tmp_path, tokens):
    model, expected = trained(tokens, configs()["patterns"])
    export_lora(model, tmp_path / "lora")
    config, tensors = written(tmp_path / "lora")
    assert {len(value) for key, value in tensors.items() if "lora_A" in key} == {config["r"]} == {4}
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "one rank, 4, and one `lora_alpha`, 3, in all of its 4 modules" in card
    assert "padded with zeros" in card
    for name, layer in model.named_modules():  # the update as a reader of one alpha and one rank computes it
        if hasattr(layer, "lora_A"):
            a, b = (tensors[f"{name}.lora_{side}.weight"] for side in "AB")
            torch.testing.assert_close(config["lora_alpha"] / config["r"] * b @ a, layer.get_delta_weight("default"))


def test_an_adapter_of_one_rank_and_alpha_is_written_bit_for_bit(tmp_path, tokens):
    model, _ = trained(tokens, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    export_lora(model, tmp_path / "lora")
    _, tensors = written(tmp_path / "lora")
    state = get_peft_model_state_dict(model)
    assert tensors.keys() == state.keys()
    assert all(tensors[key].equal(state[key]) for key in tensors)
    assert "padded" not in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_groups_of_a_convolution_and_other_ranks_get_one_rank(tmp_path):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.grouped, self.linear = torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Linear(8, 5)

        def forward(self, x):
            return self.linear(self.grouped(x).mean((2, 3)))

    settings = {"rank_pattern": {"linear": 5}, "alpha_pattern": {"grouped": 7}}
    x = torch.randn(2, 4, 6, 6)
    model = get_peft_model(Two(), LoraConfig(r=2, target_modules=["grouped", "linear"], **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    expected = model.eval()(x)
    export_lora(model, tmp_path / "lora")
    again = PeftModel.from_pretrained(Two(), tmp_path / "lora").eval()
    assert written(tmp_path / "lora")[0]["r"] == 6  # the least rank that holds 5 and that 2 groups divide
    torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_and_folding_leave_the_update(dtype):
    def update(kind, n_blocks, rank, scaling):
        a = torch.randn(rank * (n_blocks if kind == "parameter" else 1), 6, generator=generator, dtype=dtype)
        columns = rank * n_blocks if kind == "parameter" else rank // n_blocks
        b = torch.randn(4, columns, generator=generator, dtype=dtype)
        return LoraUpdate(b, a, scaling, kind, (f"{kind}.A", f"{kind}.B"), kind=kind, n_blocks=n_blocks)

    def dense(each):
        """(experts, 4, 6), as PEFT's ParamWrapper reads the factors; one expert for a module."""
        experts = each.n_blocks if each.kind == "parameter" else 1
        a = each.lora_A.double().reshape(experts, -1, 6)
        b = each.lora_B.double().reshape(4, -1, experts)
        return each.scaling * torch.einsum("ore,eri->eoi", b, a)

    generator = torch.Generator().manual_seed(0)
    given = [update("parameter", 3, 2, 2.0), update("module", 1, 3, 2.0), update("nested", 1, 1, 0.3)]
    padded = with_one_rank_and_alpha(given)
    assert {(each.rank, each.scaling) for each in padded} == {(3, 2.0)}
    for before, after in zip(given, padded, strict=True):
        torch.testing.assert_close(dense(after), dense(before), atol=0, rtol=1e-6)


def test_an_update_of_scaling_zero_does_not_choose_the_scaling():
    pair = torch.ones(4, 1), torch.ones(1, 6)
    off = [LoraUpdate(*pair, 0.0, name, (f"{name}.A", f"{name}.B")) for name in "ab"]
    on = LoraUpdate(*pair, 2.0, "c", ("c.A", "c.B"))
    padded = with_one_rank_and_alpha([*off, on])
    assert [each.scaling for each in padded] == [2.0] * 3
    assert [float(each.lora_B.abs().sum()) for each in padded] == [0.0, 0.0, 4.0]


def test_a_readme_that_is_there_keeps_its_words(tmp_path, tokens):
    (tmp_path / "lora").mkdir()
    model, _ = trained(tokens, configs()["low_rank"])
    export_lora(model, tmp_path / "lora")
    readme = tmp_path / "lora" / "README.md"
    readme.write_text(f"# Poems\n\nMy notes.\n\n{readme.read_text()}\n## Licence\n\nMine.\n")
    export_lora(model, tmp_path / "lora", rank=2, overwrite=True)
    text = readme.read_text()
    assert text.startswith("# Poems\n\nMy notes.\n\n## Rank and scaling\n")
    assert text.endswith("## Licence\n\nMine.\n")
    assert text.count("## Rank and scaling") == 1
    assert "one rank, 2," in text


def test_a_trained_adapter_is_never_replaced_by_its_export(tmp_path, tokens):
    model, _ = trained(tokens, configs()["low_rank"])
    model.save_pretrained(tmp_path / "trained")
    before = {path.name: path.read_bytes() for path in (tmp_path / "trained").iterdir()}
    for overwrite in (False, True):
        with pytest.raises(
            ArtifactError, match="did not write: README.md, adapter_config.json, adapter_model.safetensors"
        ):
            export_lora(model, tmp_path / "trained", overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in (tmp_path / "trained").iterdir()} == before


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_the_updates_of_groups_are_not_truncated_together(tmp_path):
    grouped = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    model = get_peft_model(grouped, LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(
        AdapterConfigError, match="rank=1: '0' has 2 groups, whose updates cannot be truncated together"
    ):
        export_lora(model, tmp_path / "lora", rank=1)
    assert not (tmp_path / "lora").exists()
