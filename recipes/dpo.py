# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]", "pyyaml"]
# ///
"""Direct preference optimisation in a recycled subspace; the base model, adapter switched off, is the reference.

Paper:     DPO, arXiv 2305.18290; EigenLoRAx, arXiv 2502.04700 (method eigenlora); MoSLoRA, arXiv 2406.11909 (moslora).
Command:   accelerate launch recipes/dpo.py --config recipes/dpo.yaml --subspace DIR_OR_HUB_ID
Hardware:  one GPU, or a CPU with --use_cpu (and --bf16 False where it has no bfloat16 instructions);
           2.1 GB of memory for SmolLM2-135M in float32 (benchmarks/recipe_costs.py).
Time:      12 steps of 4 short pairs on SmolLM2-135M took 141 CPU seconds in float32 on one thread (benchmarks/recipe_costs.py), and
           43 in bfloat16 on a CPU that has it, loading and judging included (benchmarks/smollm2.py).
Expected:  a first loss of ln 2 = 0.693 (anything else means that the adapter does not start at the reference), then
           rewards/accuracies above 0.5; OUTPUT_DIR and OUTPUT_DIR/lora. Controls: --method random, same_parameters, lora.
           In those 12 steps (one seed) the training loss did not fall yet; on 32 held-out pairs the loss went from 0.693 to
           0.663, with LoRA r 16 to 0.673, accuracy 0.69 for both: within chance.
"""

from dataclasses import dataclass, field
from typing import Literal, cast

from datasets import load_dataset
from peft import LoraConfig, PeftModel
from trl import DPOConfig, DPOTrainer, TrlParser  # pyright: ignore[reportPrivateImportUsage] (trl has no __all__)

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


def main(arguments: Arguments, training: DPOConfig) -> None:
    dataset = load_dataset(arguments.dataset, arguments.dataset_config)
    trainer = DPOTrainer(
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
    main(*TrlParser((Arguments, DPOConfig)).parse_args_and_config())  # pyright: ignore[reportArgumentType] (any dataclass fits)
