# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]", "pyyaml"]
# ///
"""Group relative policy optimisation in a recycled subspace, with a reward that a regular expression can verify.

Paper:     GRPO, arXiv 2402.03300; EigenLoRAx, arXiv 2502.04700 (method eigenlora); MoSLoRA, arXiv 2406.11909 (moslora).
Command:   accelerate launch recipes/grpo.py --config recipes/grpo.yaml --subspace DIR_OR_HUB_ID
Hardware:  one GPU, or a CPU with --use_cpu (and --bf16 False where it has no bfloat16 instructions);
           2.3 GB of memory for SmolLM2-135M in float32 (benchmarks/recipe_costs.py).
Time:      16 steps of 16 completions of 8 tokens on SmolLM2-135M took 267 CPU seconds in float32 on one thread
           (benchmarks/recipe_costs.py), and 80 in bfloat16 on a CPU that has it (benchmarks/smollm2.py).
Expected:  a first kl of 0, then the logged `reward` (share of right last numbers) rising; OUTPUT_DIR and OUTPUT_DIR/lora.
           Controls: --method random, same_parameters, lora. On sums below 20 (one seed) the reward rose from 0.19 in the first
           4 of those 16 steps to 0.39 in the last 8, with LoRA r 16 alike. Questions with a numeric answer are sampled
           from the `question` and `answer` columns (as gsm8k has them).

Few numbers (TinyLoRA, arXiv 2602.04118: thirteen reach most of the gain by reinforcement learning): --core diagonal trains K
numbers per module and --core full --n_components 8 trains 64, each with --method random as its control; --method tinylora
--tiny_u 13 trains 13 in all, --method lora --r 1 and --r 8 are the usual ones. benchmarks/grpo.py compares them (docs/trl.md).

--algorithm rloo trains with REINFORCE leave-one-out (arXiv 2402.14740) instead, with the same flags. --rewards FOLDER takes the
rewards of a LoRe model (recipes/lore.py): each prompt as its own user would, named in the column --user_column; the data then have
`prompt` (or `question`) and that column, and no answers.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import load_dataset
from peft import LoraConfig, PeftConfig, TinyLoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TrlParser  # pyright: ignore[reportPrivateImportUsage] (trl has no __all__)

from eigenpeft import AdapterCollection, EigenLoraConfig, LowRankRewardModel, MosLoraConfig, export_lora
from eigenpeft.trainers import PolicySyncCallback
from eigenpeft.tuners import control_config


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Base model: local path or Hub id."})
    dataset: str = field(metadata={"help": "Folder of JSONL files (train.jsonl, test.jsonl) or Hub id."})
    dataset_config: str | None = field(default=None)
    algorithm: Literal["grpo", "rloo"] = field(default="grpo")
    rewards: str | None = field(
        default=None,
        metadata={"help": "LoRe reward model: local path or Hub id. Its rewards take the place of right last numbers."},
    )
    user_column: str = field(default="user_id", metadata={"help": "Column that names the user of each prompt."})
    subspace: str | None = field(default=None, metadata={"help": "Subspace: local path or Hub id."})
    method: Literal[
        "eigenlora", "moslora", "random", "shuffled", "mean_only", "same_parameters", "lora", "tinylora"
    ] = field(
        default="eigenlora",
        metadata={"help": "From 'random' on: controls of 'eigenlora', a learning rate of its own for each."},
    )
    adapters: str | None = field(default=None, metadata={"help": "What the subspace was built from, for 'mean_only'."})
    r: int = field(default=16)
    lora_alpha: int = field(default=32)
    core: Literal["low_rank", "full", "diagonal"] = field(default="low_rank")
    n_components: int | None = field(
        default=None, metadata={"help": "Use the first K components; K (diagonal) or K * K (full) numbers per module."}
    )
    tiny_u: int = field(default=13, metadata={"help": "TinyLoRA: numbers that all modules share."})
    sync_out_dir: str | None = field(
        default=None,
        metadata={"help": "Write the adapter here as a plain LoRA every --sync_every steps, for an engine."},
    )
    sync_every: int = field(default=1)
    sync_server: str | None = field(
        default=None, metadata={"help": "Address of a vLLM or SGLang server that loads each version from there."}
    )


def last_number(text: str) -> str:
    """The last number of a text, without separators; empty if there is none."""
    found = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return found[-1].replace(",", "").rstrip(".") if found else ""


def last_number_is_right(completions: list[str], solution: list[str], **_) -> list[float]:
    """1 where the completion's last number is the solution's, else 0."""
    return [float(last_number(text) == want) for text, want in zip(completions, solution, strict=True)]


def peft_config(arguments: Arguments) -> PeftConfig:
    if arguments.method == "tinylora":
        return TinyLoraConfig(u=arguments.tiny_u, weight_tying=1.0, target_modules="all-linear", task_type="CAUSAL_LM")
    shared = {"r": arguments.r, "lora_alpha": arguments.lora_alpha, "task_type": "CAUSAL_LM"}
    if arguments.method == "moslora":
        return MosLoraConfig(**shared)
    if arguments.method == "lora" and arguments.subspace is None:
        return LoraConfig(**shared)
    if arguments.subspace is None:
        raise SystemExit(
            f"--method {arguments.method} needs --subspace, a folder or Hub id (recipes/build_subspace.py)."
        )
    config = EigenLoraConfig(
        subspace=arguments.subspace, core=arguments.core, n_components=arguments.n_components, **shared
    )
    if arguments.method == "eigenlora":
        return config
    collection = AdapterCollection.from_pretrained(arguments.adapters) if arguments.adapters else None
    return control_config(config, control=arguments.method, collection=collection)


def reward_function(arguments: Arguments) -> Callable[..., list[float]]:
    """Right last numbers, or what each prompt's own user prefers."""
    if arguments.rewards is None:
        return last_number_is_right
    return LowRankRewardModel.from_pretrained(arguments.rewards).reward_func(user_column=arguments.user_column)


def prepared(row: dict, arguments: Arguments) -> dict[str, str]:
    """The columns that trainer and reward read, besides the row's own."""
    prompt = row["prompt"] if "prompt" in row else row["question"]
    return {"prompt": prompt} | ({} if arguments.rewards else {"solution": last_number(row["answer"])})


def callbacks(arguments: Arguments) -> list[TrainerCallback]:
    if arguments.sync_out_dir is None:
        return []
    return [PolicySyncCallback(arguments.sync_out_dir, every=arguments.sync_every, server=arguments.sync_server)]


def main(arguments: Arguments, training: GRPOConfig) -> None:
    dataset = load_dataset(arguments.dataset, arguments.dataset_config)
    dataset = dataset.map(prepared, fn_kwargs={"arguments": arguments})
    kind: Any = RLOOTrainer if arguments.algorithm == "rloo" else GRPOTrainer  # each takes the config chosen below
    trainer = kind(
        model=arguments.model,
        reward_funcs=reward_function(arguments),
        args=training,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"] if training.eval_strategy != "no" else None,
        peft_config=peft_config(arguments),
        callbacks=callbacks(arguments),
    )
    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if arguments.method == "tinylora":  # its update is not a product of two small factors that a LoRA could hold
        trainer.accelerator.print(f"Wrote {training.output_dir}.")
        return
    if trainer.accelerator.is_main_process:
        export_lora(trainer.model, f"{training.output_dir}/lora")
    trainer.accelerator.print(f"Wrote {training.output_dir} and {training.output_dir}/lora.")


if __name__ == "__main__":
    algorithm = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    algorithm.add_argument("--algorithm", default="grpo")
    settings = RLOOConfig if algorithm.parse_known_args()[0].algorithm == "rloo" else GRPOConfig
    main(*TrlParser((Arguments, settings)).parse_args_and_config())  # pyright: ignore[reportArgumentType] (any dataclass fits)
