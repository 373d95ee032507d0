# /// script
# requires-python = ">=3.10"
# dependencies = ["eigenpeft", "fastapi", "uvicorn"]
# ///
"""Serve hundreds of classifiers on one encoder over HTTP: each text by its own adapter and head, mixed in one batch.

Paper:     EigenLoRAx, arXiv 2502.04700 (the members of the store); the batching is eigenpeft's AdapterBank.
Command:   python recipes/encoder_server.py --model DIR_OR_HUB_ID --store STORE --port 8000
           curl localhost:8000/classify -H 'Content-Type: application/json' \
             -d '{"rows": [{"member": "customer-1", "text": "My card has not arrived."}]}'
Hardware:  whatever holds the encoder once; 2 CPU cores are enough for 22M parameters.
Time:      starts as fast as the encoder loads; a member costs its cores and its head.
Expected:  for each row the label, its probability and the member that answered. An unknown member is a 404 that names those
           near it. docs/serving.md has the throughput beside a loop over PEFT adapters.

Rows of requests that come together are put into one batch (at most --batch_size rows, after at most --wait milliseconds),
which the encoder sees as groups of rows of like length, since padding costs as much as text. The store is looked at again every
--refresh seconds: members that were added are served, removed ones are refused.
"""

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eigenpeft import AdapterBank, AdapterStore
from eigenpeft.errors import EigenPeftError


class Row(BaseModel):
    member: str
    text: str


class Request(BaseModel):
    rows: list[Row]


class Answer(BaseModel):
    member: str
    label: int
    probability: float


class Classifiers:
    """One encoder with all members of a store."""

    def __init__(self, model: str, store: str, *, max_length: int = 128, group_size: int = 16):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.encoder = AutoModelForSequenceClassification.from_pretrained(model).eval()
        self.store = AdapterStore.from_pretrained(store)
        self.bank = AdapterBank.from_store(self.store)
        self.bank.attach(self.encoder)
        self.max_length, self.group_size = max_length, group_size

    def refresh(self) -> None:
        """Follow the store: new members are served, removed ones are not."""
        if self.store.refresh():
            for name in set(self.bank.names) - set(self.store.names):
                self.bank.remove(name)
            for name in set(self.store.names) - set(self.bank.names):
                self.bank.add(self.store[name])

    @torch.no_grad()
    def classify(self, rows: list[Row]) -> list[Answer]:
        """Each row with its own member's core and head; rows of like length are computed together."""
        texts = [row.text for row in rows]
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        answers: list[Answer | None] = [None] * len(rows)
        for group in by_length([len(each) for each in tokens["input_ids"]], size=self.group_size):
            names = [rows[i].member for i in group]
            batch = {key: [values[i] for i in group] for key, values in tokens.items()}
            with self.bank.use(names):
                logits = self.encoder(**self.tokenizer.pad(batch, return_tensors="pt")).logits
            best = logits.softmax(-1).max(-1)  # labels that a head lacks have -inf
            for i, label, value in zip(group, best.indices.tolist(), best.values.tolist(), strict=True):
                answers[i] = Answer(member=rows[i].member, label=label, probability=value)
        return [answer for answer in answers if answer is not None]


def by_length(lengths: list[int], *, size: int) -> list[list[int]]:
    """Indices of rows in groups of at most `size`, the shortest together, so that little is computed for padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass
class Waiting:
    """A row and where its answer goes."""

    row: Row
    answer: "asyncio.Future[Answer]"


def make_app(classifiers: Classifiers, *, batch_size: int = 64, wait: float = 0.005, refresh: float = 2.0) -> FastAPI:
    """The server's routes, and the task that puts waiting rows into batches."""
    queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def next_batch() -> list[Waiting]:
        batch = [await queue.get()]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        while len(batch) < batch_size:
            try:
                batch.append(await asyncio.wait_for(queue.get(), max(0.0, deadline - loop.time())))
            except asyncio.TimeoutError:
                break
        return batch

    async def serve_batches() -> None:
        while True:
            batch = await next_batch()
            try:
                answers = await asyncio.to_thread(classifiers.classify, [each.row for each in batch])
            except Exception as error:  # whoever waits gets to know
                for each in batch:
                    each.answer.set_exception(error)
                continue
            for each, answer in zip(batch, answers, strict=True):
                if not each.answer.done():  # a client may have gone
                    each.answer.set_result(answer)

    async def follow_the_store() -> None:
        while True:
            await asyncio.sleep(refresh)
            await asyncio.to_thread(classifiers.refresh)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(serve_batches()), asyncio.create_task(follow_the_store())]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="Classifiers on one encoder", lifespan=lifespan)

    @app.get("/members")
    async def members() -> list[str]:
        return list(classifiers.bank.names)

    @app.post("/classify")
    async def classify(request: Request) -> list[Answer]:
        try:
            with classifiers.bank.use([row.member for row in request.rows]):
                pass  # says which members are unknown, before anything waits
        except EigenPeftError as error:
            raise HTTPException(status_code=404, detail=str(error)) from error
        loop = asyncio.get_running_loop()
        waiting = [Waiting(row, loop.create_future()) for row in request.rows]
        for each in waiting:
            queue.put_nowait(each)
        return list(await asyncio.gather(*(each.answer for each in waiting)))

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the classifiers of a store on one encoder.")
    parser.add_argument("--model", required=True, help="Base model: local path or Hub id.")
    parser.add_argument(
        "--store", required=True, help="Store with the classifiers, heads included: local path or Hub id."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--wait", type=float, default=5.0, help="Milliseconds that a row waits for others.")
    parser.add_argument("--refresh", type=float, default=2.0, help="Seconds between looks at the store.")
    arguments = parser.parse_args()
    app = make_app(
        Classifiers(arguments.model, arguments.store),
        batch_size=arguments.batch_size,
        wait=arguments.wait / 1000,
        refresh=arguments.refresh,
    )
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")
