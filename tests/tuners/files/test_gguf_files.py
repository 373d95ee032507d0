"""export_gguf: what the file holds, read back by the gguf package and by transformers' own reader of that layout."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from eigenpeft import AdapterCollection, AdapterStore, EigenLoraConfig, SubspaceBuilder
from eigenpeft.errors import AdapterConfigError, ArtifactError
from eigenpeft.tuners import export_gguf
from eigenpeft.tuners.files import gguf_files
from tests.tuners.conftest import random_subspace, tiny_bert, tiny_gpt2, tiny_llama, train

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"0.self_attn.q_proj": 2, "1.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 3}}


def trained(tokens, config, base=tiny_llama, **changes):
    model = get_peft_model(base(**changes), config)
    train(model, tokens)
    return model


def read(path):
    """(fields, arrays by name) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def updates(path, config):
    """ΔW by llama.cpp's name of the weight, by llama.cpp's rule, rows of q and k put back by transformers' GGUF reader."""
    fields, arrays = read(path)
    processor = LlamaTensorProcessor(config={"num_attention_heads": config.num_attention_heads})
    processor.config["num_key_value_heads"] = config.num_key_value_heads
    found = {}
    for name in {name.rsplit(".", 1)[0] for name in arrays}:
        a, b = arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
        dense = fields["adapter.lora.alpha"] / b.shape[1] * (b @ (a.T if "token_embd" in name else a))
        found[name] = processor.process(dense, name=name).weights
    return found


def expected(model):
    """ΔW by PEFT, by llama.cpp's name of the weight."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    return {
        names.get_name(path.removeprefix("base_model.model.")) + ".weight": layer.get_delta_weight("default").detach()
        for path, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LoraConfig(r=4, lora_alpha=10, target_modules=EVERYTHING), {}),
        (LoraConfig(r=4, lora_alpha=10, target_modules=EVERYTHING, **PATTERNS), {}),
        (LoraConfig(r=4, use_rslora=True, target_modules=["q_proj", "k_proj"]), {"head_dim": 6}),
        (LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "v_proj"]), {"tie_word_embeddings": False}),
        (LoraConfig(r=4, lora_alpha=0, target_modules=["q_proj"]), {}),
    ],
    ids=["all layers", "patterns", "wide heads", "embeddings", "alpha 0"],
)
def test_llama_cpps_rule_on_the_file_gives_pefts_update(tmp_path, tokens, config, changes):
    model = trained(tokens, config, **changes)
    export_gguf(model, tmp_path / "adapter.gguf")
    fields, _ = read(tmp_path / "adapter.gguf")
    wanted = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    assert {name: fields[name] for name in wanted} == wanted
    assert fields["adapter.lora.alpha"] != 0  # which llama.cpp reads as "no alpha"
    found, right = updates(tmp_path / "adapter.gguf", model.config), expected(model)
    assert found.keys() == right.keys()
    for name, update in right.items():
        torch.testing.assert_close(torch.tensor(found[name]), update.T if "token_embd" in name else update)


def test_an_adapter_in_a_subspace_and_a_member_of_a_store(tmp_path, tokens):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    subspace = random_subspace(tiny_llama(), ["q_proj", "k_proj"])
    model = trained(tokens, EigenLoraConfig(subspace=subspace, r=4, core="diagonal", task_type="CAUSAL_LM"))
    export_gguf(model, tmp_path / "trained.gguf", rank=5)
    assert {b.shape[1] for name, b in read(tmp_path / "trained.gguf")[1].items() if name.endswith("lora_b")} == {5}
    for i in range(2):
        lora = trained(tokens, LoraConfig(r=2 + i, target_modules=["q_proj", "k_proj"]))
        lora.peft_config["default"].base_model_name_or_path = str(base)
        lora.save_pretrained(tmp_path / "adapters" / str(i))
    with AdapterCollection.from_pretrained(tmp_path / "adapters") as collection:
        store = AdapterStore.from_collection(SubspaceBuilder(5).fit(collection).subspace_, collection)
    export_gguf(store, tmp_path / "member.gguf", adapter_name="1")
    assert read(tmp_path / "member.gguf")[0]["general.base_model.0.name"] == str(base)
    for name, update in updates(tmp_path / "member.gguf", lora.config).items():
        torch.testing.assert_close(torch.tensor(update), expected(lora)[name], atol=1e-6, rtol=1e-4)


def test_permuted_interleaves_the_halves_of_each_head():
    rows = torch.arange(24).view(12, 2)
    direct = [rows[head * 6 + half * 3 + i].tolist() for head in range(2) for i in range(3) for half in range(2)]
    assert gguf_files.permuted(rows, 2).tolist() == direct


def lora(**changes):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})


BAD_MODELS = {
    "another architecture": (
        lambda: get_peft_model(tiny_gpt2(), LoraConfig(r=2, fan_in_fan_out=True)),
        "architecture 'gpt2'",
    ),
    "an encoder": (
        lambda: get_peft_model(tiny_bert(), lora(target_modules=["query"])),
        "architecture 'bert'; GGUF is written",
    ),
    "a module trained in full": (
        lambda: get_peft_model(tiny_llama(), lora(modules_to_save=["model.norm"])),
        r"trained 1 tensors in full, such as 'base_model\.model\.model\.norm\.weight'",
    ),
    "trained biases": (
        lambda: get_peft_model(tiny_llama(attention_bias=True), lora(bias="lora_only")),
        r"trained 2 tensors in full, such as '.*q_proj.*bias'",
    ),
    "a tied output layer": (
        lambda: get_peft_model(tiny_llama(tie_word_embeddings=True), lora(target_modules=["lm_head"])),
        "'lm_head' is tied to the embeddings",
    ),
    "a bias of LoRA's own": (
        lambda: get_peft_model(tiny_llama(), lora(lora_bias=True)),
        r"has a trained bias \(lora_bias\)",
    ),
    "DoRA": (lambda: get_peft_model(tiny_llama(), lora(use_dora=True)), "uses DoRA"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter .default.. 2 LoRA tensor")
def test_models_that_the_format_cannot_hold_are_refused_by_name(tmp_path, kind):
    make, message = BAD_MODELS[kind]
    with pytest.raises(AdapterConfigError, match=message):
        export_gguf(make(), tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


def changed(**changes):
    return LlamaConfig(**{**tiny_llama().config.to_dict(), **changes})


BAD_ARGUMENTS = {
    "other sizes": (
        {"base_model": changed(hidden_size=64)},
        r"is \(32, 32\) .* in the adapter and \(32, 64\) in the base",
    ),
    "fewer layers": (
        {"base_model": changed(num_hidden_layers=1)},
        r"layers\.1\..*q_proj' has no place .* with 1 layers",
    ),
    "no base model": (
        {"base_model": "no/such-model"},
        r"'no/such-model' cannot be read .* pass base_model \(--model\)",
    ),
    "a name the Hub does not take": ({"base_model": "a/b/c/d"}, "'a/b/c/d' cannot be read"),
    "no such adapter": ({"adapter_name": "other"}, "adapter_name='other' is not in the model"),
    "no rank": ({"rank": 0}, "rank=0 must be None or a whole number"),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_and_leave_what_was_there(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, message = BAD_ARGUMENTS[kind]
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF of before")
    with pytest.raises(AdapterConfigError, match=message):
        export_gguf(get_peft_model(tiny_llama(), lora()), tmp_path / "adapter.gguf", overwrite=True, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]
    assert (tmp_path / "adapter.gguf").read_bytes() == b"GGUF of before"


def test_factors_that_are_not_finite_are_refused(tmp_path):
    model = get_peft_model(tiny_llama(), lora())
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight[3, 1] = float("nan")
    with pytest.raises(AdapterConfigError, match=r"layers\.1\.self_attn\.q_proj' has factors that are not finite"):
        export_gguf(model, tmp_path / "adapter.gguf")


def test_other_files_and_folders_are_not_replaced(tmp_path):
    model = get_peft_model(tiny_llama(), lora())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt' already exists; pass overwrite=True"):
        export_gguf(model, tmp_path / "notes.txt")
    with pytest.raises(ArtifactError, match=r"notes\.txt' is not a GGUF file and is not replaced"):
        export_gguf(model, tmp_path / "notes.txt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match="a folder of that name is in the way"):
        export_gguf(model, tmp_path)
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        export_gguf(model, tmp_path / "notes.txt" / "adapter.gguf")
    export_gguf(model, tmp_path / "adapter.gguf")
    with pytest.raises(ArtifactError, match=r"adapter\.gguf' already exists; pass overwrite=True"):
        export_gguf(model, tmp_path / "adapter.gguf")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, tokens, monkeypatch):
    model = trained(tokens, lora())
    export_gguf(model, tmp_path / "adapter.gguf")
    before = (tmp_path / "adapter.gguf").read_bytes()

    def full(self, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        export_gguf(model, tmp_path / "adapter.gguf", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]
    assert (tmp_path / "adapter.gguf").read_bytes() == before


def test_without_the_package_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "gguf", None)
    with pytest.raises(AdapterConfigError, match=r"needs the package gguf.*eigenpeft\[gguf\]"):
        export_gguf(get_peft_model(tiny_llama(), lora()), tmp_path / "adapter.gguf")
