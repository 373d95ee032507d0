"""Three LoRA adapters of SmolLM2-135M, trained on the tasks that `make smollm2` writes: what the engines are given to serve.

Command:  python benchmarks/engines/zoo.py --model smollm2/model --tasks smollm2/tasks --out engines-work/adapters
Hardware: a CPU; about 30 seconds per adapter on one core. Adapters that are there already are not trained again.

Ranks and alphas differ between modules, which the export has to bring to one rank and one alpha.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS, STEPS, BATCH, RATE = 3, 20, 4, 1e-3


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(model_dir: Path, task: Path, out: Path, *, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"k_proj": 4},
        alpha_pattern={"v_proj": 8},
        target_modules=MODULES,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    data = rows(task / "train.jsonl")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[: STEPS * BATCH].tolist()
    for step in range(STEPS):
        batch = [data[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in batch]
        tokens = tokenizer(texts, return_tensors="pt", padding=True)
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        for i, row in enumerate(batch):
            labels[i, : len(tokenizer(row["prompt"]).input_ids)] = -100
        loss = model(**tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{task.name} step {step} loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train three LoRA adapters of SmolLM2.")
    parser.add_argument("--model", type=Path, default=Path("smollm2/model"))
    parser.add_argument("--tasks", type=Path, default=Path("smollm2/tasks"))
    parser.add_argument("--out", type=Path, default=Path("engines-work/adapters"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for task in range(1, TASKS + 1):
        out = arguments.out / f"task-{task}"
        if not (out / "adapter_config.json").is_file():
            train(arguments.model, arguments.tasks / str(task), out, seed=task)


if __name__ == "__main__":
    main()
