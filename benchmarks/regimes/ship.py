"""The related adapters that ship with eigenpeft, from the zoo "bank_a" of the study of regimes.

Command:   python benchmarks/regimes/ship.py --data DIR --work DIR
Writes:    src/eigenpeft/demo/data/related: sixteen adapters in float16 with their heads and cards, and RECORD.json.
"""

import argparse
import json
import shutil
from pathlib import Path

import customers
from zoos import zoo_names

from eigenpeft.demo.assets import BASE_MODEL

OUT = Path(__file__).parents[2] / "src" / "eigenpeft" / "demo" / "data" / "related"
ZOO, SIZE = "bank_a", 16
CARD = """---
base_model: {base_model}
library_name: peft
license: apache-2.0
tags: [lora, eigenpeft-zoo, text-classification]
---

# {name}: a LoRA adapter of {base_model}

A classifier of 8 intents of BANKING77 (PolyAI, CC BY 4.0), one of {size} related ones, trained by `benchmarks/regimes` of
eigenpeft: {n_train} training rows, {steps} steps of batch {batch_size}, learning rate {learning_rate}, seed {seed}; rank 8,
alpha 16 on query and value.
Accuracy on {n_test} held-out rows: {accuracy:.3f}. Classes, in order: {intents}.
"""


def labels_of(data: Path) -> dict[str, int]:
    with (data / "banking77" / "train.jsonl").open(encoding="utf-8") as lines:
        return {row["label_name"]: row["label"] for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    records = []
    for name in zoo_names(ZOO, SIZE, 0)[:SIZE]:
        source, folder = given.work / "zoos" / name, OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(source / file, folder / file)
        record = json.loads((source / "record.json").read_text())
        card = {**record, "intents": ", ".join(record["intents"])}
        (folder / "README.md").write_text(CARD.format(base_model=BASE_MODEL, size=SIZE, **card))
        records.append(record)
    labels, fresh = labels_of(given.data), []
    for target in customers.targets(given.data):
        if target.relatives == ZOO:
            fresh.append({"intents": list(target.intents), "labels": [labels[intent] for intent in target.intents]})
    found = {"adapters": records, "new_customers": fresh}
    (OUT / "RECORD.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
