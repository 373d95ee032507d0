"""A real vLLM server with the plugin: members of a store as models over HTTP, what they answer, what that costs.

Command:  make vllm   (its own environment, .vllm)
Hardware: a CPU, 8 GB of memory; about 10 minutes on two idle cores.
Writes:   benchmarks/results/vllm.json. Fails if a number is outside of what `check` states.

A store of 200 members of SmolLM2-135M: mixtures of three trained adapters, each with a core of rank 8 in bases of 12 components.
The server may keep 8 adapters in memory and the cache about 20 on disk, so that both give adapters up and load them again.
Reference for texts: transformers with the member as `export_lora` writes it, greedy, float32. Reference for the first request: the
same LoRA from a folder that was written before, loaded by the server's own endpoint. Both in one run, interleaved.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenpeft import AdapterCollection, AdapterStore, SubspaceBuilder, export_lora
from eigenpeft.engines import sync_adapters
from eigenpeft.subspace import AdapterMember, Core
from eigenpeft.subspace.cores import CORES

RESULTS = Path(__file__).parents[1] / "results" / "vllm.json"
PORT, RANK, N_COMPONENTS, N_MEMBERS, N_COMPARED, N_TIMED = 8377, 8, 12, 200, 20, 24
N_TOKENS, N_CACHED = 16, 20
PROMPT = "Customer: My card has not arrived yet, what should I do?\nIntent:"


def mixed(sources: list[AdapterMember], subspace, weights: torch.Tensor, model: Path) -> AdapterMember:
    """A mixture of adapters at rank 8, in the coordinates of the bases."""
    cores = {}
    for module in subspace:
        factors = [source[module].factors() for source in sources]
        out = torch.cat([weight * c_out for weight, (c_out, _) in zip(weights.tolist(), factors, strict=True)], dim=1)
        inner = torch.cat([c_in for _, c_in in factors])
        cores[module] = Core("low_rank", CORES["low_rank"].from_factors(out, inner, rank=RANK))
    return AdapterMember(cores, record={"base_model": str(model), "task_type": "CAUSAL_LM"})


def make_store(arguments: argparse.Namespace, folder: Path) -> None:
    """200 customers: weights of three adapters, from a Dirichlet distribution, times two."""
    if folder.exists():
        return
    with AdapterCollection.from_pretrained(arguments.work / "adapters") as collection:
        subspace = SubspaceBuilder(N_COMPONENTS).fit(collection).subspace_
        projected = AdapterStore.from_collection(subspace, collection)
    sources = [projected[name] for name in projected.names]
    torch.manual_seed(0)
    draws = 2 * torch.distributions.Dirichlet(torch.full((len(sources),), 0.5)).sample((N_MEMBERS,))
    members = {
        f"customer-{i:03d}": mixed(sources, subspace, weights, arguments.model) for i, weights in enumerate(draws)
    }
    AdapterStore(subspace, members=members).save_pretrained(folder)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ask(path: str, body: dict | None = None) -> tuple[int, dict | str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def complete(model: str, *, n_tokens: int = N_TOKENS) -> tuple[int, str]:
    """(status, text or message) of one greedy completion."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
    status, answer = ask("/v1/completions", body)
    if status == 200:
        assert answer["model"] == model, answer
        return status, answer["choices"][0]["text"]
    return status, answer["error"]["message"]


@contextmanager
def server(arguments: argparse.Namespace, store: Path, cache: Path, cache_bytes: int):
    """vLLM with the plugin; stopped at the end of the block."""
    settings = {
        "EIGENPEFT_STORE": store,
        "EIGENPEFT_CACHE_DIR": cache,
        "EIGENPEFT_CACHE_GB": cache_bytes / 1e9,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": 1,
        "VLLM_CPU_KVCACHE_SPACE": 1,
        "VLLM_NO_USAGE_STATS": 1,
        "HF_HUB_OFFLINE": 1,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": "",
    }
    command = [arguments.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.model]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 256, "--host", "127.0.0.1", "--port", PORT]
    command += ["--enable-lora", "--max-lora-rank", RANK, "--max-loras", 4, "--max-cpu-loras", 8, "--max-num-seqs", 4]
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    with (arguments.work / "vllm.log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 900
            while True:
                try:
                    if ask("/health")[0] == 200:
                        break
                except OSError as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"vLLM did not start; see {log.name}.") from error
                time.sleep(2)
            yield process
        finally:
            process.terminate()
            process.wait(60)


@torch.no_grad()
def by_transformers(model, tokenizer, folder: Path) -> str:
    """What transformers and PEFT write after the prompt with an exported adapter."""
    adapted = PeftModel.from_pretrained(model, folder).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt")
    adapted.generation_config.eos_token_id = None  # the server is asked to go on after it as well
    full = adapted.generate(**tokens, max_new_tokens=N_TOKENS, do_sample=False)
    adapted.unload()
    return tokenizer.decode(full[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)


def first_requests(store: AdapterStore, names: list[str], work: Path, *, n_tokens: int) -> dict:
    """Seconds of a member's first request, by the plugin and from a folder that was there, one after the other."""
    seconds = {"plugin": [], "folder": []}
    for i, name in enumerate(names):
        folder = work / "folders" / name
        export_lora(store, folder, adapter_name=name, overwrite=True)
        for way in ("plugin", "folder") if i % 2 else ("folder", "plugin"):
            started = time.perf_counter()
            if way == "folder":
                status, answer = ask("/v1/load_lora_adapter", {"lora_name": f"folder/{name}", "lora_path": str(folder)})
                assert status == 200, answer
            status, text = complete(f"folder/{name}" if way == "folder" else name, n_tokens=n_tokens)
            seconds[way].append(time.perf_counter() - started)
            assert status == 200, text
    ratios = [ours / theirs for ours, theirs in zip(seconds["plugin"], seconds["folder"], strict=True)]
    return {
        "plugin_seconds": statistics.median(seconds["plugin"]),
        "folder_seconds": statistics.median(seconds["folder"]),
        "ratio_of_medians": statistics.median(seconds["plugin"]) / statistics.median(seconds["folder"]),
        "median_of_ratios": statistics.median(ratios),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
    }


def sizes(store_folder: Path, one_folder: int) -> dict:
    """Bytes of this store and of as many folders; of 1,000 members, the part of each member times five."""
    total, bases = size(store_folder), (store_folder / "subspace.safetensors").stat().st_size
    return {
        "store": total,
        "bases": bases,
        "one_folder": one_folder,
        "store_of_1000": bases + (total - bases) * 1000 // N_MEMBERS,
        "1000_folders": 1000 * one_folder,
    }


def run(arguments: argparse.Namespace, note) -> None:
    """All checks; `note(name, result)` is called after each."""
    work = arguments.work
    store_folder = work / "shop"
    cache = (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else work) / "eigenpeft-run-vllm"
    for left in (cache, work / "folders", work / "synced", store_folder):
        shutil.rmtree(left, ignore_errors=True)
    make_store(arguments, work / "shop-as-made")
    shutil.copytree(work / "shop-as-made", store_folder)
    store = AdapterStore.from_pretrained(store_folder)
    export_lora(store, work / "folders" / "one", adapter_name=store.names[0])
    one = size(work / "folders" / "one")
    bound = int(N_CACHED * one * 1.05)
    note("bytes", sizes(store_folder, one))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    with server(arguments, store_folder, cache, bound) as process:
        note("unknown", dict(zip(("status", "message"), complete("shop/custmer-007"), strict=True)))
        note("new_member", new_member(store, base, tokenizer, work))
        assert complete("shop/customer-003", n_tokens=1)[0] == 200
        store.remove("customer-003")
        note("removed", dict(zip(("status", "message"), complete("shop/customer-003"), strict=True)))
        for n_tokens, first in ((1, 10), (N_TOKENS, 10 + N_TIMED)):
            timed = list(store.names[first : first + N_TIMED])
            note(f"first_request_of_{n_tokens}_tokens", first_requests(store, timed, work, n_tokens=n_tokens))
        if arguments.first_requests:
            return
        largest, texts, failed, started = 0, {}, {}, time.monotonic()
        compared = store.names[:: N_MEMBERS // N_COMPARED][:N_COMPARED]
        for i, name in enumerate(store.names):
            status, text = complete(f"shop/{name}", n_tokens=N_TOKENS if name in compared else 2)
            (texts if status == 200 else failed)[name] = text
            largest = max(largest, size(cache))
            if i % 20 == 19:  # a run that is stopped leaves what it saw, and how long that took
                answers = {"asked": i + 1, "members": len(texts), "failed": failed}
                note("answers", answers | {"seconds": round(time.monotonic() - started)})
        short = {tokenizer.decode(tokenizer(text).input_ids[:2]) for text in texts.values()}
        note("different_texts_of_2_tokens", len(short))
        folders = len(list(cache.glob("[0-9a-f]*")))
        note("cache", {"bound": bound, "largest": largest, "folders_at_the_end": folders, "one_folder": one})
        address = f"http://127.0.0.1:{PORT}"
        report = sync_adapters(address, store=store_folder, out_dir=work / "synced", names=["latecomer"])
        there = {"latecomer" in name for name in report.loaded + report.kept}
        note("synced", {"loaded": there == {True}, "failed": report.failed})
        note("server_still_runs", process.poll() is None and ask("/health")[0] == 200)
    equal = 0
    for name in compared:
        export_lora(store, work / "folders" / f"c-{name}", adapter_name=name)
        equal += by_transformers(base, tokenizer, work / "folders" / f"c-{name}") == texts.get(name)
    note("equal_to_transformers", {"compared": len(compared), "equal": equal})
    shutil.rmtree(cache, ignore_errors=True)


def new_member(store: AdapterStore, base, tokenizer, work: Path) -> dict:
    """A member that is added while the server runs, with weights that no other has."""
    assert complete("shop/latecomer")[0] == 404
    first, second = (store[name] for name in store.names[1:3])
    cores = {module: Core("low_rank", {**first[module].parts}, scaling=1.7) for module in first}
    store.add(AdapterMember(cores, record=dict(second.record)), name="latecomer")
    status, text = complete("shop/latecomer")
    export_lora(store, work / "folders" / "latecomer", adapter_name="latecomer")
    return {"status": status, "equal": text == by_transformers(base, tokenizer, work / "folders" / "latecomer")}


def check(results: dict) -> None:
    """What the plugin promises; times are in the results and not checked."""
    assert results["answers"]["members"] == N_MEMBERS, results["answers"]  # one was removed and one added
    assert results["cache"]["largest"] <= results["cache"]["bound"]
    assert results["equal_to_transformers"]["equal"] == N_COMPARED
    assert results["new_member"] == {"status": 200, "equal": True}
    assert results["unknown"]["status"] == 404
    assert "customer-007" in results["unknown"]["message"]
    assert results["removed"]["status"] == 404
    assert results["synced"]["failed"] == {}
    assert results["server_still_runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description="A vLLM server that serves the members of a store.")
    parser.add_argument("--model", type=Path, default=Path("smollm2/model"))
    parser.add_argument("--work", type=Path, default=Path("engines-work"), help="With adapters/, from zoo.py.")
    parser.add_argument("--vllm-python", default=".vllm/bin/python", help="Python with vLLM and eigenpeft.")
    parser.add_argument(
        "--first-requests", action="store_true", help="Time first requests only; keeps the other results."
    )
    arguments = parser.parse_args()
    arguments.model, arguments.work = arguments.model.resolve(), arguments.work.resolve()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if arguments.first_requests else {}

    def note(name: str, result) -> None:
        results[name] = result
        print(name, result, flush=True)
        RESULTS.write_text(json.dumps({"command": "make vllm", "results": results}, indent=2) + "\n", encoding="utf-8")

    run(arguments, note)
    check(results)


if __name__ == "__main__":
    main()
