"""The adapter in training as plain LoRA folders, and in a server that keeps a table of adapters."""

import json
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from eigenpeft.errors import AdapterConfigError, EigenPeftError
from eigenpeft.trainers.policy_sync import PolicySyncCallback, plain_lora_for_async_grpo, save_plain_lora
from tests.engines.test_syncing import Server
from tests.processes import in_processes
from tests.trl.conftest import CONFIGS, make_trainer, tiny_base

pytestmark = pytest.mark.filterwarnings("default")
TOKENS = torch.tensor([[3, 4, 5, 6]])


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_versions_are_what_was_trained_at_a_rank_that_vllm_takes(kind, make_config, tmp_path):
    with Server("/v1") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        callback = PolicySyncCallback(tmp_path / "policies", every=2, server=server.url)
        model = get_peft_model(tiny_base(), make_config(kind))
        trainer = make_trainer("sft", tmp_path, model=model, callbacks=[callback], max_steps=4, learning_rate=0.1)
        trainer.train()
        server.shutdown()
        thread.join()
    assert callback.latest == "policy-v4"
    assert [name for path, name in server.log if "unload" not in path] == ["policy-v0", "policy-v2", "policy-v4"]
    assert list(server.adapters) == ["policy-v2", "policy-v4"]
    # The oldest folder stays until one version later: an engine may read it late.
    assert sorted(path.name for path in (tmp_path / "policies").iterdir()) == ["policy-v0", "policy-v2", "policy-v4"]
    config = json.loads((tmp_path / "policies" / "policy-v4" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"] in (1, 8, 16)) == ("LORA", True)
    plain = PeftModel.from_pretrained(tiny_base(), tmp_path / "policies" / "policy-v4")
    torch.testing.assert_close(logits(plain), logits(trainer.model), atol=1e-4, rtol=1e-4)
    start = PeftModel.from_pretrained(tiny_base(), tmp_path / "policies" / "policy-v0")
    assert not torch.allclose(logits(start), logits(plain), atol=1e-3)


def test_a_server_that_does_not_load_stops_the_training(make_config, tmp_path):
    with Server("/v1") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        server.refuses.add("policy-v0")
        callback = PolicySyncCallback(tmp_path / "policies", server=server.url)
        model = get_peft_model(tiny_base(), make_config("eigen_low_rank"))
        with pytest.raises(EigenPeftError, match="did not load 'policy-v0': 400: policy-v0 cannot be loaded"):
            make_trainer("sft", tmp_path, model=model, callbacks=[callback], max_steps=1).train()
        server.shutdown()
        thread.join()


def test_what_cannot_be_handed_over_is_refused(tmp_path):
    with pytest.raises(EigenPeftError, match="every=0 and keep=2 must be whole numbers of at least 1"):
        PolicySyncCallback(tmp_path, every=0)
    model = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(AdapterConfigError, match=r"'default' trains '.*lm_head.*' in full, which engines do not load"):
        save_plain_lora(model, adapter_name="default", out_dir=tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def sharded_parameters(rank, folder):
    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (1,))))
    with pytest.raises(AdapterConfigError, match=r"sharded \(FSDP\); synchronise an adapter from unsharded processes"):
        save_plain_lora(model, adapter_name="default", out_dir=Path(folder) / "lora")


def test_sharded_parameters_are_refused(tmp_path):
    in_processes(sharded_parameters, folder=tmp_path, n=1)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("kind", ["eigen_diagonal", "moslora"])
def test_trls_asynchronous_grpo_writes_plain_lora_in_the_block_alone(kind, make_config, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL says that this part is experimental
        trainer = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    accelerator = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
    model = get_peft_model(tiny_base(), make_config(kind))
    trainer.validate_lora_for_vllm_sync(model)  # TRL takes our adapters for LoRA's ...
    original = trainer.save_lora_adapter
    original(model, accelerator, "default", str(tmp_path / "before"))
    assert (
        json.loads((tmp_path / "before" / "adapter_config.json").read_text())["peft_type"] != "LORA"
    )  # ... and would send this
    with plain_lora_for_async_grpo():
        trainer.save_lora_adapter(model, accelerator, "default", str(tmp_path / "policy"))
        lora = get_peft_model(tiny_base(), LoraConfig(r=3, target_modules=["q_proj"]))
        trainer.save_lora_adapter(lora, accelerator, "default", str(tmp_path / "theirs"))
    assert trainer.save_lora_adapter is original
    monkeypatch.delattr(trainer, "save_lora_adapter")
    with pytest.raises(EigenPeftError, match=r"This TRL has no .*\.save_lora_adapter, which TRL 1\.16 has; install"):
        plain_lora_for_async_grpo().__enter__()
    monkeypatch.undo()
    assert json.loads((tmp_path / "policy" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["r"] == 3  # TRL's own, not padded
    plain = PeftModel.from_pretrained(tiny_base(), tmp_path / "policy")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)
