# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[trl]", "pyyaml", "scikit-learn"]
# ///
"""Classify texts in a recycled subspace with transformers' Trainer and `evaluate`, beside the controls.

Paper:     EigenLoRAx, arXiv 2502.04700.
Command:   python recipes/classification.py --config recipes/classification.yaml --subspace DIR_OR_HUB_ID
Hardware:  2 CPU cores are enough for the YAML's encoder of 22M parameters.
Time:      four methods, one seed, took 869 CPU seconds on one thread of two busy cores; 1.4 GB (benchmarks/recipe_costs.py).
Expected:  one line per method: trainable parameters and the metric on the test rows, mean and range over the seeds. One seed on
           the part of banking77 that ships with eigenpeft, all-MiniLM-L6-v2, a subspace (K 8) of its ten shipped adapters: head
           0.590, random 0.661, eigenlora 0.697, same_parameters (a LoRA of as many parameters, at the same rate) 0.708. Rates
           decide, so tune every method's alike. Recycling helped only where `eigenlora` beats `random` (a random subspace of the
           same size) and `same_parameters`, over several seeds. `eigenpeft.tuners.control_config` makes these controls.

`--metric` is accuracy or macro_f1; both are computed here, without a network. The first line is the most frequent class.
OUTPUT_DIR has the tokenizer and the first seed's model of every method, label names included;
`audit --dataset` can start at the head's folder.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import TrlParser  # pyright: ignore[reportPrivateImportUsage] (trl has no __all__)

from eigenpeft import AdapterCollection, EigenLoraConfig, PrincipalSubspace
from eigenpeft.tuners import control_config


def accuracy(predicted, true) -> float:
    """Share of rows whose class is right."""
    return float((predicted == true).mean())


def macro_f1(predicted, true) -> float:
    """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in sorted(set(true.tolist()) | set(predicted.tolist())):
        hits = ((predicted == label) & (true == label)).sum()
        scores.append(2 * hits / ((predicted == label).sum() + (true == label).sum()))
    return float(sum(scores) / len(scores))


# Computed here: `evaluate.load` would fetch and run a script.
METRICS = {"accuracy": accuracy, "macro_f1": macro_f1}


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Base model: local path or Hub id."})
    dataset: str = field(
        metadata={
            "help": "Folder of JSONL files (train, test) or Hub id; columns `label` and `text`, or `text` and `text_pair`."
        }
    )
    subspace: str = field(metadata={"help": "Subspace of that base model: local path or Hub id."})
    methods: list[str] = field(
        default_factory=lambda: ["head", "random", "eigenlora", "same_parameters", "lora"],
        metadata={"help": "'head' trains no adapter; 'shuffled' and 'mean_only' are further controls."},
    )
    adapters: str | None = field(default=None, metadata={"help": "What the subspace was built from, for 'mean_only'."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metric: str = field(default="accuracy", metadata={"help": f"One of {', '.join(METRICS)}."})
    core: Literal["low_rank", "full", "diagonal"] = field(default="low_rank")
    n_components: int | None = field(
        default=None, metadata={"help": "Take the first of the subspace's components alone."}
    )
    r: int = field(default=8)
    lora_alpha: int = field(default=16)
    max_length: int = field(default=64)
    head_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the method 'head', which has no adapter."}
    )
    lora_learning_rate: float = field(
        default=3e-3, metadata={"help": "Learning rate of the method 'lora'; the others take --learning_rate."}
    )


def adapt(model, method: str, subspace: PrincipalSubspace, arguments: Arguments, seed: int):
    """The model with only what the method trains left trainable, the new head always included."""
    if method == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("classifier.", "score.")))
        return model
    config = EigenLoraConfig(
        subspace=subspace,
        core=arguments.core,
        n_components=arguments.n_components,
        r=arguments.r,
        lora_alpha=arguments.lora_alpha,
        task_type="SEQ_CLS",
    )
    if method != "eigenlora":
        collection = AdapterCollection.from_pretrained(arguments.adapters) if arguments.adapters else None
        config = control_config(config, control=method, collection=collection, seed=seed)  # pyright: ignore[reportArgumentType] (it checks)
    return get_peft_model(model, config)


def main(arguments: Arguments, training: TrainingArguments) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dataset = load_dataset(arguments.dataset)
    labels = sorted(set(dataset["train"]["label"]))
    unseen = set(dataset["test"]["label"]) - set(labels)
    if unseen:
        raise SystemExit(f"The test rows have labels that no training row has: {sorted(unseen)[:5]}.")
    pairs = "text_pair" in dataset["train"].column_names
    dataset = dataset.map(
        lambda rows: {
            **tokenizer(
                rows["text"],
                rows["text_pair"] if pairs else None,
                truncation=True,
                max_length=arguments.max_length,
            ),
            "labels": [labels.index(label) for label in rows["label"]],
        },
        batched=True,
        remove_columns=dataset["train"].column_names,
    )
    subspace = PrincipalSubspace.from_pretrained(arguments.subspace)
    if arguments.metric not in METRICS:
        raise SystemExit(f"--metric {arguments.metric!r} must be one of {', '.join(METRICS)}.")
    metric = METRICS[arguments.metric]
    names = {number: str(label) for number, label in enumerate(labels)}
    tokenizer.save_pretrained(training.output_dir)
    true = np.array(dataset["test"]["labels"])
    most_frequent = np.full_like(true, Counter(dataset["train"]["labels"]).most_common(1)[0][0])
    print(f"{'majority':10s} {0:9,d} trainable parameters  {metric(most_frequent, true):.3f}")
    rates = {"head": arguments.head_learning_rate, "lora": arguments.lora_learning_rate}
    own_rate = training.learning_rate
    for method in arguments.methods:
        scores, size = [], 0
        for seed in arguments.seeds:
            set_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(
                arguments.model, id2label=names, label2id={name: number for number, name in names.items()}
            )
            model = adapt(model, method, subspace, arguments, seed)
            size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            training.seed = training.data_seed = seed
            training.learning_rate = rates.get(method, own_rate)
            trainer = Trainer(
                model=model,
                args=training,
                train_dataset=dataset["train"],
                eval_dataset=dataset["test"],
                data_collator=DataCollatorWithPadding(tokenizer),
                compute_metrics=lambda output: {"score": metric(np.argmax(output.predictions, -1), output.label_ids)},
            )
            trainer.train()
            scores.append(trainer.evaluate()["eval_score"])
            if seed == arguments.seeds[0]:
                model.save_pretrained(f"{training.output_dir}/{method}")
                model.config.save_pretrained(f"{training.output_dir}/{method}")  # the names of the labels
        mean = sum(scores) / len(scores)
        print(f"{method:10s} {size:9,d} trainable parameters  {mean:.3f} ({min(scores):.3f} to {max(scores):.3f})")


if __name__ == "__main__":
    main(*TrlParser((Arguments, TrainingArguments)).parse_args_and_config())  # pyright: ignore[reportArgumentType] (any dataclass fits)
