"""Prompts and answers of the causal slice of the study: from disk, through the frozen lower half, packed into batches."""

import random
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1]))
import smollm2_data  # noqa: E402

N_TEST, MAX_LENGTH = 40, 96
_AT_A_TIME = 8  # rows packed into one pass through the lower half


@dataclass(frozen=True)
class Row:
    """One prompt with its answer and the end-of-text token."""

    tokens: list[int]
    n_prompt: int
    hidden: Tensor  # (len(tokens), hidden_size): what enters the upper half of the layers


@dataclass(frozen=True)
class Batch:
    """Rows one behind the other, unpadded. Positions start at 0 in each, which keeps them apart in attention."""

    hidden: Tensor  # (1, length, hidden_size)
    positions: Tensor  # (1, length)
    before_answer: Tensor  # (n_answer_tokens,): places whose next token belongs to an answer
    answer: Tensor  # (n_answer_tokens,)
    row: Tensor  # (n_answer_tokens,): which row of the batch


@dataclass(frozen=True)
class Task:
    """Training rows and the rows to judge by, none of them longer than MAX_LENGTH tokens."""

    name: str
    train: list[Row]
    test: list[Row]


class Skipped(nn.Module):
    """In place of a decoder layer whose output is known."""

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        return hidden


class Halves:
    """A causal LM cut in two: only the upper layers, half of all unless said, are adapted, so the lower are computed once per row.

    With `dtype=torch.float32` there is no autocast, for CPUs without bfloat16 instructions.
    """

    def __init__(self, folder: Path, *, n_upper: int | None = None, dtype: torch.dtype = torch.bfloat16):
        self.tokenizer, self.dtype = AutoTokenizer.from_pretrained(folder), dtype
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        n_layers = len(whole.model.layers)
        self.first = n_layers // 2 if n_upper is None else n_layers - n_upper
        self._lower, self._upper = whole.model, deepcopy(whole)
        for i in range(n_layers):
            (self._upper.model if i < self.first else self._lower).layers[i] = Skipped()
        self._lower.norm = nn.Identity()

    def upper(self) -> nn.Module:
        """A copy of the model that takes `inputs_embeds` from `encode`; its modules have the names of the whole model."""
        return deepcopy(self._upper)

    @torch.no_grad()
    def encode(self, rows: list[dict]) -> list[Row]:
        """Those of the rows that are not too long; none is cut."""
        found = []
        for row in rows:
            prompt = self.tokenizer(row["prompt"])["input_ids"]
            tokens = [*prompt, *self.tokenizer(row["completion"])["input_ids"], self.tokenizer.eos_token_id]
            if len(tokens) <= MAX_LENGTH:
                found.append((tokens, len(prompt)))
        hidden = []
        for start in range(0, len(found), _AT_A_TIME):
            lengths = [len(tokens) for tokens, _ in found[start : start + _AT_A_TIME]]
            packed = torch.tensor([sum((tokens for tokens, _ in found[start : start + _AT_A_TIME]), [])])
            places = torch.cat([torch.arange(length) for length in lengths])[None]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                output = self._lower(input_ids=packed, position_ids=places, use_cache=False).last_hidden_state[0]
            hidden += output.split(lengths)
        return [Row(tokens, n_prompt, own) for (tokens, n_prompt), own in zip(found, hidden, strict=True)]


def load_task(name: str, *, data: Path, halves: Halves, n_train: int) -> Task:
    """The same split for every seed and method; of gsm8k the first n_train short problems."""
    if name == "gsm8k":
        rows = smollm2_data.gsm8k(data, n_test=3 * N_TEST, n_train=2 * n_train, n_tune=0)
    else:
        rows = smollm2_data.t0(data, name, n_test=N_TEST, n_tune=0)
    train, test = halves.encode(rows["train"])[:n_train], halves.encode(rows["test"])[:N_TEST]
    return Task(name, train, test)


def pack(rows: list[Row]) -> Batch:
    """All rows as one sequence: on a CPU every padding token costs."""
    tokens, positions, before, owner = [], [], [], []
    for i, row in enumerate(rows):
        n_answer = len(row.tokens) - row.n_prompt
        before += range(len(tokens) + row.n_prompt - 1, len(tokens) + len(row.tokens) - 1)
        owner += [i] * n_answer
        positions += range(len(row.tokens))
        tokens += row.tokens
    places = torch.tensor(before)
    hidden = torch.cat([row.hidden for row in rows])[None]
    return Batch(hidden, torch.tensor([positions]), places, torch.tensor(tokens)[places + 1], torch.tensor(owner))


def batches(rows: list[Row], *, batch_size: int, seed: int) -> Iterator[Batch]:
    """Without end: the rows in an order drawn by seed, drawn anew when they are used up."""
    generator = random.Random(seed)
    waiting: list[Row] = []
    while True:
        while len(waiting) < batch_size:
            waiting += generator.sample(rows, len(rows))
        yield pack(waiting[:batch_size])
        waiting = waiting[batch_size:]
