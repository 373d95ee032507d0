"""One model of llama.cpp beside the logits and greedy continuations of transformers; runs where llama-cpp-python is installed."""

import argparse
import json
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description="Logits and greedy continuations of llama.cpp against saved ones.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--reference", type=Path, required=True, help="Path without its ending: .npz and .json are read."
    )
    parser.add_argument("--lora", type=Path, default=None)
    arguments = parser.parse_args()
    saved = json.loads(arguments.reference.with_suffix(".json").read_text(encoding="utf-8"))
    logits = np.load(arguments.reference.with_suffix(".npz"))
    model = llama_cpp.Llama(
        str(arguments.model),
        lora_path=str(arguments.lora) if arguments.lora else None,
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    same, differences, spread, same_first = 0, [], [], 0
    for i, (prompt, tokens) in enumerate(zip(saved["prompts"], saved["tokens"], strict=True)):
        model.reset()
        model.eval(tokens)
        wanted = logits[f"logits_{i}"]
        differences.append(np.abs(model.scores[: len(tokens)] - wanted).max())
        spread.append(wanted.std())
        model.reset()
        model.eval(prompt)
        continuation = []
        while len(prompt) + len(continuation) < len(tokens):
            continuation.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(continuation[-1:])
        same += continuation == tokens[len(prompt) :]
        same_first += continuation[0] == tokens[len(prompt)]
    result = {
        "prompts": len(saved["prompts"]),
        "same_continuations": same,
        "same_first_token": same_first,
        "largest_logit_difference": float(np.max(differences)),
        "mean_largest_logit_difference": float(np.mean(differences)),
        "logit_standard_deviation": float(np.mean(spread)),
        "llama_cpp_python": llama_cpp.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
