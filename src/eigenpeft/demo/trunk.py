"""What lies below the first trained layer of a BERT classifier: the same at every step, and computed once."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LAYER = re.compile(r"\bencoder\.layer\.(\d+)\.")
_AT_ONCE = 64


@dataclass(frozen=True)
class Trunk:
    """What texts are before the first trained layer.

    Attributes:
        hidden: Hidden states of each text, (length, width).
    """

    hidden: list[Tensor]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(each) for each in self.hidden]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, ids: Sequence[Sequence[int]], *, first: int) -> "Trunk":
        """Run the layers before `first`, texts of nearly equal length together.

        Args:
            model: A BERT classifier, adapted or not, in evaluation mode.
            ids: Token numbers of each text.
            first: Layers that are run.
        """
        bert, found = _bert(model), {}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), _AT_ONCE):
            places = order[start : start + _AT_ONCE]
            hidden = bert(**padded([ids[i] for i in places]), output_hidden_states=True).hidden_states[first]
            found.update({i: row[: len(ids[i])].clone() for i, row in zip(places, hidden, strict=True)})
        return cls([found[i] for i in range(len(ids))])

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The arguments of a model that is `resumed` at the same layer.

        Args:
            chosen: Texts.
        """
        hidden = nn.utils.rnn.pad_sequence([self.hidden[i] for i in chosen], batch_first=True)
        return {"inputs_embeds": hidden, "attention_mask": _mask([len(self.hidden[i]) for i in chosen])}


def padded(ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch of texts as a BERT takes it.

    Args:
        ids: Token numbers of each text.
    """
    rows = nn.utils.rnn.pad_sequence([torch.as_tensor(each) for each in ids], batch_first=True)
    return {"input_ids": rows, "attention_mask": _mask([len(each) for each in ids])}


def first_trained_layer(model: nn.Module) -> int:
    """The lowest layer with a trained value; the number of layers where the head alone is trained.

    Args:
        model: A BERT classifier, adapted or not.
    """
    trained = [_LAYER.search(name) for name, value in model.named_parameters() if value.requires_grad]
    return min((int(match[1]) for match in trained if match), default=len(_bert(model).encoder.layer))


@contextmanager
def resumed(model: nn.Module, *, first: int) -> Iterator[None]:
    """For the length of a block the model starts at layer `first`, from what `Trunk.batch` gives it.

    Args:
        model: A BERT classifier, adapted or not.
        first: The layer.
    """
    bert = _bert(model)
    embeddings, layers = bert.embeddings, bert.encoder.layer
    bert.embeddings, bert.encoder.layer = _AsGiven(), layers[first:]
    try:
        yield
    finally:
        bert.embeddings, bert.encoder.layer = embeddings, layers


class _AsGiven(nn.Module):
    """In the place of embeddings: what is given is their output already."""

    def forward(self, *, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def _bert(model: nn.Module) -> Any:
    return (model.get_base_model() if hasattr(model, "peft_config") else model).bert  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def _mask(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
