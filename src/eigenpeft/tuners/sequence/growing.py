"""A classifier that gets new classes with every task: prototypes in the spaces of all frozen adapters, no head to train."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenpeft.errors import AdapterConfigError
from eigenpeft.linalg.scores.prototypes import class_means, complete_prototypes, prototype_logits
from eigenpeft.tuners.sequence.growing_file import GrowingState, read_growing, write_growing

Embed = Callable[[str, Sequence[Any]], Tensor]
"""From an adapter's name and rows to their features (rows, features) with that adapter on."""


class GrowingClassifier:
    """Class-incremental classification with frozen adapters, after EASE (arXiv 2403.12030, section 4).

    Every task brings an adapter and classes of its own. A class is its prototype, the mean of its rows' features, in the space
    of every adapter; in spaces of adapters that came later, where its rows are gone, it is completed from the new classes that
    are like it. Nothing is trained, and no adapter changes, so that old classes are lost to new ones alone.

    Args:
        embed: Takes an adapter's name and rows; gives their features (rows, n_features) with it on, such as the mean of
            the last layer over the tokens; a model with `set_adapter`, or an `AdapterBank` with `use`, makes it
            (docs/sequence.md).
        weight: Weight of the spaces of other adapters than a class's own; the paper has 0.1.
        complete: Whether to complete prototypes; False leaves a class out of spaces that came later (a control).

    Raises:
        AdapterConfigError: If the weight is negative.

    Attributes:
        classes: All classes so far, in the order of the logits.
        adapters: Adapters, in the order of the tasks.

    Examples:
        >>> import torch
        >>> spaces = {"first": torch.eye(4), "second": 2 * torch.eye(4).flip(0)}
        >>> growing = GrowingClassifier(lambda name, rows: torch.stack(list(rows)) @ spaces[name])
        >>> growing.add("first", rows=[torch.eye(4)[0], torch.eye(4)[1]], labels=["cat", "dog"])
        >>> growing.add("second", rows=[torch.eye(4)[2], torch.eye(4)[3]], labels=["car", "bus"])
        >>> growing.predict(list(torch.eye(4)))
        ['cat', 'dog', 'car', 'bus']
    """

    def __init__(self, embed: Embed, *, weight: float = 0.1, complete: bool = True):
        if not weight >= 0:
            raise AdapterConfigError(f"weight={weight} must be 0 or more.")
        self.embed, self.weight, self.complete = embed, float(weight), complete
        self.classes: tuple[Hashable, ...] = ()
        self.adapters: tuple[str, ...] = ()
        self._owners = torch.zeros(0, dtype=torch.int64)
        self._prototypes: list[Tensor] = []  # of all classes, per adapter

    def add(self, adapter: str, *, rows: Sequence[Any], labels: Sequence[Hashable]) -> None:
        """Learn a task's classes with its adapter; the rows may be forgotten afterwards.

        Args:
            adapter: Name for `embed`.
            rows: Its training rows, in whatever form `embed` takes.
            labels: Class of each row, by name; classes that were not there before.

        Raises:
            AdapterConfigError: If the adapter or a class came before, there is not one label per row, or `embed` gives something
                else than (rows, features).
        """
        new = tuple(dict.fromkeys(labels))
        again = [name for name in new if name in self.classes]
        if adapter in self.adapters or again:
            what = f"class {again[0]!r}" if again else f"adapter {adapter!r}"
            raise AdapterConfigError(
                f"The {what} is there from an earlier task. Give every task an adapter and classes of its own."
            )
        if not new or len(rows) != len(labels):
            raise AdapterConfigError(f"There are {len(rows)} rows and {len(labels)} labels; pass one label per row.")
        numbers = torch.tensor([new.index(label) for label in labels])
        means = [
            class_means(self._features(name, rows), numbers, n_classes=len(new)) for name in (*self.adapters, adapter)
        ]
        older = [self._in_new_space(number, means) for number in range(len(self.adapters))]
        empty = means[-1].new_zeros(0, means[-1].shape[1])
        self._prototypes = [
            torch.cat([before, here]) for before, here in zip(self._prototypes, means[:-1], strict=True)
        ] + [torch.cat([*older, empty, means[-1]])]
        self._owners = torch.cat([self._owners, torch.full((len(new),), len(self.adapters))])
        self.classes, self.adapters = (*self.classes, *new), (*self.adapters, adapter)

    def logits(self, rows: Sequence[Any]) -> Tensor:
        """(rows, classes): larger is likelier; no probabilities.

        Args:
            rows: As for `add`.

        Raises:
            AdapterConfigError: If no task was added, or `embed` gives something else than (rows, features).
        """
        if not self.adapters:
            raise AdapterConfigError("There are no classes yet; add a task first.")
        features = [self._features(name, rows) for name in self.adapters]
        return prototype_logits(features, self._prototypes, self._owners, weight=self.weight)

    def predict(self, rows: Sequence[Any]) -> list[Hashable]:
        """The class of each row, of all tasks together.

        Args:
            rows: As for `add`.

        Raises:
            AdapterConfigError: If there are no classes yet, or `embed` gives something else than (rows, features).
        """
        return [self.classes[i] for i in self.logits(rows).argmax(dim=1).tolist()]

    def save(self, out_file: str | Path, *, overwrite: bool = False) -> None:
        """Write prototypes, names and settings as one safetensors file, whole or not at all.

        The adapters stay where they are, and `embed` is passed again to `load`.

        Args:
            out_file: The file.
            overwrite: Whether a file of that name may be replaced.

        Raises:
            ArtifactError: If a class's name is neither text nor a whole number, a file is there, or the place cannot be
                written.
        """
        state = GrowingState(
            self.classes, self.adapters, self._owners, self._prototypes, weight=self.weight, complete=self.complete
        )
        write_growing(out_file, state, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path, *, embed: Embed) -> "GrowingClassifier":
        """Read what `save` wrote; it goes on as if it had never been away.

        Args:
            path: The file.
            embed: As for the class: the same adapters by the same names.

        Raises:
            ArtifactError: If the file cannot be read, or holds something else.
            AdapterConfigError: If the weight in it is negative.
        """
        state = read_growing(path)
        loaded = cls(embed, weight=state.weight, complete=state.complete)
        loaded.classes, loaded.adapters = state.classes, state.adapters
        loaded._owners, loaded._prototypes = state.owners, state.prototypes
        return loaded

    def _in_new_space(self, number: int, means: Sequence[Tensor]) -> Tensor:
        """Prototypes of an earlier task's classes in the space of the new adapter; zeros if not completed."""
        own = self._prototypes[number][self._owners == number]
        if not self.complete:
            return means[-1].new_zeros(len(own), means[-1].shape[1])
        return complete_prototypes(own, means[number], means[-1])

    def _features(self, adapter: str, rows: Sequence[Any]) -> Tensor:
        found = self.embed(adapter, rows).detach().float().cpu()
        if found.ndim != 2 or len(found) != len(rows):
            raise AdapterConfigError(
                f"embed({adapter!r}, ...) gave features of shape {tuple(found.shape)} for {len(rows)} rows; it must be "
                "(rows, features)."
            )
        return found
