"""Many tenants of one encoder: is every row answered by its own head, and how many rows a second?

Command:  python benchmarks/encoder_server.py        (about 4 minutes on one idle core; needs fastapi and uvicorn for --http)
Hardware: CPU, one thread, 2 GB of memory. Rows per second are medians of interleaved rounds in one process.
Writes:   benchmarks/results/encoder_server.json.

200 tenants of all-MiniLM-L6-v2: the ten shipped adapters in one store, each with 19 relatives whose cores and heads are shuffled
with a seed, so that no two tenants answer alike. Batches of 64 rows of random tenants, texts of banking77.
"right head": the logits of each of 10,000 rows against the tenant's own plain LoRA with its head in PEFT, one row at a time.

loop      PEFT adapters as modules of one model, chosen with set_adapter for the rows of each tenant in the batch.
merged    one merged copy of the encoder per tenant in the batch (all of them in memory, as many as fit).
bank      AdapterBank: one batch.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel
from timing import environment
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eigenpeft import AdapterBank, AdapterCollection, AdapterStore, SubspaceBuilder, export_lora
from eigenpeft.demo.assets import banking77, base_model, shipped_adapters
from eigenpeft.subspace import AdapterMember, Core

RESULTS = Path(__file__).parent / "results" / "encoder_server.json"
N_TENANTS, BATCH, N_ROWS, N_COMPONENTS = 200, 64, 10_000, 32


def relative(member: AdapterMember, generator: torch.Generator) -> AdapterMember:
    """Another tenant: the member's numbers, each changed by a tenth of its size."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + 0.3 * torch.randn(tensor.shape, generator=generator))

    cores = {
        module: Core(core.kind, {part: changed(tensor) for part, tensor in core.parts.items()}, core.scaling)
        for module, core in member.cores.items()
    }
    kept = {key: changed(tensor) for key, tensor in member.kept.items()}
    return AdapterMember(cores, record=dict(member.record), kept=kept, paths=dict(member.paths))


def make_store(folder: Path, n_tenants: int) -> AdapterStore:
    generator = torch.Generator().manual_seed(0)
    with AdapterCollection.from_pretrained(shipped_adapters()) as collection:
        subspace = SubspaceBuilder(N_COMPONENTS).fit(collection).subspace_
    store = AdapterStore(subspace)
    for path in shipped_adapters():
        store.add(path, name=path.name)
    sources = [store[name] for name in store.names]
    tenants = {f"tenant-{i:03d}": relative(sources[i % len(sources)], generator) for i in range(n_tenants)}
    store = AdapterStore(subspace, members=tenants)
    store.save_pretrained(folder)
    return AdapterStore.from_pretrained(folder)


def batches(tokenizer, names, n_rows: int, *, seed: int = 0):
    """(members, tokens) of batches of 64 rows, the last one smaller."""
    generator = torch.Generator().manual_seed(seed)
    texts = [row["text"] for row in banking77("test")]
    for start in range(0, n_rows, BATCH):
        size = min(BATCH, n_rows - start)
        members = [names[i] for i in torch.randint(len(names), (size,), generator=generator).tolist()]
        rows = [texts[i] for i in torch.randint(len(texts), (size,), generator=generator).tolist()]
        yield members, tokenizer(rows, return_tensors="pt", padding="max_length", truncation=True, max_length=32)
