# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft[federated]", "pyyaml"]
# ///
"""Train one classifier with many clients that keep their rows: cores in one frozen subspace, or plain LoRAs, with Flower.

Paper:     FedAvg 1602.05629; Fed-SB 2502.15436 (frozen factors, an r x r core averaged); FLoRA 2409.05976, FedEx-LoRA 2410.09432,
           FedSA-LoRA 2410.01463 and FFA-LoRA 2403.12313 for LoRA; Just One Byte 2306.10015 and FedKSeed 2312.06353 for seeds.
Command:   python recipes/federated.py --config recipes/federated.yaml --subspace DIR_OR_HUB_ID
Hardware:  2 CPU cores are enough for the YAML's encoder of 22M parameters; Flower's simulation starts a process per core.
Time:      each client loads the model in each round: 2 minutes for 3 clients and 2 rounds of 2 steps on two busy cores.
Expected:  one line per round: clients used, accuracy of the averaged model on the test rows, kilobytes from each client, and
           those of a LoRA of the same r beside it. A core of 32 x 32 on twelve weights is 49 kB per client and round, a LoRA of
           r = 8 295 kB. docs/federated.md has accuracies with their controls.

`--adapter` is full, diagonal or low_rank (cores in the subspace: plain averaging is exact for full and diagonal; low_rank goes
through its dense core, or keeps C_in frozen with --rule ffa) or lora. `--rule` is one of `AdapterFedAvg`'s. A stopped run, started
again with the same --out, goes on after its last round. Real clients use the same two apps: see docs/federated.md.
With --rule seeds clients train by forward passes and send 12 bytes per step; it wants many more steps than gradients do.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import load_dataset
from flwr.clientapp import ClientApp  # pyright: ignore[reportMissingImports] (an extra)
from flwr.serverapp import ServerApp  # pyright: ignore[reportMissingImports] (an extra)
from flwr.simulation import run_simulation  # pyright: ignore[reportMissingImports] (an extra)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, set_seed

from eigenpeft import EigenLoraConfig, PrincipalSubspace
from eigenpeft.combining.federation import load_round, no_steps, round_update, train_steps
from eigenpeft.federated import AdapterFedAvg, reply, start_from, to_record


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Base model: local path or Hub id."})
    dataset: str = field(metadata={"help": "Folder of JSONL files (train, test) or Hub id; columns `text`, `label`."})
    subspace: str | None = field(
        default=None, metadata={"help": "Subspace of that base model; none for --adapter lora."}
    )
    adapter: str = field(default="full", metadata={"help": "full, diagonal, low_rank or lora."})
    rule: str = field(default="exact", metadata={"help": "exact, fedex, fedsa, ffa, fedit, seeds, or a merging rule."})
    out: str = field(default="federation", metadata={"help": "State of the rounds, to go on from."})
    n_clients: int = field(default=8)
    dirichlet: float = field(default=0.5, metadata={"help": "How even labels are over clients; small is skewed."})
    rounds: int = field(default=5)
    local_steps: int = field(default=10)
    batch_size: int = field(default=16)
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the core; a LoRA wants about 3e-3."})
    head_learning_rate: float = field(default=1e-2)
    epsilon: float = field(default=1e-2, metadata={"help": "Step to each side under --rule seeds."})
    r: int = field(default=8)
    lora_alpha: int = field(default=16)
    max_length: int = field(default=48)
    seed: int = field(default=0)
    cores_per_client: int = field(default=1)


def split(labels: list[int], n_clients: int, concentration: float, seed: int) -> list[list[int]]:
    """Rows by client: of each label, shares drawn from a Dirichlet distribution."""
    draw, parts = np.random.default_rng(seed), [[] for _ in range(n_clients)]
    for label in sorted(set(labels)):
        own = draw.permutation([row for row, each in enumerate(labels) if each == label])
        ends = (np.cumsum(draw.dirichlet([concentration] * n_clients)) * len(own)).round().astype(int)
        for part, rows in zip(parts, np.split(own, ends[:-1]), strict=True):
            part += rows.tolist()
    return [part or [draw.integers(len(labels)).item()] for part in parts]


class Work:
    """Data and models, made in whatever process asks for them."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        dataset = load_dataset(arguments.dataset)
        self.labels = sorted(set(dataset["train"]["label"]))
        self.rows = {
            name: list(zip(rows["text"], map(self.labels.index, rows["label"]), strict=True))
            for name, rows in dataset.items()
        }

    def batch(self, rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """Model inputs of rows."""
        texts, labels = zip(*rows, strict=True)
        options = {"padding": True, "truncation": True, "max_length": self.arguments.max_length, "return_tensors": "pt"}
        return {**self.tokenizer(list(texts), **options), "labels": torch.tensor(labels)}

    def model(self):
        """Base, head and adapter, the same numbers for every client and the server."""
        arguments = self.arguments
        set_seed(arguments.seed)
        base = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(self.labels))
        options = {"r": arguments.r, "lora_alpha": arguments.lora_alpha, "task_type": "SEQ_CLS"}
        if arguments.adapter == "lora":
            config = LoraConfig(target_modules=["query", "value"], **options)
        else:
            if arguments.subspace is None:
                raise SystemExit(f"--adapter {arguments.adapter} needs --subspace, a folder or Hub id.")
            subspace = PrincipalSubspace.from_pretrained(arguments.subspace)
            config = EigenLoraConfig(subspace=subspace, core=arguments.adapter, **options)  # pyright: ignore[reportArgumentType] (it checks)
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if arguments.rule == "ffa" and "lora_A" in name:
                parameter.requires_grad_(False)
        return model

    def train(self, model, rows: list[tuple[str, int]], seed: int) -> float:
        """A few steps of AdamW; the last loss."""
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        head = [p for name, p in trained if "classifier" in name or "score" in name]
        rest = [p for _, p in trained if all(p is not other for other in head)]
        groups = [{"params": head, "lr": self.arguments.head_learning_rate}, {"params": rest}]
        optimizer = torch.optim.AdamW(groups, lr=self.arguments.learning_rate, weight_decay=0.0)
        draw, loss = np.random.default_rng(seed), torch.tensor(0.0)
        model.train()
        for _ in range(self.arguments.local_steps):
            chosen = draw.choice(len(rows), size=min(self.arguments.batch_size, len(rows)), replace=False)
            loss = model(**self.batch([rows[i] for i in chosen])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def train_without_gradients(self, model, rows: list[tuple[str, int]], seed: int) -> dict[str, torch.Tensor]:
        """As many steps by forward passes; their seeds and lengths."""
        draw = np.random.default_rng(seed)
        size = min(self.arguments.batch_size, len(rows))
        chosen = (draw.choice(len(rows), size=size, replace=False) for _ in range(self.arguments.local_steps))
        batches = (self.batch([rows[i] for i in each]) for each in chosen)
        rate, epsilon = self.arguments.learning_rate, self.arguments.epsilon
        return train_steps(model, batches=batches, learning_rate=rate, epsilon=epsilon, seed=seed)

    @torch.no_grad()
    def accuracy(self, model) -> float:
        """On the test rows."""
        model.eval()
        rows, hits = self.rows["test"], 0
        for start in range(0, len(rows), 64):
            batch = self.batch(rows[start : start + 64])
            hits += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return hits / len(rows)


def client_app(arguments: Arguments) -> ClientApp:
    """What runs beside a client's rows: start from the server's adapter, train, answer."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        torch.set_num_threads(arguments.cores_per_client)
        work, number = Work(arguments), int(context.node_config["partition-id"])
        labels = [label for _, label in work.rows["train"]]
        rows = [
            work.rows["train"][i]
            for i in split(labels, arguments.n_clients, arguments.dirichlet, arguments.seed)[number]
        ]
        model = work.model()
        if "local" in context.state:  # what a rule such as fedsa leaves with the client
            load_round(model, tensors=context.state["local"].to_torch_state_dict())
        start_from(message, model=model)
        round_number = int(message.content["config"]["server-round"])
        if arguments.rule == "seeds":
            steps = work.train_without_gradients(model, rows, seed=1000 * round_number + number)
            return reply(message, model=model, name=f"client-{number}", n_rows=len(rows), steps=steps)
        loss = work.train(model, rows, seed=1000 * round_number + number)
        context.state["local"] = to_record(round_update(model, name="local").tensors)
        return reply(message, model=model, name=f"client-{number}", n_rows=len(rows), metrics={"loss": loss})

    return app


def server_app(arguments: Arguments) -> ServerApp:
    """What averages: no rows but those of the test."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        work = Work(arguments)
        model = work.model()
        steps = no_steps(model) if arguments.rule == "seeds" else None
        first = round_update(model, name="server", rule=arguments.rule, steps=steps)
        strategy = AdapterFedAvg(
            rule=arguments.rule,
            scaling=first.scaling,
            base=first.base,
            out_dir=arguments.out,
            fraction_evaluate=0.0,
            min_train_nodes=arguments.n_clients,
            min_available_nodes=arguments.n_clients,
        )
        adapted: list[Any] = [module for module in model.modules() if hasattr(module, "get_base_layer")]
        lora = sum(4 * arguments.r * sum(layer.get_base_layer().weight.shape) for layer in adapted) / 1e3

        def evaluate(number, arrays):
            if number == 0 or not strategy.rounds:
                return
            load_round(model, tensors=arrays.to_torch_state_dict(), scaling=first.scaling)
            record = strategy.rounds[number - 1]
            sent = record["bytes_from_clients"] / max(1, len(record["clients"]) + len(record["left_out"])) / 1e3
            print(
                f"round {number}: {len(record['clients'])} clients, accuracy {work.accuracy(model):.3f}, {sent:.2f} kB from each "
                f"(a LoRA of r = {arguments.r}: {lora:.1f} kB), largest share lost {record['largest_share_lost']:.3f}",
                flush=True,
            )

        strategy.start(grid, to_record(first.tensors), num_rounds=arguments.rounds, evaluate_fn=evaluate)
        model.save_pretrained(f"{arguments.out}-adapter")

    return app


def main(arguments: Arguments) -> None:
    run_simulation(
        server_app(arguments),
        client_app(arguments),
        num_supernodes=arguments.n_clients,
        backend_config={"client_resources": {"num_cpus": arguments.cores_per_client, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    words = sys.argv[1:]
    if "--config" in words:  # its values first, so that the command line's come later and count
        place = words.index("--config")
        values = yaml.safe_load(Path(words[place + 1]).read_text(encoding="utf-8"))
        words = (
            [str(word) for name, value in values.items() for word in (f"--{name}", value)]
            + words[:place]
            + words[place + 2 :]
        )
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses(words))  # pyright: ignore[reportArgumentType] (any dataclass fits)
