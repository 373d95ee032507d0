"""A BERT classifier without padding: the tokens of a batch in one row, attention within each text, frozen layers once.

The same function as `BertForSequenceClassification` in evaluation mode, to rounding (run.py compares them first):
linear layers see only real tokens; the last layer is computed at the first token alone, which is all that the head reads; and
what lies below the first trained layer is computed once for all rows. Some three times as fast on short texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEADS = 12


@dataclass(frozen=True)
class Packed:
    """Texts end to end.

    Attributes:
        hidden: (tokens, width), what enters the layer `layer`; with `layer` past the last, (texts, width) pooled.
        lengths: Tokens of each text.
        layer: The layer that comes next.
    """

    hidden: Tensor
    lengths: tuple[int, ...]
    layer: int

    def batch(self, texts: Sequence[int], n_layers: int) -> "Packed":
        """Some of the texts."""
        if self.layer >= n_layers:
            return Packed(self.hidden[list(texts)], tuple(self.lengths[i] for i in texts), self.layer)
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        places = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in texts])
        return Packed(self.hidden[places], tuple(self.lengths[i] for i in texts), self.layer)


def first_trained_layer(bert: nn.Module) -> int:
    """The first layer with a trainable parameter, or the number of layers."""
    layers = bert.encoder.layer
    return next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), len(layers))


def embedded(bert: nn.Module, ids: Sequence[Sequence[int]]) -> Packed:
    """What enters the first layer."""
    tokens = torch.tensor([token for text in ids for token in text])[None]
    positions = torch.tensor([i for text in ids for i in range(len(text))])[None]
    with torch.no_grad():
        hidden = bert.embeddings(input_ids=tokens, position_ids=positions, token_type_ids=torch.zeros_like(tokens))
    return Packed(hidden[0], tuple(map(len, ids)), 0)


def forward(bert: nn.Module, packed: Packed, *, until: int | None = None) -> Packed:
    """Through the layers before `until`; to the pooled output of every text where `until` is None."""
    n_layers = len(bert.encoder.layer)
    if packed.layer >= n_layers:
        return packed
    stop = n_layers if until is None else min(until, n_layers)
    lengths, width = torch.tensor(packed.lengths), max(packed.lengths)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
    places = torch.cat([i * width + torch.arange(n) for i, n in enumerate(packed.lengths)])
    real = torch.arange(width)[None] < lengths[:, None]
    mask = torch.zeros(len(lengths), 1, 1, width).masked_fill(~real[:, None, None], torch.finfo(torch.float32).min)
    hidden = packed.hidden
    for number in range(packed.layer, stop):
        at = starts if number == n_layers - 1 else None
        hidden = _layer(bert.encoder.layer[number], hidden, places=places, mask=mask, at=at)
    if stop < n_layers:
        return Packed(hidden, packed.lengths, stop)
    return Packed(bert.pooler(hidden[:, None]), packed.lengths, n_layers)


def _layer(layer: nn.Module, hidden: Tensor, *, places: Tensor, mask: Tensor, at: Tensor | None) -> Tensor:
    """One layer on (tokens, width); only at the tokens `at` where given."""
    n, _, _, width = mask.shape
    own, attention = (hidden if at is None else hidden[at]), layer.attention.self

    def spread(packed: Tensor) -> Tensor:
        padded = packed.new_zeros(n * width, packed.shape[1]).index_copy(0, places, packed)
        return padded.view(n, width, HEADS, -1).transpose(1, 2)

    key, value = spread(attention.key(hidden)), spread(attention.value(hidden))
    asked = attention.query(own)
    query = spread(asked) if at is None else asked.view(n, 1, HEADS, -1).transpose(1, 2)
    context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    context = context.transpose(1, 2).reshape(-1, hidden.shape[1])
    attended = layer.attention.output(context if at is not None else context[places], own)
    return layer.output(layer.intermediate(attended), attended)
