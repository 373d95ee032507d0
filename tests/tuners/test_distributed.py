"""Two processes that train one adapter with DistributedDataParallel (gloo) do what one process does on the whole batch."""

import pytest
import torch
from peft import get_peft_model
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from eigenpeft import EigenLoraConfig, MosLoraConfig
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
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = made(method)
    bases = {name: tensor.clone() for name, tensor in model.named_buffers() if "components" in name}
    steps(DistributedDataParallel(model), tokens[2 * rank : 2 * rank + 2])
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(tensor, bases[name]) for name, tensor in model.named_buffers() if name in bases)
    torch.save(trained, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moslora", "low_rank", "mixer", "diagonal"])
def test_ddp_equals_one_process(method, tmp_path):
    tokens = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    multiprocessing.spawn(worker, args=(method, tokens, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    model = made(method)
    steps(model, tokens)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], parameter.detach(), atol=1e-5, rtol=1e-4)
