"""Flower's messages with adapters in them: what a client gets and answers, and what a server reads of the answers."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # pyright: ignore[reportMissingImports]
from torch import Tensor

from eigenpeft.combining.federation import ClientUpdate, load_round, round_update
from eigenpeft.errors import AdapterConfigError

ARRAYS, METRICS, ADAPTER, CONFIG = "arrays", "metrics", "adapter", "config"
EXAMPLES = "num-examples"
SCALING, RULE = "adapter-scaling", "adapter-rule"


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as Flower sends them; what numpy lacks (bfloat16) as float32.

    Args:
        tensors: By key.
    """
    plain = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    return ArrayRecord({key: t.float() if t.dtype == torch.bfloat16 else t for key, t in plain.items()})


def start_from(message: Message, *, model: Any, adapter_name: str = "default") -> None:
    """Give a client's adapter what the server sent for this round.

    Args:
        message: From `AdapterFedAvg`.
        model: The client's `PeftModel`; its rank and scaling may be its own.
        adapter_name: Which adapter.

    Raises:
        AdapterConfigError: As `load_round`.
        KeyError: If the model has no such adapter.
    """
    config = message.content.config_records.get(CONFIG, ConfigRecord())
    scaling = config.get(SCALING)
    tensors = message.content.array_records[ARRAYS].to_torch_state_dict()
    load_round(model, tensors=tensors, scaling=float(scaling) if scaling else None, adapter_name=adapter_name)  # pyright: ignore[reportArgumentType]


def reply(
    message: Message,
    *,
    model: Any,
    name: str,
    n_rows: float,
    metrics: Mapping[str, float] | None = None,
    base: str | None = None,
    steps: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> Message:
    """A client's answer to a round: what travels of its trained adapter, under the rule that the server named.

    Args:
        message: From `AdapterFedAvg`.
        model: The client's `PeftModel`, trained.
        name: What the server's messages call the client.
        n_rows: Rows it trained on.
        metrics: Further numbers, such as its loss; the server averages them.
        base: As for `round_update`.
        steps: As for `round_update`.
        adapter_name: Which adapter.

    Raises:
        AdapterConfigError: As `round_update`.
        KeyError: If the model has no such adapter.
    """
    rule = str(message.content.config_records.get(CONFIG, ConfigRecord()).get(RULE, "exact"))
    update = round_update(model, name=name, n_rows=n_rows, rule=rule, base=base, steps=steps, adapter_name=adapter_name)
    return Message(content=content_of(update, metrics or {}), reply_to=message)


def content_of(update: ClientUpdate, metrics: Mapping[str, float]) -> RecordDict:
    """A client's update as the content of a message.

    Args:
        update: Update of the client.
        metrics: Further numbers.
    """
    about = {"name": update.name, "scaling": update.scaling, "base": update.base or ""}
    numbers = {EXAMPLES: update.n_rows, **metrics}
    return RecordDict(
        {ARRAYS: to_record(update.tensors), METRICS: MetricRecord(numbers), ADAPTER: ConfigRecord(about)}  # pyright: ignore[reportArgumentType]
    )


def read_replies(replies: Iterable[Message]) -> tuple[list[ClientUpdate], dict[str, RecordDict], dict[str, str]]:
    """The updates in clients' answers; the contents by client; and why the other answers cannot be read.

    Args:
        replies: Replies of one round.
    """
    updates, contents, unread = [], {}, {}
    for message in replies:
        node = f"node {message.metadata.src_node_id}"
        if message.has_error():
            unread[node] = f"it did not answer ({message.error.reason or 'no reason given'})"
            continue
        try:
            update = _update_of(message.content, node)
        except (AdapterConfigError, KeyError, TypeError, ValueError) as error:
            unread[node] = f"its answer cannot be read ({type(error).__name__}: {error})"
            continue
        updates.append(update)
        contents.setdefault(update.name, message.content)
    return updates, contents, unread


def _update_of(content: RecordDict, node: str) -> ClientUpdate:
    if len(content.array_records) != 1 or len(content.metric_records) != 1:
        raise AdapterConfigError(
            f"{len(content.array_records)} ArrayRecords and {len(content.metric_records)} MetricRecords instead of one each; "
            "answer with eigenpeft.federated.reply"
        )
    (arrays,), (metrics,) = content.array_records.values(), content.metric_records.values()
    about: Mapping[str, Any] = content.config_records.get(ADAPTER, {})
    if EXAMPLES not in metrics:
        raise AdapterConfigError(
            f"its metrics have no {EXAMPLES!r}, only {', '.join(map(repr, sorted(metrics))) or 'nothing'}; answer with "
            "eigenpeft.federated.reply"
        )
    return ClientUpdate(
        name=str(about.get("name") or node),
        tensors=arrays.to_torch_state_dict(),
        n_rows=float(metrics[EXAMPLES]),  # pyright: ignore[reportArgumentType]
        scaling=float(about.get("scaling", 1.0)),
        base=str(about["base"]) if about.get("base") else None,
    )
