"""What a TRL run leaves behind: resumes exactly, reloads, merges, and shows vLLM the base model's own names."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from eigenpeft import export_lora
from tests.trl.trainers import Method, history, make_trainer, tiny_model, trained_model

METHODS = ("eigenlora low_rank", "eigenlora mixer", "eigenlora diagonal", "moslora")
TOKENS = torch.arange(4, 24).reshape(2, 10)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", METHODS)
def test_sft_resumes_with_the_same_trajectory(name, subspace_folder, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    method = Method(name, subspace_folder)
    whole = make_trainer("sft", method, tmp_path, **settings)
    whole.train()
    resumed = make_trainer("sft", method, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-3"))
    assert history(whole, "loss") == history(resumed, "loss")
    for key, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, whole.model.get_parameter(key), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("trained", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize("name", METHODS)
def test_saved_reloaded_exported_and_merged_give_the_same_logits(kind, name, trained, subspace_folder, tmp_path):
    trainer = make_trainer(kind, Method(name, subspace_folder), tmp_path, trained=trained)
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    trainer.train()
    for config in trainer.model.peft_config.values():
        config.base_model_name_or_path = str(base)
    trainer.save_model(str(tmp_path / "adapter"))
    want = logits(trainer.model)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")), want)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), want)
    export_lora(trainer.model, tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "lora")), want)
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), want)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want)


@pytest.mark.parametrize("name", METHODS)
def test_vllm_is_sent_the_merged_weights_under_the_base_names(name, subspace_folder):
    model = trained_model("sft", Method(name, subspace_folder)).eval()
    want, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    # TRL's own reading of the weights; the engine, which is not here, only receives them.
    sender = SimpleNamespace(
        model=model,
        _dist=SimpleNamespace(gather_params=lambda _: nullcontext(), is_fsdp=False),
        _fix_param_name_to_vllm=lambda name, **extra: VLLMGeneration._fix_param_name_to_vllm(None, name, **extra),
    )
    sent = {key: value.clone() for key, value in VLLMGeneration._iter_named_params(sender)}
    receiver = tiny_model()
    assert sent.keys() == dict(receiver.named_parameters()).keys()
    receiver.load_state_dict(sent, strict=False)
    torch.testing.assert_close(logits(receiver), want)
    after = model.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), want)
