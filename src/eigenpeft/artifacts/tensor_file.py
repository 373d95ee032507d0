"""A safetensors file whose header is checked before anything is allocated, and whose tensors are read, never mapped."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenpeft.artifacts.reading import CHANGED, Stamp, open_regular, parse_json, read_at, stamp
from eigenpeft.errors import DamagedFileError

# About 300,000 tensors; the experts of the largest models need a third of that.
MAX_HEADER_BYTES = 50 * 2**20
_MAX_AXES = 16
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFile:
    """A safetensors file, read from its places; what `safetensors.safe_open` gives, without a mapping.

    A file that is mapped and then cut by somebody else ends the process with SIGBUS, and a mapping counts every page ever
    read as the process's memory. Here the header is read and checked once: names, shapes and places against the size of the
    file. Every read checks that the file is still the one whose header was read.

    Args:
        path: The file.
        keep_open: True (default) keeps the file open, so that it can still be read after another file has been renamed over
            it. False opens it anew for each read, so that hundreds of files do not use up the process's open files; reading
            a file that was replaced meanwhile is then an error.

    Attributes:
        path: The file.
        shapes: Shape of every tensor, by key, in the order of the file.
        metadata: The texts beside the tensors, by name.

    Raises:
        DamagedFileError: If the file is not a whole safetensors file.

    Example:
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> save_file({"rows": torch.arange(6.0).reshape(3, 2)}, "rows.safetensors")
        >>> with TensorFile("rows.safetensors") as file:
        ...     file.shapes, file.get_slice("rows")[1:2]
        ({'rows': (3, 2)}, tensor([[2., 3.]]))
    """

    def __init__(self, path: str | Path, *, keep_open: bool = True):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[str, int, int]] = {}
        self._keep_open = keep_open
        self._descriptor: int | None = None
        try:
            descriptor = open_regular(self.path)
        except OSError as error:
            raise DamagedFileError(self.path, str(error.strerror or error)) from error
        try:
            self._stamp = stamp(descriptor)
            self._read_header(descriptor)
        except (ValueError, OSError) as error:
            os.close(descriptor)
            raise DamagedFileError(self.path, str(error)) from error
        if keep_open:
            self._descriptor = descriptor
        else:
            os.close(descriptor)

    @property
    def stamp(self) -> Stamp:
        """The state of the file when its header was read."""
        return self._stamp

    def dtype(self, key: str) -> str:
        """The dtype of a tensor, as safetensors spells it ("F32").

        Args:
            key: One of `shapes`.

        Raises:
            KeyError: If there is no such tensor.
        """
        return self._places[key][0]

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.shapes)

    def get_tensor(self, key: str) -> Tensor:
        """A copy of one tensor in its stored dtype.

        Args:
            key: Its name.

        Raises:
            DamagedFileError: If there is none, its dtype is not known here, or the file is not what it was.
        """
        return self.get_tensors(key)[0]

    def get_tensors(self, *keys: str) -> list[Tensor]:
        """Copies of several tensors, the file opened once for all of them.

        Args:
            *keys: Their names.

        Raises:
            DamagedFileError: As `get_tensor`.
        """
        with self._opened() as descriptor:
            return [self._read(key, 0, None, descriptor) for key in keys]

    def get_slice(self, key: str) -> "TensorSlice":
        """Rows of one tensor, read when they are asked for: `file.get_slice("rows")[2:5]`.

        Args:
            key: Its name.

        Raises:
            DamagedFileError: If there is none.
        """
        self._place(key)
        return TensorSlice(self, key)

    def close(self) -> None:
        """Let go of the file; the next read opens it again, if it is still the same."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open file, which another process opens for itself."""
        return {**self.__dict__, "_descriptor": None}

    def _place(self, key: str) -> tuple[str, int, int]:
        if key not in self._places:
            raise DamagedFileError(self.path, f"it has no tensor {key!r}")
        return self._places[key]

    def _read(self, key: str, first: int, last: int | None, descriptor: int) -> Tensor:
        """Rows `first` to `last` of a tensor; the whole one, of any number of axes, without `last`."""
        dtype_name, start, size = self._place(key)
        dtype, shape = DTYPES.get(dtype_name), self.shapes[key]
        if dtype is None:
            raise DamagedFileError(self.path, f"{key!r} has the dtype {dtype_name}, which cannot be read")
        if last is not None:
            row = size // shape[0] if shape[0] else 0
            start, size, shape = start + first * row, (last - first) * row, (last - first, *shape[1:])
        if not size:
            return torch.empty(shape, dtype=dtype)
        data = read_at(descriptor, start, size)
        if len(data) != size:
            raise DamagedFileError(self.path, f"{key!r} ends after {len(data)} of {size} bytes")
        return torch.frombuffer(data, dtype=dtype).view(shape)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The open file, which is still the one whose header was read."""
        descriptor = self._descriptor
        try:
            if descriptor is None:
                descriptor = open_regular(self.path)
                if self._keep_open:
                    self._descriptor = descriptor
            if stamp(descriptor) != self._stamp:
                raise DamagedFileError(self.path, CHANGED)
            yield descriptor
        except OSError as error:
            if isinstance(error, DamagedFileError):
                raise
            raise DamagedFileError(self.path, str(error.strerror or error)) from error
        finally:
            if descriptor is not None and descriptor != self._descriptor:
                os.close(descriptor)

    def _read_header(self, descriptor: int) -> None:
        start = read_at(descriptor, 0, 8)
        size = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + size > self._stamp.size:
            raise ValueError(f"its header ends after {self._stamp.size} bytes")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size} bytes, more than the {MAX_HEADER_BYTES} that are read")
        header = parse_json(bytes(read_at(descriptor, 8, size)), pairs=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("its header is not a table of tensors")
        metadata = header.pop("__metadata__", None)
        self.metadata = {str(name): str(text) for name, text in metadata.items()} if isinstance(metadata, dict) else {}
        data_size = self._stamp.size - 8 - size
        for key, entry in header.items():
            dtype, shape, first, last = _checked(key, entry, data_size)
            self.shapes[key] = shape
            self._places[key] = dtype, 8 + size + first, last - first
        end = 0
        for _, first, length in sorted(self._places.values(), key=lambda place: place[1:]):
            if first != 8 + size + end:
                raise ValueError("its tensors overlap, or leave a gap")
            end += length
        if end != data_size:
            raise ValueError(f"its tensors have {end} bytes, and it holds {data_size}")


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and the texts beside them; copies, which nothing that happens to the file can change.

    Args:
        path: The file.

    Raises:
        DamagedFileError: If it is not a whole safetensors file, or changes while it is read.
    """
    with TensorFile(path) as file:
        return {key: file.get_tensor(key) for key in file}, file.metadata


class TensorSlice:
    """Rows of one tensor of a file; see `TensorFile.get_slice`.

    Args:
        file: The file.
        key: Name of the tensor.
    """

    def __init__(self, file: TensorFile, key: str):
        self._file, self._key = file, key

    def get_shape(self) -> list[int]:
        """Shape of the whole tensor."""
        return list(self._file.shapes[self._key])

    def get_dtype(self) -> str:
        """Its dtype, as safetensors spells it."""
        return self._file.dtype(self._key)

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows.

        Raises:
            DamagedFileError: If it has no rows, or the file is not what it was.
        """
        shape = self._file.shapes[self._key]
        if not shape:
            raise DamagedFileError(self._file.path, f"{self._key!r} is one number and has no rows")
        first, last, _ = slice(rows.start, rows.stop).indices(shape[0])
        with self._file._opened() as descriptor:
            return self._file._read(self._key, first, max(first, last), descriptor)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return table


def _checked(key: str, entry: Any, data_size: int) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first and last byte of a header's entry, held against each other."""
    fits = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
    shape: Any = entry.get("shape") if fits else None
    offsets: Any = entry.get("data_offsets") if fits else None
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > _MAX_AXES:
        raise ValueError(f"the header's entry of {key[:200]!r} is not a dtype, a shape and two offsets")
    first, last = offsets
    if not first <= last <= data_size:
        raise ValueError(f"{key[:200]!r} lies outside of the file")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is not None and math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(f"{key[:200]!r} has shape {tuple(shape)} but {last - first} bytes")
    return entry["dtype"], tuple(shape), first, last


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**62 for each in value)
