# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]", "pyyaml"]
# ///
"""Train a personalised reward model end to end: backbone adapter, reward basis and users' weights together.

Paper:     LoRe, arXiv 2504.14439.
Command:   python recipes/lore.py --config recipes/lore.yaml --dataset comparisons.jsonl --model MODEL --out rewards
Hardware:  whatever trains MODEL with LoRA; several processes with `accelerate launch`.
Time:      30 steps of 8 short pairs on SmolLM2-135M took 71 CPU seconds on one thread; that is too few to tell two kinds of user
           apart there. benchmarks/lore_smollm2.py starts from a fit on frozen features instead (docs/lore.md).
Expected:  accuracy of known users above their population_accuracy if their tastes differ; for new users the two are equal by
           construction until they are fitted (the last lines do that). Try `eigenpeft lore evaluate` on frozen features first: it
           takes minutes and tells whether personalisation pays at all.

The data are TRL's preference format (chosen, rejected, perhaps prompt; text or messages) with a column that names the user.
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path

import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from eigenpeft import EigenLoraConfig, MosLoraConfig
from eigenpeft.trainers import LoReConfig, LoReTrainer

METHODS = {"lora": LoraConfig, "moslora": MosLoraConfig, "eigenlora": EigenLoraConfig}


def split(rows, column, *, users, comparisons, seed):
    """Training set, held-out comparisons of its users, comparisons of held-out users."""
    generator = random.Random(seed)
    names = sorted({str(name) for name in rows[column]})
    away = set(generator.sample(names, round(users * len(names))))
    train, seen, new = [], [], []
    for i, name in enumerate(rows[column]):
        part = new if str(name) in away else seen if generator.random() < comparisons else train
        part.append(i)
    return {name: rows.select(part) for name, part in (("train", train), ("seen_users", seen), ("new_users", new))}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments, changes = parser.parse_known_args()
    config = yaml.safe_load(arguments.config.read_text())
    known = {field.name for field in dataclasses.fields(LoReConfig)}
    for name, value in zip(changes[::2], changes[1::2], strict=True):
        if name.removeprefix("--") not in known:
            parser.error(f"{name} is not a setting of LoReConfig")
        config["training"][name.removeprefix("--")] = yaml.safe_load(value)
    settings = LoReConfig(f"{arguments.out}-training", **config["training"])

    parts = split(
        Dataset.from_json(str(arguments.dataset)),
        settings.user_column,
        users=config["held_out_users"],
        comparisons=config["held_out_comparisons"],
        seed=settings.seed,
    )
    adapter = dict(config["adapter"] or {})
    trainer = LoReTrainer(
        arguments.model,
        settings,
        train_dataset=parts["train"],
        eval_dataset={name: part for name, part in parts.items() if name != "train" and len(part)},
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=METHODS[adapter.pop("method")](task_type="SEQ_CLS", **adapter) if adapter else None,
    )
    trainer.train()
    metrics = trainer.evaluate()
    model = trainer.reward_model()
    if trainer.accelerator.is_main_process:
        model.save_pretrained(arguments.out)
        (arguments.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print({name: value for name, value in metrics.items() if "accuracy" in name or "gain" in name})
        print(
            f"Wrote {arguments.out}: {model!r}. Add new users with: eigenpeft lore add-user {arguments.out} USER DATASET"
        )


if __name__ == "__main__":
    main()
