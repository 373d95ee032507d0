# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]"]
# ///
"""Export a trained adapter as a plain LoRA, check that nothing changed, and say how to serve it.

Paper:     LoRA, arXiv 2106.09685: what is exported; MoSLoRA, arXiv 2406.11909, equation 3: why its mixer folds into B.
Command:   python recipes/export_and_serve.py --adapter DIR_OR_HUB_ID --model DIR_OR_HUB_ID --out OUT
Hardware:  whatever loads the base model; no matrix of the size of a weight is formed.
Time:      that of loading the base model twice.
Expected:  the largest difference between the logits of the adapter and of the export (about 1e-5 in float32), OUT/lora,
           OUT/merged with --merge, and the commands for vLLM and llama.cpp (documented by those projects, not run here).
"""

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from eigenpeft import export_lora


@dataclass
class Arguments:
    adapter: str = field(metadata={"help": "Trained adapter: local path or Hub id."})
    model: str = field(metadata={"help": "Its base model: local path or Hub id."})
    out: str = field(default="served")
    rank: int | None = field(default=None, metadata={"help": "Truncate to this rank, optimally; default: exact."})
    merge: bool = field(default=False, metadata={"help": "Also write a whole model with the adapter folded in."})
    prompt: str = field(default="The capital of France is", metadata={"help": "Text on which the logits are compared."})


SERVE = """
vLLM:      vllm serve {model} --enable-lora --max-lora-rank {r} --lora-modules task={out}/lora
llama.cpp: python convert_lora_to_gguf.py {out}/lora --base {model} --outfile task.gguf
           llama-server -m MODEL.gguf --lora task.gguf
"""


@torch.no_grad()
def main(arguments: Arguments) -> None:
    def base():
        return AutoModelForCausalLM.from_pretrained(arguments.model)

    tokens = AutoTokenizer.from_pretrained(arguments.model)(arguments.prompt, return_tensors="pt")
    model = PeftModel.from_pretrained(base(), arguments.adapter).eval()
    wanted = model(**tokens).logits
    export_lora(model, f"{arguments.out}/lora", rank=arguments.rank)
    plain = PeftModel.from_pretrained(base(), f"{arguments.out}/lora").eval()  # plain PEFT: eigenpeft is not needed
    print(f"largest logit difference of the export: {(plain(**tokens).logits - wanted).abs().max():.1e}")
    config = plain.peft_config["default"]
    if arguments.merge:
        plain.merge_and_unload().save_pretrained(f"{arguments.out}/merged")
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(f"{arguments.out}/merged")
    largest = max(config.r, *config.rank_pattern.values(), 1)
    print(SERVE.format(model=arguments.model, out=arguments.out, r=largest))


if __name__ == "__main__":
    main(*TrlParser(Arguments).parse_args_and_config())
