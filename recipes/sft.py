# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]"]
# ///
"""Supervised fine-tuning with coefficients on a recycled subspace, or with MoSLoRA; then export to plain LoRA.

Paper:     EigenLoRAx, arXiv 2502.04700; MoSLoRA, arXiv 2406.11909.
Command:   accelerate launch recipes/sft.py --config recipes/sft.yaml --subspace subspace --output_dir out
Hardware:  any; smoke-tested for two steps on one CPU core with a tiny model. Not yet timed on a real model.
Expected:  out/ holds the adapter, out/lora the same as a plain LoRA. Run --method lora beside it: no result stands alone.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig

from eigenpeft import EigenLoraConfig, MosLoraConfig, export_lora
from trl import SFTConfig, SFTTrainer, TrlParser


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of the base model."})
    dataset: str = field(metadata={"help": "Folder or Hub id of a data set that SFTTrainer takes."})
    method: str = field(default="eigenlora", metadata={"help": "eigenlora, moslora or lora (the control)."})
    subspace: str | None = field(default=None, metadata={"help": "Folder or Hub id of the subspace (eigenlora)."})
    core: str = field(default="low_rank", metadata={"help": "low_rank, mixer or diagonal (eigenlora)."})
    r: int = field(default=8, metadata={"help": "Rank."})
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Modules (moslora and lora)."}
    )


def main(arguments: Arguments, training: SFTConfig):
    shared = {"r": arguments.r, "lora_alpha": 2 * arguments.r, "task_type": "CAUSAL_LM"}
    if arguments.method == "eigenlora":
        config = EigenLoraConfig(subspace=arguments.subspace, core=arguments.core, **shared)
    else:
        method = {"moslora": MosLoraConfig, "lora": LoraConfig}[arguments.method]
        config = method(target_modules=arguments.target_modules, **shared)
    dataset = load_dataset(arguments.dataset, split="train")
    trainer = SFTTrainer(model=arguments.model, args=training, train_dataset=dataset, peft_config=config)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        export_lora(trainer.accelerator.unwrap_model(trainer.model), Path(training.output_dir) / "lora")


if __name__ == "__main__":
    main(*TrlParser((Arguments, SFTConfig)).parse_args_and_config())
