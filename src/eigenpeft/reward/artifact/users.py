"""The table of users: weights by id in one sorted file, with changes kept aside until they are saved."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.artifacts.storage import fingerprint
from eigenpeft.artifacts.tensor_file import read_tensors
from eigenpeft.errors import ArtifactError, RewardModelError, UnknownUserError

MAX_ID_BYTES = 255
SIMPLEX_TOLERANCE = 1e-4  # how far the sum of a user's weights may be from one
UserId = str | int
HASH = "sha256"  # key of the tensors' fingerprint in the file's metadata


class UserTable:
    """Weights on the simplex by user id; a million users cost a binary search in a sorted array, not a dictionary.

    On disk: `ids` (n_users, width) UTF-8 bytes padded with zeros, sorted; `weights` (n_users, n_basis) float32;
    `n_pairs` (n_users,) int32, the size of the history each was fitted to. Users added, updated or removed are kept
    in memory beside the file until `save` merges them. Threads may read while another adds users.

    Args:
        n_basis: Length of a weight vector.

    Examples:
        >>> users = UserTable(2)
        >>> users.put(["ann"], user_weights=torch.tensor([[0.25, 0.75]]), n_pairs=[3])
        >>> len(users), "ann" in users, users.user_weights(["ann"]).tolist()
        (1, True, [[0.25, 0.75]])
    """

    def __init__(self, n_basis: int):
        self.n_basis = n_basis
        self._ids = np.zeros(0, dtype="S1")
        self._weights = torch.zeros(0, n_basis)
        self._n_pairs = torch.zeros(0, dtype=torch.int32)
        self._changed: dict[bytes, tuple[np.ndarray, int] | None] = {}  # None: removed
        self._place: Path | None = None  # of the file that the sorted part was read from or written to
        self._lock = RLock()  # held while `_changed` is read or written

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = {name: value for name, value in self.__dict__.items() if name != "_lock"}
            return state | {"_changed": dict(self._changed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=RLock())

    def __len__(self) -> int:
        with self._lock:
            changed = dict(self._changed)
        known = self._rows(list(changed))[1] if changed else np.zeros(0, dtype=bool)
        change = sum((value is not None) - int(old) for value, old in zip(changed.values(), known, strict=True))
        return len(self._ids) + change

    def __contains__(self, user_id: object) -> bool:
        """Whether a user has weights.

        Raises:
            RewardModelError: If the id is empty or too long.
        """
        if not isinstance(user_id, str | int):
            return False
        return bool(self.known([user_id])[0])

    def __iter__(self) -> Iterator[str]:
        """Ids in the order of their bytes."""
        ids, _, _ = self._merged()
        return (text.decode("utf-8") for text in ids)

    def known(self, user_ids: Sequence[UserId]) -> Tensor:
        """Which of the users are in the table.

        Args:
            user_ids: Ids; an int stands for its decimal text.

        Returns:
            (n,) bool.

        Raises:
            RewardModelError: If an id is empty, too long, or of another type.
        """
        keys = [encode(user_id) for user_id in user_ids]
        found = self._rows(keys)[1]
        with self._lock:
            for i, key in enumerate(keys):
                if key in self._changed:
                    found[i] = self._changed[key] is not None
        return torch.from_numpy(found)

    def user_weights(self, user_ids: Sequence[UserId], *, unknown: Tensor | None = None) -> Tensor:
        """Weights of each of the users, in the order asked.

        Args:
            user_ids: Ids, repeated as you like.
            unknown: (n_basis,) weights that unknown users get; None refuses them.

        Returns:
            (n, n_basis) float32.

        Raises:
            RewardModelError: If an id is empty, too long, or of another type.
            UnknownUserError: If one is not in the table and `unknown` is None.
        """
        keys = [encode(user_id) for user_id in user_ids]
        rows, found = self._rows(keys)
        result = self._weights[torch.from_numpy(np.where(found, rows, 0))] if len(self._ids) else None
        result = torch.zeros(len(keys), self.n_basis) if result is None else result.clone()
        with self._lock:
            for i, key in enumerate(keys):
                if key in self._changed:
                    value = self._changed[key]
                    found[i] = value is not None
                    if value is not None:
                        result[i] = torch.from_numpy(value[0])
        missing = [i for i, is_there in enumerate(found) if not is_there]
        if missing and unknown is None:
            others = len({str(user_ids[i]) for i in missing}) - 1  # a user asked for in many rows is one user
            raise UnknownUserError(
                f"{user_ids[missing[0]]!r} is not among the {len(self)} users of this reward model"
                + (f" (nor {'is' if others == 1 else 'are'} {others} more of those asked for)" if others else "")
                + ". Add the user from a few comparisons (add_user), or ask for the population's reward with "
                'unknown="population".'
            )
        if missing and unknown is not None:
            result[missing] = unknown.to(result)
        return result

    def n_pairs(self, user_id: UserId) -> int:
        """Number of comparisons the user's weights were fitted to.

        Args:
            user_id: A known user.

        Raises:
            RewardModelError: If an id is empty, too long, or of another type.
            UnknownUserError: If it is not known.
        """
        key = encode(user_id)
        with self._lock:
            self.user_weights([user_id])
            value = self._changed.get(key)
        if value is not None:
            return value[1]
        return int(self._n_pairs[int(self._rows([key])[0][0])])

    def put(self, user_ids: Sequence[UserId], *, user_weights: Tensor, n_pairs: Sequence[int]) -> None:
        """Add users, or replace the weights of those already there.

        Args:
            user_ids: Distinct ids.
            user_weights: (n, n_basis), on the simplex.
            n_pairs: Size of each history.

        Raises:
            RewardModelError: If an id comes twice, is empty, too long or of another type, or the weights have another shape or are
                not on the simplex.
        """
        keys = [encode(user_id) for user_id in user_ids]
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RewardModelError(
                f"The user {twice.decode()!r} is listed more than once (ids are compared as text, so 7 and '7' are one "
                "user); give each user once, with all its comparisons."
            )
        user_weights = user_weights.detach().cpu().float()
        if user_weights.shape != (len(keys), self.n_basis):
            raise RewardModelError(
                f"user_weights of shape {tuple(user_weights.shape)} must be ({len(keys)}, {self.n_basis}): a row per user."
            )
        fits = (user_weights >= 0).all(dim=1) & ((user_weights.sum(dim=1) - 1).abs() < SIMPLEX_TOLERANCE)
        if not bool(fits.all()):
            wrong = int((~fits).nonzero()[0])
            raise RewardModelError(
                f"The weights of user {keys[wrong].decode()!r}, {user_weights[wrong].tolist()}, must be non-negative and sum to "
                "one; fit them with fit_users."
            )
        rows = user_weights.numpy().copy()
        changes = {key: (rows[i], int(n_pairs[i])) for i, key in enumerate(keys)}
        with self._lock:
            self._changed.update(changes)

    def remove(self, user_id: UserId) -> None:
        """Forget a user; the file forgets at the next `save`.

        Args:
            user_id: A known user.

        Raises:
            RewardModelError: If an id is empty, too long, or of another type.
            UnknownUserError: If it is not known.
        """
        with self._lock:
            self.user_weights([user_id])
            self._changed[encode(user_id)] = None

    def tensors(self) -> dict[str, Tensor]:
        """The whole table, changes merged, as the file holds it."""
        ids, weights, n_pairs = self._merged()
        width = max(ids.dtype.itemsize, 1)
        flat = np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), width)
        return {"ids": torch.from_numpy(flat.copy()), "weights": weights, "n_pairs": n_pairs}

    def save(self, out_file: str | Path) -> None:
        """Write the table to a new safetensors file, with the hash of its tensors.

        Args:
            out_file: File to write; whoever calls gives it its place in one step.
        """
        tensors = self.tensors()
        save_file(tensors, out_file, metadata={HASH: fingerprint(tensors)})

    def onto(self, there: "UserTable") -> "UserTable":
        """A table on disk with the changes of this one, so that two writers lose nothing of each other's.

        Of users that both changed, this table's weights count. Where this table was read from the same file, only what was
        added, updated or removed since counts; otherwise all its users do.

        Args:
            there: The table as it is on disk now.
        """
        with self._lock:
            changed = dict(self._changed)
        if self._place is None or self._place != there._place:
            ids, weights, n_pairs = self._merged()
            rows = weights.numpy()
            changed |= {bytes(ids[i]): (rows[i], int(n_pairs[i])) for i in range(len(ids))}
        merged = UserTable(self.n_basis)
        merged._ids, merged._weights, merged._n_pairs = there._ids, there._weights, there._n_pairs
        merged._changed = changed
        return merged

    def settle(self, saved: "UserTable", *, path: Path) -> None:
        """Take over a table that was saved: its users are known here, and what it holds is no longer a change.

        Args:
            saved: What was written: this table, or the one that `onto` gave.
            path: The file.
        """
        ids, weights, n_pairs = saved._merged()
        with saved._lock:
            done = dict(saved._changed)
        with self._lock:
            self._changed = {key: value for key, value in self._changed.items() if done.get(key, self) is not value}
            self._ids, self._weights, self._n_pairs, self._place = ids, weights, n_pairs, path.resolve()

    @classmethod
    def open(cls, path: str | Path, *, n_basis: int) -> "UserTable":
        """Read a table and check every row of it.

        Args:
            path: File written by `save`.
            n_basis: Length its weight vectors must have.

        Raises:
            ArtifactError: If it is not such a file, was altered, or holds weights that are not on the simplex.
        """
        try:
            tensors, metadata = read_tensors(path)
            expected = metadata.get(HASH)
            ids, weights, n_pairs = (tensors[name] for name in ("ids", "weights", "n_pairs"))
        except (ArtifactError, KeyError) as error:
            raise ArtifactError(f"{str(path)!r} is not a whole table of users ({error}); get a fresh copy.") from error
        if fault := _fault(ids, weights, n_pairs, n_basis=n_basis):
            raise ArtifactError(
                f"{str(path)!r} {fault}. It belongs to another reward model, or was altered; get a fresh copy."
            )
        if expected is not None and fingerprint(tensors) != expected:
            raise ArtifactError(
                f"The table of users {str(path)!r} does not have its hash: it was altered. Get a fresh copy."
            )
        table = cls(n_basis)
        table._place = Path(path).resolve()
        if len(ids):
            table._ids = ids.numpy().view(f"S{ids.shape[1]}")[:, 0]
            table._weights, table._n_pairs = weights, n_pairs
        return table

    def _rows(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Row in the sorted part of each key, and whether it is there."""
        width = self._ids.dtype.itemsize
        fits = np.array([len(key) <= width for key in keys], dtype=bool)
        wanted = np.array([key if fit else b"" for key, fit in zip(keys, fits, strict=True)], dtype=self._ids.dtype)
        rows = np.searchsorted(self._ids, wanted)
        in_range = rows < len(self._ids)
        found = fits & in_range
        found[found] = self._ids[rows[found]] == wanted[found]
        return rows, found

    def _merged(self) -> tuple[np.ndarray, Tensor, Tensor]:
        with self._lock:
            changed = dict(self._changed)
        if not changed:
            return self._ids, self._weights.clone(), self._n_pairs.clone()
        kept = np.ones(len(self._ids), dtype=bool)
        rows, found = self._rows(list(changed))
        kept[rows[found]] = False
        mask = torch.from_numpy(kept)
        fresh = [(key, *value) for key, value in changed.items() if value is not None]
        width = max([self._ids.dtype.itemsize, *(len(key) for key, _, _ in fresh)])
        new_ids = np.array([key for key, _, _ in fresh], dtype=f"S{width}")
        ids = np.concatenate([self._ids[kept].astype(f"S{width}"), new_ids])
        order = np.argsort(ids, kind="stable")
        new_weights = np.array([row for _, row, _ in fresh], dtype=np.float32).reshape(len(fresh), self.n_basis)
        weights = torch.cat([self._weights[mask], torch.from_numpy(new_weights)])
        n_pairs = torch.cat([self._n_pairs[mask], torch.tensor([n for _, _, n in fresh], dtype=torch.int32)])
        places = torch.from_numpy(order)
        return ids[order], weights[places], n_pairs[places]


def encode(user_id: UserId) -> bytes:
    """The bytes of an id in the table.

    Args:
        user_id: Text, or an int that stands for its decimal text.

    Raises:
        RewardModelError: If it is empty, too long, or of another type.
    """
    if isinstance(user_id, bool) or not isinstance(user_id, str | int | np.integer):
        raise RewardModelError(
            f"The user id {user_id!r} is a {type(user_id).__name__}; pass text or a whole number for each user."
        )
    try:
        key = str(user_id).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RewardModelError(
            f"The user id {str(user_id)[:40]!r} is not text that UTF-8 can hold ({error.reason}); pass valid text."
        ) from error
    if not 1 <= len(key) <= MAX_ID_BYTES or b"\0" in key:
        raise RewardModelError(
            f"The user id {str(user_id)[:40]!r} has {len(key)} bytes; ids have 1 to {MAX_ID_BYTES} bytes of UTF-8 "
            "and no NUL characters. Hash longer ones."
        )
    return key


def _fault(ids: Tensor, weights: Tensor, n_pairs: Tensor, *, n_basis: int) -> str | None:
    """What is wrong with the tensors of a table, as the end of a sentence; None where they are in order."""
    shapes = ids.ndim == 2 and weights.shape == (len(ids), n_basis) and n_pairs.shape == (len(ids),)
    kinds = (ids.dtype, weights.dtype, n_pairs.dtype)
    if not shapes or kinds != (torch.uint8, torch.float32, torch.int32):
        return (
            f"holds ids {tuple(ids.shape)}, weights {tuple(weights.shape)} and n_pairs {tuple(n_pairs.shape)} of "
            f"{', '.join(str(kind).removeprefix('torch.') for kind in kinds)}; expected one row of {n_basis} float32 "
            "weights and one int32 per uint8 id"
        )
    if not len(ids):
        return None
    if not 1 <= ids.shape[1] <= MAX_ID_BYTES:
        return f"has ids of {ids.shape[1]} bytes; ids have 1 to {MAX_ID_BYTES}"
    names = ids.contiguous().numpy().view(f"S{ids.shape[1]}")[:, 0]
    if not bool((names[1:] > names[:-1]).all()):
        return "has ids that are not in order, or come twice"
    try:
        np.char.decode(names, "utf-8")
    except UnicodeDecodeError:
        return "has ids that are not UTF-8"
    bad = ((weights < 0).any(dim=1) | ~((weights.sum(dim=1) - 1).abs() < SIMPLEX_TOLERANCE)).nonzero()[:, 0]
    if len(bad):
        return f"has weights of {names[int(bad[0])].decode()!r} (and {len(bad) - 1} more) that are not shares that sum to one"
    return None
