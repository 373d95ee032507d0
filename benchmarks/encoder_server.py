"""Many tenants of one encoder: is every row answered by its own head, and how many rows per second?

Command:  python benchmarks/encoder_server.py
Hardware: CPU, one thread, 2 GB of memory; about 4 minutes on an idle core. Rows per second are medians of interleaved rounds.
Writes:   benchmarks/results/encoder_server.json. Fails if a row gets another head's logits.

200 tenants of all-MiniLM-L6-v2 in one store: relatives of the ten shipped classifiers, whose numbers, heads included, are each
changed by a random third, so that no two tenants answer alike. Texts of banking77. recipes/encoder_server.py is the server.

right head  Logits of each of 10,000 rows in mixed batches of 64 against those of the tenant's own export in PEFT, where its rows
            are batched alone.
bank        AdapterBank: one batch of 64 rows.
loop        64 of the tenants as PEFT adapters of one model; set_adapter and a forward pass for the rows of each tenant in the
            batch. (200 would make set_adapter slower.)
merged      One merged copy per tenant: as many forward passes as the loop, without adapters. Timed on the base model, which
            computes what a merged copy does; 200 copies are not held in memory here.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
import transformers
from peft import PeftModel
from timing import environment
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eigenpeft import AdapterBank, AdapterCollection, AdapterStore, SubspaceBuilder, export_lora
from eigenpeft.demo.assets import banking77, base_model, shipped_adapters
from eigenpeft.subspace import AdapterMember, Core

RESULTS = Path(__file__).parent / "results" / "encoder_server.json"
N_TENANTS, BATCH, N_ROWS, N_COMPONENTS = 200, 64, 10_000, 32


def relative(member: AdapterMember, generator: torch.Generator) -> AdapterMember:
    """Another tenant: the member's numbers, each changed by about a third of its size."""

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


def make_store(folder: Path) -> AdapterStore:
    generator = torch.Generator().manual_seed(0)
    with AdapterCollection.from_pretrained(shipped_adapters()) as collection:
        subspace = SubspaceBuilder(N_COMPONENTS).fit(collection).subspace_
        sources = AdapterStore.from_collection(subspace, collection)
    members = [sources[name] for name in sources.names]
    tenants = {f"tenant-{i:03d}": relative(members[i % len(members)], generator) for i in range(N_TENANTS)}
    AdapterStore(subspace, members=tenants).save_pretrained(folder)
    return AdapterStore.from_pretrained(folder)


def batches(tokenizer, names: list[str], n_rows: int, *, length: int, seed: int):
    """(members, tokens) of batches of 64 rows, the last one smaller."""
    generator = torch.Generator().manual_seed(seed)
    texts = [row["text"] for row in banking77("test")]
    for start in range(0, n_rows, BATCH):
        size = min(BATCH, n_rows - start)
        members = [names[i] for i in torch.randint(len(names), (size,), generator=generator).tolist()]
        rows = [texts[i] for i in torch.randint(len(texts), (size,), generator=generator).tolist()]
        yield members, tokenizer(rows, return_tensors="pt", padding="max_length", truncation=True, max_length=length)


def by_member(members: list[str]) -> dict[str, list[int]]:
    """Rows of each member."""
    rows = defaultdict(list)
    for row, member in enumerate(members):
        rows[member].append(row)
    return dict(rows)


def head_of(member: AdapterMember) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a member's classifier."""
    found = {key.rsplit(".", 1)[1]: tensor for key, tensor in member.kept.items() if "classifier" in key}
    return found["weight"], found["bias"]


@torch.no_grad()
def right_heads(store: AdapterStore, bank: AdapterBank, model, tokenizer, work: Path) -> dict:
    """Largest difference to each tenant's own adapter and head in PEFT, over 10,000 rows."""
    rows = defaultdict(lambda: {"tokens": [], "logits": []})
    for members, tokens in batches(tokenizer, list(store.names), N_ROWS, length=12, seed=1):
        with bank.use(members, logits="list"):
            logits = model(**tokens).logits
        for i, member in enumerate(members):
            rows[member]["tokens"].append({key: value[i] for key, value in tokens.items()})
            rows[member]["logits"].append(logits[i])
    wrong, largest, n_rows = 0, 0.0, 0
    for name, found in rows.items():
        export_lora(store, work / name, adapter_name=name)
        n_labels = len(head_of(store[name])[0])
        own = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=n_labels)
        own = PeftModel.from_pretrained(own, work / name).eval()
        tokens = {key: torch.stack([each[key] for each in found["tokens"]]) for key in found["tokens"][0]}
        expected, got = own(**tokens).logits, torch.stack(found["logits"])
        assert got.shape == expected.shape, (name, got.shape, expected.shape)
        differences = (got - expected).abs().amax(1)
        wrong, largest = wrong + int((differences > 1e-3).sum()), max(largest, float(differences.max()))
        n_rows += len(got)
    return {"rows": n_rows, "tenants": len(rows), "wrong": wrong, "largest_logit_difference": largest}


@torch.no_grad()
def throughput(store: AdapterStore, bank: AdapterBank, model, tokenizer, work: Path, *, rounds: int) -> dict:
    """Rows per second of the three ways, interleaved."""
    names = list(store.names)[:BATCH]
    plain = AutoModelForSequenceClassification.from_pretrained(base_model()).eval()
    plain.classifier = torch.nn.Identity()
    # The heads have different numbers of labels, which one PEFT model cannot hold: they are applied by hand.
    for name in names:
        config = json.loads((work / name / "adapter_config.json").read_text())
        (work / name / "adapter_config.json").write_text(
            json.dumps(config | {"modules_to_save": None, "task_type": None})
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the heads' keys are not read
        looped = PeftModel.from_pretrained(plain, work / names[0], adapter_name=names[0])
        for name in names[1:]:
            looped.load_adapter(work / name, adapter_name=name)
    looped.eval()
    base = AutoModelForSequenceClassification.from_pretrained(base_model()).eval()
    heads = {name: head_of(store[name]) for name in names}

    def run_bank(members, tokens):
        with bank.use(members, logits="list"):
            return model(**tokens).logits

    def run_loop(members, tokens):
        logits = [None] * len(members)
        for name, rows in by_member(members).items():
            looped.set_adapter(name)
            pooled = looped(**{key: value[rows] for key, value in tokens.items()}).logits
            for row, own in zip(rows, torch.nn.functional.linear(pooled, *heads[name]), strict=True):
                logits[row] = own
        return logits

    def run_merged(members, tokens):
        for rows in by_member(members).values():
            base(**{key: value[rows] for key, value in tokens.items()})

    seconds, agreed = defaultdict(list), 0.0
    for members, tokens in batches(tokenizer, names, rounds * BATCH, length=32, seed=2):
        answers = {}
        for way, run in {"bank": run_bank, "loop": run_loop, "merged": run_merged}.items():
            started = time.process_time()
            answers[way] = run(members, tokens)
            seconds[way].append(time.process_time() - started)
        pairs = zip(answers["bank"], answers["loop"], strict=True)
        agreed = max(agreed, *(float((ours - theirs).abs().max()) for ours, theirs in pairs))
    rates = {way: BATCH / median(times) for way, times in seconds.items()}
    ratios = [loop / ours for ours, loop in zip(seconds["bank"], seconds["loop"], strict=True)]
    return {
        "rows_per_cpu_second": rates,
        "over_loop": median(ratios),
        "over_merged": rates["bank"] / rates["merged"],
        "tenants_in_a_batch": median(len(by_member(m)) for m, _ in batches(tokenizer, names, 640, length=4, seed=2)),
        "largest_difference_to_loop": agreed,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput and correctness of many classifiers on one encoder.")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        store = make_store(work / "store")
        tokenizer = AutoTokenizer.from_pretrained(base_model())
        model = AutoModelForSequenceClassification.from_pretrained(base_model()).eval()
        bank = AdapterBank.from_store(store)
        n_base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        with bank.attached(model):
            results = {"right_head": right_heads(store, bank, model, tokenizer, work)}
            print(results, flush=True)
            results["throughput"] = throughput(store, bank, model, tokenizer, work, rounds=arguments.rounds)
        heads = sum(tensor.numel() * 4 for name in store.names for tensor in head_of(store[name]))
        results["bytes"] = {"base": n_base, "bank": bank.n_bytes, "heads": heads, "merged_copies": N_TENANTS * n_base}
    results["environment"] = environment()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    assert results["right_head"]["wrong"] == 0


if __name__ == "__main__":
    main()
