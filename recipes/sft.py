# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]", "pyyaml"]
# ///
"""Supervised fine-tuning in a recycled subspace, then the same task as a plain LoRA.

Paper:     EigenLoRAx, arXiv 2502.04700 (method eigenlora); MoSLoRA, arXiv 2406.11909 (method moslora).
Command:   accelerate launch recipes/sft.py --config recipes/sft.yaml --subspace DIR_OR_HUB_ID
Hardware:  one GPU, or a CPU with --use_cpu (and --bf16 False where it has no bfloat16 instructions);
           2.0 GB of memory for SmolLM2-135M in float32 (benchmarks/recipe_costs.py).
Time:      16 steps of 4 short rows on SmolLM2-135M took 106 CPU seconds in float32 on one thread (benchmarks/recipe_costs.py), and
           37 (qasc) to 47 (gsm8k) in bfloat16 on a CPU that has it, loading and judging included (benchmarks/smollm2.py).
Expected:  OUTPUT_DIR with the coefficients, OUTPUT_DIR/lora with the same adapter as a plain LoRA, and the evaluation loss
           where --eval_strategy asks for it. Run it again with --method random, same_parameters and lora: only the difference to
           those says that recycling helped. In those 16 steps (one seed) the held-out loss on qasc fell from 4.90
           to 1.31, with LoRA r 16 to 1.34; on gsm8k from 1.54 to 1.08, with LoRA r 16 to 1.06.
"""

from dataclasses import dataclass, field
from typing import Literal, cast

from datasets import load_dataset
from peft import LoraConfig, PeftModel
from trl import SFTConfig, SFTTrainer, TrlParser  # pyright: ignore[reportPrivateImportUsage] (trl has no __all__)

from eigenpeft import AdapterCollection, EigenLoraConfig, MosLoraConfig, export_lora
from eigenpeft.tuners import control_config


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Base model: local path or Hub id."})
    dataset: str = field(metadata={"help": "Folder of JSONL files (train.jsonl, test.jsonl) or Hub id."})
    dataset_config: str | None = field(default=None)
    subspace: str | None = field(default=None, metadata={"help": "Subspace: local path or Hub id."})
    method: Literal["eigenlora", "moslora", "random", "shuffled", "mean_only", "same_parameters", "lora"] = field(
        default="eigenlora",
        metadata={"help": "From 'random' on: controls of 'eigenlora', a learning rate of its own for each."},
    )
    adapters: str | None = field(default=None, metadata={"help": "What the subspace was built from, for 'mean_only'."})
    r: int = field(default=16)
    lora_alpha: int = field(default=32)
    core: Literal["low_rank", "full", "diagonal"] = field(default="low_rank")


def peft_config(arguments: Arguments) -> LoraConfig:
    shared = {"r": arguments.r, "lora_alpha": arguments.lora_alpha, "task_type": "CAUSAL_LM"}
    if arguments.method == "moslora":
        return MosLoraConfig(**shared)
    if arguments.method == "lora" and arguments.subspace is None:
        return LoraConfig(**shared)
    if arguments.subspace is None:
        raise SystemExit(
            f"--method {arguments.method} needs --subspace, a folder or Hub id (recipes/build_subspace.py)."
        )
    config = EigenLoraConfig(subspace=arguments.subspace, core=arguments.core, **shared)
    if arguments.method == "eigenlora":
        return config
    collection = AdapterCollection.from_pretrained(arguments.adapters) if arguments.adapters else None
    return control_config(config, control=arguments.method, collection=collection)


def main(arguments: Arguments, training: SFTConfig) -> None:
    dataset = load_dataset(arguments.dataset, arguments.dataset_config)
    trainer = SFTTrainer(
        model=arguments.model,
        args=training,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"] if training.eval_strategy != "no" else None,
        peft_config=peft_config(arguments),
    )
    model = cast(PeftModel, trainer.model)
    model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        export_lora(model, f"{training.output_dir}/lora")
    trainer.accelerator.print(f"Wrote {training.output_dir} and {training.output_dir}/lora.")


if __name__ == "__main__":
    main(*TrlParser((Arguments, SFTConfig)).parse_args_and_config())  # pyright: ignore[reportArgumentType] (any dataclass fits)
