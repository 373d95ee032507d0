"""Two processes (gloo) that train one adapter, whole or fully sharded, do what one does on the whole batch."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from eigenpeft import EigenLoraConfig, MosLoraConfig
from tests.processes import in_processes
from tests.tuners.conftest import random_subspace, tiny_llama


def made(method):
    torch.manual_seed(3)
    model = tiny_llama()
    common = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    if method == "moslora":
        return get_peft_model(model, MosLoraConfig(**common))
    return get_peft_model(
        model, EigenLoraConfig(subspace=random_subspace(model, ["q_proj", "v_proj"]), core=method, **common)
    )


def steps(model, tokens):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def worker(rank, method, tokens, folder):
    model = made(method)
    bases = {name: tensor.clone() for name, tensor in model.named_buffers() if "components" in name}
    steps(DistributedDataParallel(model), tokens[2 * rank : 2 * rank + 2])
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(tensor, bases[name]) for name, tensor in model.named_buffers() if name in bases)
    torch.save(trained, f"{folder}/rank{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moslora", "low_rank", "full", "diagonal"])
def test_ddp_equals_one_process(method, tmp_path):
    tokens = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    in_processes(worker, method, tokens, folder=tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    model = made(method)
    steps(model, tokens)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], parameter.detach(), atol=1e-5, rtol=1e-4)


def sharded(model, kind):
    """A model as PEFT's documentation wraps it (FSDP 1), or with every layer a unit (FSDP 2)."""
    if kind == "fully_shard":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    policy, device = fsdp_auto_wrap_policy(model), torch.device("cpu")
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=kind == "original parameters", device_id=device
    )


def expect_one_process(method, tokens, folder, names):
    """The logits in the files, and those of the adapter in `saved`, are what one process gets."""
    model = made(method)
    steps(model, tokens)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        saved = PeftModel.from_pretrained(tiny_llama(), folder / "saved")
        torch.testing.assert_close(saved(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-4)
    for name in names:
        torch.testing.assert_close(torch.load(folder / name, weights_only=True), expected, atol=1e-5, rtol=1e-4)


def fsdp_worker(rank, method, kinds, tokens, folder):
    for kind in kinds:
        model = sharded(made(method), kind)
        steps(model, tokens[2 * rank : 2 * rank + 2])
        with torch.no_grad():
            after = model(input_ids=tokens).logits.clone()
        torch.save(after, f"{folder}/{kind}{rank}.pt")
    # FSDP 1 cannot gather on the CPU (torch 2.13 frees the storage it is about to read), FSDP 2 can.
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{folder}/saved", state_dict=whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moslora", "low_rank", "diagonal"])
def test_fsdp_equals_one_process(method, tmp_path):
    kinds = ["original parameters", "flat parameters", "fully_shard"]
    tokens = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    in_processes(fsdp_worker, method, kinds, tokens, folder=tmp_path)
    expect_one_process(method, tokens, tmp_path, [f"{kind}{rank}.pt" for kind in kinds for rank in (0, 1)])
