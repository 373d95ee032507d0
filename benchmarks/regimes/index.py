"""Does the index name the right adapter? The ten shipped tasks, and customers of clinc150 by their domain.

Paper:     LORAUTER, arXiv 2601.21795 (choosing adapters by task embedding).
Command:   python benchmarks/regimes/index.py --data DIR   (DIR holds a folder of JSONL files per task)
Hardware:  CPU, one thread; a minute of CPU time.
Writes:    benchmarks/results/index.json and a table on stdout.

Tasks: the index has 256 training rows of each, drawn three times (and 64 of them, beside it); a query is 8 (or 1, 2, 4) of 200
rows of a task's test set, never seen. mr, sst2 and subj are cut from the same film reviews, and both tweet tasks from the same
tweets. Customers: the index has 40 of clinc150 (4 per domain, 6 intents each), 32 rows of each; a query is 8 rows of a customer
whose intents no member has, and the answer is right where the first name's customer is of the same domain.
Controls: chance; the same cosines without taking off the mean of all tasks; and, for tasks, the probability that the index gives,
against how often it was right (Brier score beside that of always saying the share that is right).
"""

import argparse
import json
import random
from pathlib import Path
from statistics import fmean

import customers
import torch
from huggingface_hub.utils import disable_progress_bars

from eigenpeft.demo.assets import base_model
from eigenpeft.indexing import BaseModelEncoder, build_index

RESULTS = Path(__file__).parents[1] / "results" / "index.json"
TASKS = ("cr", "mpqa", "mr", "mrpc", "sick_entail", "sst2", "subj", "trec6", "tweet_emotion", "tweet_irony")
SIZES, N_QUERIES, N_DRAWS, INDEXED, FEWER = (1, 2, 4, 8), 40, 3, 256, 64


def rows(data, task, split):
    path = data / task / f"{split}.jsonl"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [
        {"text": row["text_a"], "text_pair": row["text_b"]} if "text_a" in row else {"text": row["text"]}
        for row in found
    ]


class Remembering:
    """The base model's vectors, each text embedded once."""

    name = "all-MiniLM-L6-v2"

    def __init__(self):
        self.encoder, self.known = BaseModelEncoder.from_pretrained(base_model(), max_length=64), {}

    def __call__(self, texts):
        new = sorted({text for text in texts if text not in self.known}, key=len)
        if new:
            self.known |= dict(zip(new, self.encoder(new), strict=True))
        return torch.stack([self.known[text] for text in texts])


def plain_cosine(index, query):
    """The control: nearest by the cosine of the mean embeddings themselves."""
    vectors = torch.stack([each.double().mean(0) for each in index._rows.values()])
    return int(torch.nn.functional.cosine_similarity(query.double().mean(0, keepdim=True), vectors).argmax())


def judge(index, encoder, queries):
    """(right, right of the control, probability) of each query, a query being (texts, the set of right names)."""
    found = []
    for texts, right in queries:
        answer = index.query(texts, top_k=1)
        control = index.names[
            plain_cosine(index, encoder([t if isinstance(t, str) else "\n".join(t.values()) for t in texts]))
        ]
        found.append((answer.names[0] in right, control in right, answer.probability, answer.is_far))
    return found


def summary(found, *, of_names=True):
    right = [float(each[0]) for each in found]
    share = fmean(right)
    measured = {
        "queries": len(found),
        "right": share,
        "control_without_centring": fmean(float(each[1]) for each in found),
        "called_far": fmean(float(each[3]) for each in found),
    }
    if not of_names:  # the probability is of the name, not of its domain
        return measured
    return measured | {
        "mean_probability": fmean(each[2] for each in found),
        "brier": fmean((each[2] - ok) ** 2 for each, ok in zip(found, right, strict=True)),
        "brier_of_the_share": share * (1 - share),
    }


def shipped(data, encoder):
    """Held-out batches of the ten shipped tasks."""
    draw = random.Random("index")
    train = {task: rows(data, task, "train") for task in TASKS}
    held = {task: rows(data, task, "test") or rows(data, task, "dev") for task in TASKS}
    held = {task: draw.sample(own, min(200, len(own))) for task, own in held.items()}
    drawn = [{task: draw.sample(own, INDEXED) for task, own in train.items()} for _ in range(N_DRAWS)]
    indexes, smaller = (
        [build_index(rows, encoder=encoder, max_rows=n, progress=False) for rows in drawn] for n in (INDEXED, FEWER)
    )
    results, by_task = {}, {}
    for size in SIZES:
        queries, owners = [], []
        for task, held_out in held.items():
            for _ in range(N_QUERIES):
                queries.append((draw.sample(held_out, size), {task}))
                owners.append(task)
        by_draw = [judge(index, encoder, queries) for index in indexes]
        found = [each for part in by_draw for each in part]
        results[f"{size} rows"] = summary(found)
        results[f"{size} rows"]["right_of_each_draw"] = [summary(part)["right"] for part in by_draw]
        fewer = [each for index in smaller for each in judge(index, encoder, queries)]
        results[f"{size} rows, {FEWER} in the index"] = summary(fewer)
        if size == 8:
            pairs = list(zip(found, owners * N_DRAWS, strict=True))
            by_task = {task: fmean(float(each[0]) for each, own in pairs if own == task) for task in TASKS}
    return {"chance": 1 / len(TASKS), **results, "right_by_task_at_8_rows": by_task}


def domains(data, encoder):
    """Customers of clinc150 that no adapter was trained for."""
    draw = random.Random("customers")
    known = [c for zoo in ("clinc_a", "clinc_b") for c in customers.members(zoo, data)[:20]]
    own = {c.name: customers.rows_of_member(c, data)[0].texts for c in known}
    indexed = {name: draw.sample(texts, min(32, len(texts))) for name, texts in own.items()}
    index = build_index(indexed, encoder=encoder, progress=False)
    results, new = {}, [c for c in customers.targets(data) if c.source == "clinc150"]
    for size in SIZES:
        queries = []
        for target in new:
            texts = customers.rows_of_target(target, n_rows=256, seed=0, data=data)[1].texts[:100]
            right = {c.name for c in known if c.group == target.group}
            queries += [(draw.sample(texts, size), right) for _ in range(N_QUERIES)]
        results[f"{size} rows"] = summary(judge(index, encoder, queries), of_names=False)
    return {"chance": fmean(sum(c.group == target.group for c in known) / len(known) for target in new), **results}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    disable_progress_bars()
    encoder = Remembering()
    found = {"shipped": shipped(data, encoder), "customers": domains(data, encoder)}
    for part, values in found.items():
        print(f"{part}: chance {values['chance']:.3f}")
        for name, row in values.items():
            if isinstance(row, dict):
                print(
                    f"  {name:24} "
                    + "  ".join(f"{key} {value:.3f}" for key, value in row.items() if not isinstance(value, list))
                )
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
