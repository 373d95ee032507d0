# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl,gguf]"]
# ///
"""Export a trained adapter as a plain LoRA, check that nothing changed, and say how to serve it.

Paper:     LoRA, arXiv 2106.09685: what is exported; MoSLoRA, arXiv 2406.11909, equation 3: why its mixer folds into B.
Command:   python recipes/export_and_serve.py --adapter DIR_OR_HUB_ID --model DIR_OR_HUB_ID --out OUT
Hardware:  whatever loads the base model; no matrix of the size of a weight is formed.
Time:      that of loading the base model twice.
Expected:  the largest difference between the logits of the adapter and of the export (about 1e-5 in float32), OUT/lora,
           OUT/adapter.gguf for base models of the Llama family, OUT/merged with --merge, and commands for vLLM and llama.cpp.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser  # pyright: ignore[reportPrivateImportUsage] (trl has no __all__)

from eigenpeft import export_lora
from eigenpeft.errors import AdapterConfigError
from eigenpeft.tuners import export_gguf


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
llama.cpp: {llama}
"""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank


def write_gguf(model: PeftModel, arguments: Arguments) -> str:
    """The file for llama.cpp and the command that takes it, or why there is none."""
    try:
        export_gguf(model, f"{arguments.out}/adapter.gguf", rank=arguments.rank)
    except AdapterConfigError as error:
        return f"not written: {error}"
    return f"llama-server -m MODEL.gguf --lora {arguments.out}/adapter.gguf"


@torch.no_grad()
def main(arguments: Arguments) -> None:
    def base():
        return AutoModelForCausalLM.from_pretrained(arguments.model)

    tokens = AutoTokenizer.from_pretrained(arguments.model)(arguments.prompt, return_tensors="pt")
    model = PeftModel.from_pretrained(base(), arguments.adapter).eval()
    wanted = model(**tokens).logits
    export_lora(model, f"{arguments.out}/lora", rank=arguments.rank)
    llama = write_gguf(model, arguments)
    plain = PeftModel.from_pretrained(base(), f"{arguments.out}/lora").eval()  # plain PEFT: eigenpeft is not needed
    print(f"largest logit difference of the export: {(plain(**tokens).logits - wanted).abs().max():.1e}")
    config = cast(LoraConfig, plain.peft_config["default"])
    if arguments.merge:
        plain.merge_and_unload().save_pretrained(f"{arguments.out}/merged")
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(f"{arguments.out}/merged")
    allowed = next((rank for rank in VLLM_RANKS if rank >= config.r), config.r)
    print(SERVE.format(model=arguments.model, out=arguments.out, r=allowed, llama=llama))


if __name__ == "__main__":
    main(*TrlParser(Arguments).parse_args_and_config())  # pyright: ignore[reportArgumentType] (any dataclass fits)
