# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]", "pyyaml"]
# ///
"""Turn an existing LoRA adapter into coefficients: project it onto a subspace, then distil what the projection lost.

Paper:     EigenLoRAx, arXiv 2502.04700 (projection); on-policy distillation, arXiv 2306.13649.
Command:   accelerate launch recipes/distill_lora.py --config recipes/distill_lora.yaml --lora DIR --subspace DIR
Hardware:  one GPU, or a CPU with --use_cpu --bf16 False; 2.2 GB of memory for SmolLM2-135M in
           float32 (student and teacher are both loaded).
Time:      the projection takes seconds; 12 steps of 4 prompts with 16 new tokens on SmolLM2-135M took 187 CPU seconds on one
           thread of two busy cores (benchmarks/recipe_costs.py).
Expected:  the mean divergence (KL) from the adapter's own next-token distribution on the prompts, before and after;
           OUTPUT_DIR with the coefficients. In those 12 steps, on a random subspace, it went from 1.513 to 1.481. Where "before"
           is already small, stop there: --max_steps 0 skips training.
"""

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from datasets import load_dataset
from peft import PeftModel
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer, TrlParser  # pyright: ignore[reportPrivateImportUsage] (trl has no __all__)

from eigenpeft import EigenLoraConfig


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Base model: local path or Hub id."})
    lora: str = field(metadata={"help": "Folder or Hub id of the LoRA adapter."})
    subspace: str = field(metadata={"help": "Subspace: local path or Hub id."})
    dataset: str = field(metadata={"help": "Folder of JSONL files or Hub id, with a column `prompt`."})
    r: int = field(default=16)
    lora_alpha: int = field(default=32)
    core: Literal["low_rank", "full", "diagonal"] = field(default="low_rank")
    n_measured: int = field(default=32, metadata={"help": "Prompts on which the divergence is measured."})


@torch.no_grad()
def divergence(student, teacher, tokenizer, prompts: list[str]) -> float:
    """Mean KL(teacher | student) of the next-token distribution over the prompts' tokens, in nats."""
    total, count = 0.0, 0
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt").to(student.device)
        ours = log_softmax(student(**tokens).logits.float(), -1)
        theirs = log_softmax(teacher(**tokens.to(teacher.device)).logits.float(), -1).to(ours.device)
        total += float(kl_div(ours, theirs, log_target=True, reduction="sum"))
        count += ours.shape[1]
    return total / max(count, 1)


def main(arguments: Arguments, training: DistillationConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_dataset(arguments.dataset, split="train").select_columns(["prompt"])
    base = AutoModelForCausalLM.from_pretrained(arguments.model)
    teacher = PeftModel.from_pretrained(base, arguments.lora).merge_and_unload().eval()
    trainer = DistillationTrainer(
        model=arguments.model,
        teacher_model=teacher,
        args=training,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=EigenLoraConfig(
            subspace=arguments.subspace,
            init_from=arguments.lora,
            r=arguments.r,
            lora_alpha=arguments.lora_alpha,
            core=arguments.core,
            task_type="CAUSAL_LM",
        ),
    )
    student, prompts = cast(PeftModel, trainer.model).eval(), rows["prompt"][: arguments.n_measured]
    with student.disable_adapter():
        print(f"divergence of the base model: {divergence(student, teacher, tokenizer, prompts):.4f}")
    print(f"divergence after projection: {divergence(student, teacher, tokenizer, prompts):.4f}")
    if training.max_steps:
        trainer.train()
        student.eval()
        print(
            f"divergence after {trainer.state.global_step} steps: {divergence(student, teacher, tokenizer, prompts):.4f}"
        )
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((Arguments, DistillationConfig)).parse_args_and_config())  # pyright: ignore[reportArgumentType] (any dataclass fits)
