"""Which of several tasks a few rows are nearest to: cosines of mean embeddings, and how often the nearest is the right one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from eigenpeft.linalg.orthogonal import unit_rows


@dataclass(frozen=True)
class HeldOutQueries:
    """Queries made of rows of tasks that are known, each left out of its own task's mean.

    Attributes:
        sizes: Rows of each query.
        margins: By how much the largest cosine is ahead of the second.
        own: Cosine with the query's own task.
        right: 1 where the own task came first, else 0.
    """

    sizes: Float[Tensor, " q"]
    margins: Float[Tensor, " q"]
    own: Float[Tensor, " q"]
    right: Float[Tensor, " q"]


def task_cosines(queries: Float[Tensor, "q d"], vectors: Float[Tensor, "t d"]) -> Float[Tensor, "q t"]:
    """Cosines of queries with tasks, the mean of the tasks taken off both; with one task nothing is taken off.

    Embeddings of texts have a large part in common, which says nothing about the task; without it the cosines differ.

    Args:
        queries: Mean embeddings of a few rows each.
        vectors: Mean embeddings of the tasks' rows.

    Returns:
        float64.

    Example:
        >>> import torch
        >>> task_cosines(torch.tensor([[10.0, 2.0]]), torch.tensor([[10.0, 1.0], [10.0, -1.0]])).round(decimals=3)
        tensor([[ 1., -1.]], dtype=torch.float64)
    """
    queries, vectors = queries.double(), vectors.double()
    if len(vectors) > 1:
        middle = vectors.mean(dim=0)
        queries, vectors = queries - middle, vectors - middle
    return unit_rows(queries) @ unit_rows(vectors).mT


def held_out_queries(
    rows: Sequence[Float[Tensor, "_n d"]], *, sizes: Sequence[int], n_draws: int, generator: Generator
) -> HeldOutQueries:
    """Draw rows of each task, leave them out of its mean, and ask which task they are nearest to.

    Args:
        rows: Embeddings of the rows of each task; two tasks at least. A size of which a task has less than twice as many rows is
            not drawn from it.
        sizes: Rows per query.
        n_draws: Queries per task and size.
        generator: Source of the draws.
    """
    means = torch.stack([each.double().mean(dim=0) for each in rows])
    found: list[tuple[float, float, float, float]] = []
    for own, each in enumerate(rows):
        for size in [size for size in sizes if 2 * size <= len(each)]:
            for _ in range(n_draws):
                order = torch.randperm(len(each), generator=generator)
                vectors = means.clone()
                vectors[own] = each[order[size:]].double().mean(dim=0)
                cosines = task_cosines(each[order[:size]].double().mean(dim=0, keepdim=True), vectors)[0]
                first, second = cosines.topk(2).values.tolist()
                found.append((size, first - second, float(cosines[own]), float(cosines.argmax() == own)))
    columns = torch.tensor(found, dtype=torch.float64).reshape(-1, 4).unbind(dim=1)
    return HeldOutQueries(*columns)
