"""DeepSpeed ZeRO-3: two processes (gloo) on partitioned parameters do what one does, and save what they gather."""

import os

import pytest
import torch
from torch import multiprocessing

from tests.tuners.test_distributed import expect_one_process, made

deepspeed = pytest.importorskip("deepspeed", reason="needs DeepSpeed, which is not a dependency: pip install deepspeed")

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def worker(rank, method, tokens, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    deepspeed.init_distributed("gloo")
    model = made(method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    assert all(p.numel() == 0 for p in model.parameters())  # partitioned, base and adapters alike
    own = tokens[2 * rank : 2 * rank + 2]
    for _ in range(3):
        engine.backward(engine(input_ids=own, labels=own).loss)
        engine.step()
    with torch.no_grad():
        torch.save(engine(input_ids=tokens).logits.clone(), f"{folder}/rank{rank}.pt")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if rank == 0:
            model.save_pretrained(f"{folder}/saved")
    os._exit(0)  # DeepSpeed's own threads outlive the process group


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moslora", "low_rank", "diagonal"])
def test_zero_3_equals_one_process(method, tmp_path):
    tokens = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    port = 29500 + os.getpid() % 1000
    multiprocessing.spawn(worker, args=(method, tokens, str(tmp_path), port), nprocs=2)
    expect_one_process(method, tokens, tmp_path, ["rank0.pt", "rank1.pt"])
