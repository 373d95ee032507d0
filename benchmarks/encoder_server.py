"""Many tenants of one encoder: is every row answered by its own head, and how many rows per second?

Command:  python benchmarks/encoder_server.py [--parts right_head throughput]
Hardware: CPU, one thread, 2 GB of memory; about 6 minutes on an idle core. Rows per second are medians of interleaved rounds.
Writes:   benchmarks/results/encoder_server.json. Fails if a row gets another head's logits.

200 tenants of all-MiniLM-L6-v2 in one store: relatives of the ten shipped classifiers, whose numbers, heads included, are each
changed by a random third, so that no two tenants answer alike. Texts of banking77. recipes/encoder_server.py is the server.

right_head  Logits of each of 10,000 rows in mixed batches of 64 against those of the tenant's own export in PEFT, where its rows
            are batched alone.
throughput  Batches of 64 rows of random tenants, texts of at most 32 tokens. Every way pads rows to the longest that it computes
            together. Their logits are compared.

bank        AdapterBank as the server uses it: rows of like length in groups of 16, tenants mixed.
one_batch   AdapterBank, all 64 rows in one batch.
loop        All 200 tenants as PEFT adapters of one model; set_adapter and a forward pass for the rows of each tenant in the
            batch. `loop_set_adapter` is the share of its time that set_adapter takes.
merged      One merged copy per tenant: as many forward passes as the loop, without adapters. Timed on the base model, which
            computes what a merged copy does; 200 copies are not held in memory here.
base        The base model alone on the bank's groups: what no way of serving tenants can exceed.
"""

import argparse
import json
import runpy
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
RECIPE = Path(__file__).parents[1] / "recipes" / "encoder_server.py"
N_TENANTS, BATCH, N_ROWS, N_COMPONENTS, GROUP, LENGTH = 200, 64, 10_000, 32, 16, 32


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
    kept = {key: changed(tensor) for key, tensor in member.kept_aside.items()}
    return AdapterMember(cores, record=dict(member.record), kept_aside=kept, paths=dict(member.paths))


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
    found = {key.rsplit(".", 1)[1]: tensor for key, tensor in member.kept_aside.items() if "classifier" in key}
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


def looped_model(store: AdapterStore, work: Path) -> PeftModel:
    """All tenants as PEFT adapters of one model without a head: their numbers of labels differ, so heads are applied by hand."""
    plain = AutoModelForSequenceClassification.from_pretrained(base_model()).eval()
    plain.classifier = torch.nn.Identity()
    for name in store.names:
        if not (work / name).exists():
            export_lora(store, work / name, adapter_name=name)
        config = json.loads((work / name / "adapter_config.json").read_text())
        (work / name / "adapter_config.json").write_text(
            json.dumps(config | {"modules_to_save": None, "task_type": None})
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the heads' keys are not read
        first, *others = store.names
        looped = PeftModel.from_pretrained(plain, work / first, adapter_name=first)
        for name in others:
            looped.load_adapter(work / name, adapter_name=name)
    return looped.eval()


@torch.no_grad()
def throughput(store: AdapterStore, bank: AdapterBank, model, tokenizer, work: Path, *, rounds: int) -> dict:
    """Rows per second of the ways, interleaved."""
    by_length = runpy.run_path(str(RECIPE))["by_length"]
    looped = looped_model(store, work)
    base = AutoModelForSequenceClassification.from_pretrained(base_model()).eval()
    heads = {name: head_of(store[name]) for name in store.names}
    setting = []

    def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": tokens, "attention_mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long()}

    def in_groups(members, rows, size, run):
        logits = [None] * len(rows)
        for group in by_length([len(row) for row in rows], size=size):
            answers = run([members[i] for i in group], padded([rows[i] for i in group]))
            for i, own in zip(group, answers, strict=True):
                logits[i] = own
        return logits

    def by_bank(members, tokens):
        with bank.use(members, logits="list"):
            return model(**tokens).logits

    def by_loop(members, rows):
        logits = [None] * len(members)
        for name, own_rows in by_member(members).items():
            started = time.process_time()
            looped.set_adapter(name)
            setting[-1] += time.process_time() - started
            pooled = looped(**padded([rows[i] for i in own_rows])).logits
            for row, own in zip(own_rows, torch.nn.functional.linear(pooled, *heads[name]), strict=True):
                logits[row] = own
        return logits

    def by_copies(members, rows):
        for own_rows in by_member(members).values():
            base(**padded([rows[i] for i in own_rows]))

    ways = {
        "bank": lambda members, rows: in_groups(members, rows, GROUP, by_bank),
        "one_batch": lambda members, rows: in_groups(members, rows, BATCH, by_bank),
        "loop": by_loop,
        "merged": by_copies,
        "base": lambda members, rows: in_groups(members, rows, GROUP, lambda _, tokens: base(**tokens).logits),
    }
    seconds, agreed, tenants = defaultdict(list), 0.0, []
    for members, tokens in batches(tokenizer, list(store.names), rounds * BATCH, length=LENGTH, seed=2):
        lengths = tokens["attention_mask"].sum(1).tolist()
        rows = [row[:length] for row, length in zip(tokens["input_ids"], lengths, strict=True)]
        setting.append(0.0)
        tenants.append(len(by_member(members)))
        answers = {}
        for way, run in ways.items():
            started = time.process_time()
            answers[way] = run(members, rows)
            seconds[way].append(time.process_time() - started)
        for way in ("bank", "one_batch"):
            pairs = zip(answers[way], answers["loop"], strict=True)
            agreed = max(agreed, *(float((ours - theirs).abs().max()) for ours, theirs in pairs))
        print({way: round(times[-1], 3) for way, times in seconds.items()}, flush=True)
    ratios = {
        way: sorted(round(theirs / ours, 2) for ours, theirs in zip(seconds["bank"], seconds[way], strict=True))
        for way in ways
    }
    return {
        "rows_per_cpu_second": {way: round(BATCH / median(times), 1) for way, times in seconds.items()},
        "bank_over": {way: {"median": median(found), "rounds": found} for way, found in ratios.items()},
        "loop_set_adapter": median(part / whole for part, whole in zip(setting, seconds["loop"], strict=True)),
        "tenants_in_a_batch": median(tenants),
        "largest_difference_to_loop": agreed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput and correctness of many classifiers on one encoder.")
    parser.add_argument(
        "--parts", nargs="+", default=["right_head", "throughput"], choices=["right_head", "throughput"]
    )
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        store = make_store(work / "store")
        tokenizer = AutoTokenizer.from_pretrained(base_model())
        model = AutoModelForSequenceClassification.from_pretrained(base_model()).eval()
        bank = AdapterBank.from_store(store)
        n_base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        with bank.attached(model):
            if "right_head" in arguments.parts:
                results["right_head"] = right_heads(store, bank, model, tokenizer, work)
                print(results["right_head"], flush=True)
            if "throughput" in arguments.parts:
                results["throughput"] = throughput(store, bank, model, tokenizer, work, rounds=arguments.rounds)
        heads = sum(tensor.numel() * 4 for name in store.names for tensor in head_of(store[name]))
        results["bytes"] = {"base": n_base, "bank": bank.n_bytes, "heads": heads, "merged_copies": N_TENANTS * n_base}
    results["environment"] = environment()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    assert results["right_head"]["wrong"] == 0


if __name__ == "__main__":
    main()
