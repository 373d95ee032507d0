"""The table of users: weights by id in one sorted, memory-mapped file, with changes kept aside until they are saved."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eigenpeft.errors import ArtifactError, RewardModelError, UnknownUserError

MAX_ID_BYTES = 255
UserId = str | int


class UserTable:
    """Weights on the simplex by user id; a million users cost a binary search in a mapped file, not a dictionary.

    On disk: `ids` (n_users, width) UTF-8 bytes padded with zeros, sorted; `weights` (n_users, n_basis) float32;
    `n_pairs` (n_users,) int32, the size of the history each was fitted to. Additions, updates and deletions are kept
    in memory beside the file until `save` merges them.

    Args:
        n_basis: Length of a weight vector.
    """

    def __init__(self, n_basis: int):
        self.n_basis = n_basis
        self._ids = np.zeros(0, dtype="S1")
        self._weights = torch.zeros(0, n_basis)
        self._n_pairs = torch.zeros(0, dtype=torch.int32)
        self._changed: dict[bytes, tuple[np.ndarray, int] | None] = {}  # None: deleted

    def __len__(self) -> int:
        known = self._rows(list(self._changed))[1] if self._changed else np.zeros(0, dtype=bool)
        change = sum((value is not None) - int(old) for value, old in zip(self._changed.values(), known, strict=True))
        return len(self._ids) + change

    def __contains__(self, user_id: object) -> bool:
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
        """
        keys = [encode(user_id) for user_id in user_ids]
        found = self._rows(keys)[1]
        for i, key in enumerate(keys):
            if key in self._changed:
                found[i] = self._changed[key] is not None
        return torch.from_numpy(found)

    def weights(self, user_ids: Sequence[UserId], *, default: Tensor | None = None) -> Tensor:
        """Weights of each of the users, in the order asked.

        Args:
            user_ids: Ids, repeated as you like.
            default: (n_basis,) weights of unknown users; None refuses them.

        Returns:
            (n, n_basis) float32.

        Raises:
            UnknownUserError: If one is unknown and there is no default.
        """
        keys = [encode(user_id) for user_id in user_ids]
        rows, found = self._rows(keys)
        result = self._weights[torch.from_numpy(np.where(found, rows, 0))] if len(self._ids) else None
        result = torch.zeros(len(keys), self.n_basis) if result is None else result.clone()
        for i, key in enumerate(keys):
            if key in self._changed:
                value = self._changed[key]
                found[i] = value is not None
                if value is not None:
                    result[i] = torch.from_numpy(value[0])
        missing = [i for i, is_there in enumerate(found) if not is_there]
        if missing and default is None:
            raise UnknownUserError(
                f"{user_ids[missing[0]]!r} is not among the {len(self)} users of this reward model"
                + (f" (nor are {len(missing) - 1} more of those asked for)" if len(missing) > 1 else "")
                + ". Add the user from a few comparisons (add_user), or ask for the population's reward with "
                'unknown="population".'
            )
        if missing and default is not None:
            result[missing] = default.to(result)
        return result

    def n_pairs(self, user_id: UserId) -> int:
        """Number of comparisons the user's weights were fitted to.

        Args:
            user_id: A known user.

        Raises:
            UnknownUserError: If it is not known.
        """
        self.weights([user_id])
        key = encode(user_id)
        if key in self._changed:
            value = self._changed[key]
            return value[1] if value else 0
        return int(self._n_pairs[int(self._rows([key])[0][0])])

    def put(self, user_ids: Sequence[UserId], weights: Tensor, n_pairs: Sequence[int]) -> None:
        """Add users, or replace the weights of those already there.

        Args:
            user_ids: Distinct ids.
            weights: (n, n_basis), on the simplex.
            n_pairs: Size of each history.

        Raises:
            RewardModelError: If an id comes twice, or the weights are not on the simplex.
        """
        keys = [encode(user_id) for user_id in user_ids]
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RewardModelError(
                f"The user {twice.decode()!r} is listed more than once (ids are compared as text, so 7 and '7' are one "
                "user); give each user once, with all its comparisons."
            )
        weights = weights.detach().cpu().float()
        if weights.shape != (len(keys), self.n_basis):
            raise RewardModelError(
                f"weights of shape {tuple(weights.shape)} must be ({len(keys)}, {self.n_basis}): a row a user."
            )
        if not bool(((weights >= 0).all(dim=1) & ((weights.sum(dim=1) - 1).abs() < 1e-4)).all()):
            raise RewardModelError("User weights must be non-negative and sum to one; fit them with fit_users.")
        rows = weights.numpy().copy()
        self._changed.update((key, (rows[i], int(n_pairs[i]))) for i, key in enumerate(keys))

    def delete(self, user_id: UserId) -> None:
        """Forget a user; the file forgets at the next `save`.

        Args:
            user_id: A known user.

        Raises:
            UnknownUserError: If it is not known.
        """
        self.weights([user_id])
        self._changed[encode(user_id)] = None

    def tensors(self) -> dict[str, Tensor]:
        """The whole table, changes merged, as the file holds it."""
        ids, weights, n_pairs = self._merged()
        width = max(ids.dtype.itemsize, 1)
        flat = np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), width)
        return {"ids": torch.from_numpy(flat.copy()), "weights": weights, "n_pairs": n_pairs}

    def save(self, path: str | Path) -> None:
        """Write the table to a safetensors file, under a temporary name first: the table may be mapped from that file.

        Args:
            path: File to write.
        """
        path = Path(path)
        scratch = path.with_name(f".{path.name}.tmp")
        try:
            save_file(self.tensors(), scratch)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path, *, n_basis: int) -> "UserTable":
        """Map a table; nothing but the header is read.

        Args:
            path: File written by `save`.
            n_basis: Length its weight vectors must have.

        Raises:
            ArtifactError: If it is not such a file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                ids, weights, n_pairs = (file.get_tensor(name) for name in ("ids", "weights", "n_pairs"))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{str(path)!r} is not a whole table of users ({error}); get a fresh copy.") from error
        if weights.shape != (len(ids), n_basis) or n_pairs.shape != (len(ids),) or ids.dtype != torch.uint8:
            raise ArtifactError(
                f"{str(path)!r} holds {len(ids)} ids and weights {tuple(weights.shape)}; expected one row of "
                f"{n_basis} weights an id. It belongs to another reward model, or was altered; get a fresh copy."
            )
        table = cls(n_basis)
        if len(ids):
            table._ids = ids.numpy().view(f"S{ids.shape[1]}")[:, 0]
            table._weights, table._n_pairs = weights, n_pairs
        return table

    def _rows(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Row in the mapped part of each key, and whether it is there."""
        width = self._ids.dtype.itemsize
        fits = np.array([len(key) <= width for key in keys], dtype=bool)
        wanted = np.array([key if fit else b"" for key, fit in zip(keys, fits, strict=True)], dtype=self._ids.dtype)
        rows = np.searchsorted(self._ids, wanted)
        inside = rows < len(self._ids)
        found = fits & inside
        found[found] = self._ids[rows[found]] == wanted[found]
        return rows, found

    def _merged(self) -> tuple[np.ndarray, Tensor, Tensor]:
        if not self._changed:
            return self._ids, self._weights.clone(), self._n_pairs.clone()
        kept = np.ones(len(self._ids), dtype=bool)
        rows, found = self._rows(list(self._changed))
        kept[rows[found]] = False
        mask = torch.from_numpy(kept)
        fresh = [(key, *value) for key, value in self._changed.items() if value is not None]
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
    key = str(user_id).encode("utf-8")
    if not 1 <= len(key) <= MAX_ID_BYTES or b"\0" in key:
        raise RewardModelError(
            f"The user id {str(user_id)[:40]!r} has {len(key)} bytes; ids have 1 to {MAX_ID_BYTES} bytes of UTF-8 "
            "and no NUL characters. Hash longer ones."
        )
    return key
