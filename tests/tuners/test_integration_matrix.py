"""The steps that a PEFT method meets between its making and its use, on Llama (Linear) and GPT-2 (Conv1D)."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils import get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import multiprocessing
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from eigenpeft import (
    AdapterCollection,
    AdapterStore,
    EigenLoraConfig,
    MosLoraConfig,
    PrincipalSubspace,
    export_lora,
)
from eigenpeft.tuners import ShardLoraConfig
from eigenpeft.tuners.layers.linear import InputFactor, MixedFactor, OutputFactor
from eigenpeft.tuners.layers.shards import ShardFactor
from eigenpeft.tuners.shardlora.sharing import SHARINGS
from tests.tuners.conftest import (
    MODELS,
    is_conv1d,
    logits,
    needs_own_adapters,
    random_subspace,
    train,
    trained_by_trainer,
)

# shards, input, output: the sharings of ShardLoRA
# offset: "low_rank" from a merge that it cannot hold; paired: "diagonal" on paired directions
METHODS = ("moslora", "low_rank", "full", "diagonal", "mixture", "offset", "paired", "shards", "input", "output")
pytestmark = [
    pytest.mark.parametrize("method", METHODS),
    pytest.mark.parametrize("architecture", MODELS.values(), ids=MODELS, indirect=False),
]


def config(architecture, method, tmp_path, **more):
    make, suffixes = architecture
    common = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "fan_in_fan_out": is_conv1d(architecture)} | more
    if method == "moslora":
        return MosLoraConfig(target_modules=list(suffixes), **common)
    if method in SHARINGS:
        return ShardLoraConfig(target_modules=list(suffixes), sharing=method, pool_rank=3, **common)
    subspace = random_subspace(make(), suffixes)
    if method == "paired":
        subspace = paired(subspace)
    if not (tmp_path / "subspace").exists():
        subspace.save_pretrained(tmp_path / "subspace")
    if method in ("mixture", "offset"):
        common |= start(architecture, method, tmp_path, subspace)
    core = {"offset": "low_rank", "paired": "diagonal"}.get(method, method)
    return EigenLoraConfig(subspace=str(tmp_path / "subspace"), target_modules=list(suffixes), core=core, **common)


def paired(subspace):
    """The same with rows of unit norm that are not orthogonal."""

    def leaning(rows):
        return torch.nn.functional.normalize(rows + 0.5 * rows.roll(1, dims=0), dim=1)

    return PrincipalSubspace(
        {
            name: replace(
                bank,
                components_in=leaning(bank.components_in),
                components_out=leaning(bank.components_out),
                paired=True,
            )
            for name, bank in subspace.items()
        },
        info=replace(subspace.info, method="paired"),
    )


def start(architecture, method, tmp_path, subspace):
    """Adapters to start from: a mixture of two with weights of 0, or the mean of two, of which low_rank holds a part."""
    make, suffixes = architecture
    if not (tmp_path / "sources").exists():
        for seed, name in enumerate(("one", "two")):
            options = {"init_lora_weights": False, "fan_in_fan_out": is_conv1d(architecture), "task_type": "CAUSAL_LM"}
            base = make()
            torch.manual_seed(seed)
            plain = get_peft_model(base, LoraConfig(r=3, target_modules=list(suffixes), **options))
            plain.save_pretrained(tmp_path / "sources" / name)
        sources = AdapterCollection.from_pretrained(tmp_path / "sources")
        AdapterStore.from_collection(subspace, sources).save_pretrained(tmp_path / "store")
    if method == "mixture":
        return {"sources": str(tmp_path / "store"), "init_weights": 0.0}
    return {"init_from": "mean", "init_adapters": str(tmp_path / "sources"), "init_scale": 0.5}


@pytest.fixture
def trained(architecture, method, tmp_path, tokens):
    """(trained model, its logits), with its base saved at "base" and itself at "adapter"."""
    base = architecture[0]()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config.name_or_path = str(tmp_path / "base")
    model = get_peft_model(base, config(architecture, method, tmp_path))
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    return model, expected


def same(model, tokens, expected, atol=1e-5):
    torch.testing.assert_close(logits(model.eval(), tokens), expected, atol=atol, rtol=1e-5)


def test_gradients_reach_every_trained_tensor(architecture, method, tmp_path, tokens):  # 1
    model = get_peft_model(architecture[0](), config(architecture, method, tmp_path, init_lora_weights=False))
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


def test_config_round_trip(trained, tmp_path):  # 2
    model, _ = trained
    loaded = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(model.peft_config["default"])
    for name in ("r", "lora_alpha", "target_modules", "peft_type", "requires_package"):
        assert getattr(loaded, name) == getattr(model.peft_config["default"], name)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained(architecture, trained, tmp_path, tokens, low_cpu_mem_usage):  # 3, 4
    loaded = PeftModel.from_pretrained(architecture[0](), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded.eval(), tokens), trained[1])


def test_auto_model(trained, tmp_path, tokens):  # 5
    assert torch.equal(
        logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), tokens), trained[1]
    )


def test_load_adapter_and_mixed_batch(architecture, method, trained, tmp_path, tokens):  # 6, 7
    base = logits(architecture[0](), tokens)
    fresh = get_peft_model(architecture[0](), config(architecture, method, tmp_path))
    default = logits(fresh.eval(), tokens)
    assert torch.equal(default, base) == (method != "offset")
    fresh.load_adapter(tmp_path / "adapter", adapter_name="other")
    fresh.set_adapter("other")
    assert torch.equal(logits(fresh.eval(), tokens), trained[1])
    mixed = fresh(input_ids=tokens, adapter_names=["other", "default", "__base__"]).logits
    for row, expected in enumerate((trained[1], default, base)):
        torch.testing.assert_close(mixed[row], expected[row], atol=1e-5, rtol=1e-5)


@needs_own_adapters
def test_transformers_own_methods(architecture, method, tmp_path, tokens):  # 8, 9, 10, 11
    model = architecture[0]()
    model.add_adapter(config(architecture, method, tmp_path))
    expected = train(model, tokens)
    model.save_pretrained(tmp_path / "own")
    fresh = architecture[0]()
    fresh.load_adapter(str(tmp_path / "own"))
    assert torch.equal(logits(fresh.eval(), tokens), expected)
    fresh.delete_adapter("default")
    same(fresh, tokens, logits(architecture[0](), tokens))


def test_transformers_auto_model_opens_an_adapter(trained, tmp_path, tokens):  # 12
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), tokens), trained[1])


def test_copies_and_pickles(trained, tokens, tmp_path):  # 13, 14, 15
    model, expected = trained
    assert torch.equal(logits(copy.deepcopy(model), tokens), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), tokens), expected)
    torch.save(model, tmp_path / "whole.pt")
    assert torch.equal(logits(torch.load(tmp_path / "whole.pt", weights_only=False), tokens), expected)


def _in_worker(_, model, tokens, expected):
    torch.set_num_threads(1)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-5, rtol=1e-5)


class Rows:
    """A data set that carries a configuration of ours into the loader's workers."""

    def __init__(self, tokens, config):
        self.tokens, self.config = tokens, config

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        assert self.config.requires_package == "eigenpeft"
        return self.tokens[index]


@pytest.mark.slow
def test_spawned_processes(architecture, trained, method, tokens):  # 16, 17
    if architecture is not MODELS["llama"] or method not in ("moslora", "low_rank"):
        pytest.skip("a process a case is slow; pickling of the others is tested above")
    model, expected = trained
    multiprocessing.spawn(_in_worker, args=(model, tokens, expected), nprocs=1)
    rows = Rows(tokens, model.peft_config["default"])
    loader = DataLoader(rows, batch_size=3, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader)), tokens)


@pytest.mark.slow
def test_compiles_in_one_graph(trained, tokens, no_shape_checks):  # 18
    model, expected = trained
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    same(compiled, tokens, expected)


def test_merge_and_unload(trained, tokens):  # 19
    model, expected = trained
    merged = model.merge_and_unload()
    assert not any(
        isinstance(module, InputFactor | OutputFactor | MixedFactor | ShardFactor) for module in merged.modules()
    )
    same(merged, tokens, expected)


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT's conversion leaves it out
def test_becomes_plain_lora(architecture, trained, tmp_path, tokens):  # 20, 21
    model, expected = trained
    export_lora(model, tmp_path / "plain")
    same(PeftModel.from_pretrained(architecture[0](), tmp_path / "plain"), tokens, expected)
    lora_config, state = convert_to_lora(model, rank=16)
    plain = get_peft_model(architecture[0](), lora_config)
    set_peft_model_state_dict(plain, state)
    same(plain, tokens, expected, atol=1e-3)


def test_hotswap(architecture, method, trained, tmp_path, tokens):  # 22
    fresh = get_peft_model(architecture[0](), config(architecture, method, tmp_path, lora_alpha=16))
    train(fresh, tokens, lr=0.1)
    hotswap_adapter(fresh, str(tmp_path / "adapter"), adapter_name="default")
    same(fresh, tokens, trained[1])


def test_status(trained):  # 23
    model, _ = trained
    status = model.get_model_status()
    assert status.enabled
    assert status.active_adapters == ["default"]
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {layer.module_type for layer in model.get_layer_status()} == {"lora.Linear"}


@pytest.mark.slow
def test_trainer_resumes(architecture, method, tmp_path, tokens):  # 24
    def make():
        torch.manual_seed(0)
        return get_peft_model(architecture[0](), config(architecture, method, tmp_path))

    trained_by_trainer(make, tokens, tmp_path / "run", steps=2)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = trained_by_trainer(make, tokens, tmp_path / "run", steps=4, resume_from_checkpoint=checkpoint)
    whole = trained_by_trainer(make, tokens, tmp_path / "run", steps=4)
    same(resumed, tokens, logits(whole, tokens))


def test_injection_without_a_peft_model(architecture, method, tmp_path, tokens):  # 25
    model = inject_adapter_in_model(config(architecture, method, tmp_path), architecture[0]())
    expected = train(model, tokens)
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    fresh = inject_adapter_in_model(config(architecture, method, tmp_path), architecture[0]())
    set_peft_model_state_dict(fresh, state)
    assert torch.equal(logits(fresh.eval(), tokens), expected)
