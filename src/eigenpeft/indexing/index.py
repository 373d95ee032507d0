"""Which adapter? Mean embeddings of many tasks, asked with a few rows of a task, saved beside a store."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from eigenpeft.artifacts import storage
from eigenpeft.artifacts.pushing import Pushable
from eigenpeft.errors import ArtifactError, EigenPeftError
from eigenpeft.indexing.answers import IndexAnswer, Match, with_downhill
from eigenpeft.indexing.encoder import BaseModelEncoder, Encoder
from eigenpeft.indexing.index_files import INDEX, index_card, read_index
from eigenpeft.indexing.rows import texts_of
from eigenpeft.indexing.sureness import Sureness, fit_sureness
from eigenpeft.linalg.scores.nearest_tasks import task_cosines
from eigenpeft.subspace.stores.changing import BASE
from eigenpeft.version import __version__


class AdapterIndex(Pushable):
    """Names the adapter for rows of a task, from a few rows of each adapter's own task.

    A task's vector is the mean embedding of its rows. A query's score is the cosine of its embedding with that vector, after the
    mean over all tasks has been subtracted from both: `cos(q - m, v_t - m)`. (That a task embedding chooses well among 1,500
    adapters is a result of LORAUTER, arXiv 2601.21795, abstract; subtracting the mean is ours.) How sure the first name is comes
    from rows of the index's own tasks that are held out of their means.

    Args:
        encoder: A `BaseModelEncoder`, its name, or any function from texts to (n, d) numbers, such as a sentence encoder's
            `encode`. Rows are added and asked with the same one.
        max_rows: Rows of each task that are embedded and kept, in float16. Where tasks are alike 256 name the right one more often
            than 64 (docs/which.md).

    Raises:
        EigenPeftError: If `max_rows` is less than 1.

    Examples:
        >>> import torch
        >>> letters = lambda texts: torch.tensor([[text.count(x) for x in "abc"] for text in texts]).float()
        >>> index = AdapterIndex(letters)
        >>> index.add("ay", rows=["aab", "aaa"])
        >>> index.add("bee", rows=["bbc", "bbb"])
        >>> index.query(["abab", "bbbb"]).names
        ('bee', 'ay')
        >>> index.route(["aaa", "bbb"])
        ['ay', 'bee']
    """

    label = INDEX.label

    def __init__(self, encoder: Encoder | str, *, max_rows: int = 256):
        if max_rows < 1:
            raise EigenPeftError(f"max_rows={max_rows} must be at least 1.")
        self._encoder = encoder
        self.max_rows = max_rows
        self.origin: str | None = None
        self._rows: dict[str, Tensor] = {}  # float16, as they are saved, so that a saved index answers alike
        self._fitted: tuple[Tensor, Sureness | None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __repr__(self) -> str:
        return f"AdapterIndex(adapters={len(self)}, encoder={self.encoder_name!r})"

    @property
    def encoder_name(self) -> str:
        """What the saved index says of its encoder: a name that can be loaded, or that of a function."""
        if isinstance(self._encoder, str):
            return self._encoder
        name = getattr(self._encoder, "name", None) or getattr(self._encoder, "__qualname__", None)
        return str(name or type(self._encoder).__name__)

    def add(self, name: str, *, rows: Iterable[Any], replace: bool = False) -> None:
        """Add an adapter by rows of its task.

        Args:
            name: Name of the adapter, as the store or the bank has it.
            rows: Texts or mappings (`texts_of`); the first `max_rows` count.
            replace: Take the place of an adapter of that name.

        Raises:
            EigenPeftError: If the name is taken or no name, there are no rows, or the encoder's numbers are not right.
        """
        if not isinstance(name, str) or not name.strip() or not name.isprintable() or name == BASE:
            raise EigenPeftError(f"{name!r} cannot be a name in the index: use printable characters, and not {BASE!r}.")
        if name in self._rows and not replace:
            raise EigenPeftError(f"{name!r} is in the index already; pass another name or replace=True.")
        found = self._embedded(texts_of(_first(rows, self.max_rows)), what=f"the rows of {name!r}").half()
        width = {len(each[0]) for each in self._rows.values()}
        if width and width != {found.shape[1]}:
            raise EigenPeftError(
                f"The encoder gave {found.shape[1]} numbers per text for {name!r}, and the index has {width.pop()}: use the "
                f"encoder that it was made with, {self.encoder_name!r}."
            )
        self._rows[name] = found
        self._fitted = None

    def remove(self, name: str) -> None:
        """Remove an adapter.

        Args:
            name: Its name.

        Raises:
            KeyError: If there is none.
        """
        if name not in self._rows:
            raise KeyError(f"{name!r} is not in the index of {len(self)} adapters.")
        del self._rows[name]
        self._fitted = None

    def query(self, rows: Iterable[Any], *, top_k: int = 5, downhill: Mapping[str, float] | None = None) -> IndexAnswer:
        """The adapters whose tasks are nearest to rows of one task.

        Args:
            rows: A few rows of the task (8 are many); texts or mappings.
            top_k: Names to give.
            downhill: Adapter to the cosine of its update with the negative gradient of the rows' loss, as `Reuse.nearest` of
                `eigenpeft.audit` gives it with a model and a data set; shown beside the scores.

        Raises:
            EigenPeftError: If the index is empty, there are no rows, or the encoder is another one or gives something else than
                a row of numbers per text.
        """
        embedded = self._embedded(texts_of(rows), what="the rows that are asked about")
        vectors, sureness = self._fit(embedded)
        cosines = task_cosines(embedded.double().mean(dim=0, keepdim=True), vectors)[0]
        order = cosines.argsort(descending=True, stable=True).tolist()
        names = self.names
        matches = tuple(Match(names[place], float(cosines[place])) for place in order[: max(top_k, 1)])
        probability, is_far = None, False
        if sureness is not None:
            lead = float(cosines[order[0]] - cosines[order[1]])
            probability = sureness.probability(lead, len(embedded))
            is_far = sureness.is_far(float(cosines[order[0]]), len(embedded))
        return IndexAnswer(
            matches=with_downhill(matches, downhill), n_rows=len(embedded), probability=probability, is_far=is_far
        )

    def route(
        self, texts: Iterable[Any], *, top_k: int = 1, temperature: float = 0.05, base_if_far: bool = False
    ) -> list[Any]:
        """An adapter for each text of a batch, for `AdapterBank.use`.

        Args:
            texts: The requests.
            top_k: 1 gives each text one name; more give it the weights of so many, as `{name: weight}`, by a softmax of the
                cosines.
            temperature: Temperature of the softmax; smaller trusts the nearest more.
            base_if_far: Give "__base__" to texts that look like none of the tasks.

        Returns:
            One entry per text.

        Raises:
            EigenPeftError: If the index is empty, an argument is out of range, there are no texts, or the encoder is another one or
                gives something else than a row of numbers per text.
        """
        if top_k < 1 or not temperature > 0:
            raise EigenPeftError(f"top_k={top_k} must be at least 1 and temperature={temperature} above 0.")
        embedded = self._embedded(texts_of(texts), what="the texts")
        vectors, sureness = self._fit(embedded)
        cosines = task_cosines(embedded, vectors)
        best = cosines.topk(min(top_k, len(self)), dim=1)
        weights = (best.values / temperature).softmax(dim=1)
        chosen: list[Any] = []
        for score, places, shares in zip(
            best.values[:, 0].tolist(), best.indices.tolist(), weights.tolist(), strict=True
        ):
            if base_if_far and sureness is not None and sureness.is_far(score, 1):
                chosen.append(BASE)
            elif top_k == 1:
                chosen.append(self.names[places[0]])
            else:
                chosen.append({self.names[place]: share for place, share in zip(places, shares, strict=True)})
        return chosen

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Write `index_config.json`, `index.safetensors` and a card; whole or not at all.

        The embeddings of the rows are in the file, not the texts; texts can partly be guessed from embeddings, so share an index
        as you would share the rows.

        Args:
            save_directory: Folder to make, such as one beside the store's.
            overwrite: Whether to replace another index there, which must have been written by eigenpeft.

        Raises:
            EigenPeftError: If the index has no adapters.
            ArtifactError: If the folder cannot be written, or holds something that is not replaced.
        """
        self._write(Path(save_directory), overwrite=overwrite)
        self.origin = str(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        encoder: Encoder | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "AdapterIndex":
        """Open an index; its hashes are checked.

        Args:
            path_or_id: Folder or Hub id.
            encoder: The encoder that it was made with, or where it lies now; None loads the base model that the index names, when
                it is first asked.
            revision: Hub branch, tag or commit.
            token: Hub token.
            cache_dir: Hub cache.
            local_files_only: Use the Hub cache alone.

        Raises:
            SubspaceNotFoundError: If there is none at that place.
            ArtifactError: If files are missing, truncated or altered, or the index was made with a function, which must be passed.
        """
        options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        where = storage.locate(path_or_id, INDEX, local_files_only=local_files_only, **options)
        saved = read_index(where)
        if encoder is None and not saved.is_model:
            raise ArtifactError(
                f"The index at {str(path_or_id)!r} was made with an encoder of its user's own, {saved.encoder!r}; pass it as "
                "encoder=."
            )
        index = cls(saved.encoder if encoder is None else encoder, max_rows=saved.max_rows)
        index._rows, index.origin = dict(saved.rows), where.origin
        return index

    def _write(self, folder: Path, *, overwrite: bool = False) -> None:
        if not self._rows:
            raise EigenPeftError("The index has no adapters; add some first.")
        numbers = {f"{place:06d}": rows for place, rows in enumerate(self._rows.values())}
        config = {
            "sha256": storage.fingerprint(numbers),
            "names": list(self.names),
            "encoder": self.encoder_name,
            "encoder_is_model": isinstance(self._encoder, str | BaseModelEncoder),
            "max_rows": self.max_rows,
            "eigenpeft_version": __version__,
        }
        card = index_card(self.names, encoder=self.encoder_name)
        storage.write_artifact(folder, INDEX, config=config, tensors=numbers, card=card, overwrite=overwrite)

    def _write_to(self, folder: Path) -> None:
        self._write(folder)

    def _fit(self, embedded: Tensor) -> tuple[Tensor, Sureness | None]:
        if not self._rows:
            raise EigenPeftError("The index has no adapters; add some first.")
        width = next(iter(self._rows.values())).shape[1]
        if embedded.shape[1] != width:
            raise EigenPeftError(
                f"The encoder gives {embedded.shape[1]} numbers per text, and the index has {width}: it was made with another one. "
                f"Ask with {self.encoder_name!r}, or make the index anew."
            )
        if self._fitted is None:
            rows = [each.double() for each in self._rows.values()]
            self._fitted = torch.stack([each.mean(dim=0) for each in rows]), fit_sureness(rows)
        return self._fitted

    def _embedded(self, texts: Sequence[str], *, what: str) -> Tensor:
        """(n, d) vectors of unit length."""
        if not texts:
            raise EigenPeftError(f"There are no texts in {what}; pass at least one.")
        if isinstance(self._encoder, str):
            self._encoder = BaseModelEncoder.from_pretrained(self._encoder)
        found = torch.as_tensor(self._encoder(list(texts))).detach().float().cpu()
        if found.ndim != 2 or len(found) != len(texts) or not bool(found.isfinite().all()):
            raise EigenPeftError(
                f"The encoder {self.encoder_name!r} gave numbers of shape {tuple(found.shape)} for the {len(texts)} texts of "
                f"{what}; it must give one row of finite numbers per text."
            )
        return nn.functional.normalize(found, dim=1)


def build_index(
    rows: Mapping[str, Iterable[Any]], *, encoder: Encoder | str, max_rows: int = 256, progress: bool = True
) -> AdapterIndex:
    """An index of many adapters in one call.

    Args:
        rows: Adapter to rows of its task.
        encoder: As for `AdapterIndex`.
        max_rows: As for `AdapterIndex`.
        progress: Show a progress bar.

    Raises:
        EigenPeftError: As `AdapterIndex` and `AdapterIndex.add`.

    Examples:
        >>> import torch
        >>> letters = lambda texts: torch.tensor([[text.count(x) for x in "abc"] for text in texts]).float()
        >>> index = build_index({"ay": ["aab", "aaa"], "bee": ["bbc", "bbb"]}, encoder=letters, progress=False)
        >>> index.names
        ('ay', 'bee')
    """
    index = AdapterIndex(encoder, max_rows=max_rows)
    for name, own in tqdm(rows.items(), desc="Indexing", unit="adapter", disable=not progress):
        index.add(name, rows=own)
    return index


def _first(rows: Iterable[Any], number: int) -> list[Any]:
    found = []
    for row in rows:
        found.append(row)
        if len(found) == number:
            break
    return found
