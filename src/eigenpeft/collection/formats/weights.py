"""One weights file of an adapter: tensor shapes from its header, single tensors on request, and no code from a pickle."""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eigenpeft.artifacts.reading import CHANGED, Stamp, open_regular, read_at, read_start, stamp
from eigenpeft.artifacts.tensor_file import TensorFile
from eigenpeft.collection.formats.torch_files import CodeError, NotPlainError, TorchZip
from eigenpeft.errors import DamagedFileError

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# weights_only could be escaped before torch 2.6 (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


class WeightsFile(Protocol):
    """A weights file whose header has been read.

    Attributes:
        path: The file.
        shapes: Shape of every tensor.
        not_float: Keys of tensors that do not hold floating-point numbers.
        stamp: The state of the file when its header was read.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    not_float: frozenset[str]
    stamp: Stamp

    def read(self, key: str) -> Tensor:
        """A copy of one tensor in its stored dtype, on the CPU.

        Args:
            key: Its key in the file.

        Raises:
            ValueError: If it cannot be read any more.
        """
        ...

    def read_many(self, *keys: str) -> list[Tensor]:
        """Copies of some tensors in their stored dtype, on the CPU.

        Args:
            *keys: Their keys in the file.

        Raises:
            ValueError: If one cannot be read any more.
        """
        ...

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        ...


def open_weights(folder: Path) -> WeightsFile:
    """Read the header of an adapter's weights: `adapter_model.safetensors`, else `adapter_model.bin`.

    Args:
        folder: Folder of the adapter.

    Raises:
        ValueError: If there is none or it cannot be read; the message is a clause to put behind the adapter's name.
    """
    for name, kind in ((SAFETENSORS_NAME, SafetensorsFile), (BIN_NAME, BinFile)):
        if (folder / name).exists():  # a pipe or a device is refused by name, not passed over
            return kind(folder / name)
    raise ValueError(f"has neither {SAFETENSORS_NAME} nor {BIN_NAME}; download it again, or leave it out")


def file_sha256(path: str | Path, *, expected: Stamp | None = None) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Args:
        path: The file.
        expected: The state that the file must be in, before and after it is read; None takes any.

    Raises:
        OSError: If it is not a regular file, or cannot be read.
        ValueError: If it was replaced or changed; the message is a clause to put behind the adapter's name.
    """
    digest, place = hashlib.sha256(), 0
    descriptor = open_regular(path)
    try:
        before = stamp(descriptor)
        while block := read_at(descriptor, place, 1 << 20):
            digest.update(block)
            place += len(block)
        if expected is not None and not before == expected == stamp(descriptor):
            raise ValueError(_unreadable(Path(path), CHANGED))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


class SafetensorsFile:
    """A `.safetensors` file; see `WeightsFile`. The file is open only while its header or a tensor is read.

    Args:
        path: The file.

    Raises:
        ValueError: If the file cannot be read, or its header does not fit it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = TensorFile(path, keep_open=False)
        except DamagedFileError as error:
            raise ValueError(_unreadable(path, error.reason)) from error
        self.stamp = self._file.stamp
        self.shapes = self._file.shapes
        self.not_float = frozenset(key for key in self.shapes if self._file.dtype(key) not in _FLOATS)

    def read(self, key: str) -> Tensor:
        """A copy of one tensor in its stored dtype.

        Args:
            key: Its key in the file.

        Raises:
            ValueError: If it cannot be read any more.
        """
        return self.read_many(key)[0]

    def read_many(self, *keys: str) -> list[Tensor]:
        """Copies of some tensors in their stored dtype, the file opened once.

        Args:
            *keys: Their keys in the file.

        Raises:
            ValueError: If one cannot be read any more.
        """
        try:
            return self._file.get_tensors(*keys)
        except DamagedFileError as error:
            raise ValueError(_unreadable(self.path, error.reason)) from error

    def close(self) -> None:
        """Nothing is open between two reads."""


class BinFile:
    """A file written by `torch.save`; see `WeightsFile`.

    Of the zip format (torch >= 1.6) the index is read without unpickling anything, and tensors from their places in the
    file. Files of older versions are loaded whole by torch, with `weights_only`.

    Args:
        path: The file.

    Raises:
        ValueError: If the file cannot be read; the message is a clause to put behind the adapter's name.
    """

    def __init__(self, path: Path):
        self.path = path
        self._zip: TorchZip | None = None
        self._old: dict[str, Tensor] | None = None
        self.stamp = _stamp(path)
        if _is_zip(path):
            self._zip = _open_zip(path)
            self.stamp = self._zip.stamp
            self.shapes = {key: place.shape for key, place in self._zip.places.items()}
            floats = {key for key, place in self._zip.places.items() if place.dtype.is_floating_point}
        else:
            tensors = self._load_old()
            self.shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            floats = {key for key, tensor in tensors.items() if tensor.is_floating_point()}
        self.not_float = frozenset(self.shapes) - floats

    def _load_old(self) -> dict[str, Tensor]:
        if self._old is None:
            if _stamp(self.path) != self.stamp:
                raise ValueError(_unreadable(self.path, CHANGED))
            self._old = _load_old(self.path)
        return self._old

    def read_many(self, *keys: str) -> list[Tensor]:
        """Copies of some tensors in their stored dtype.

        Args:
            *keys: Their keys in the file.

        Raises:
            ValueError: If one cannot be read any more.
        """
        return [self.read(key) for key in keys]

    def read(self, key: str) -> Tensor:
        """A copy of one tensor in its stored dtype.

        Args:
            key: Its key in the file.

        Raises:
            ValueError: If it cannot be read any more.
        """
        if self._zip is not None:
            try:
                return self._zip.read(key)
            except (OSError, ValueError) as error:
                raise ValueError(_unreadable(self.path, error)) from error
        tensor = self._load_old().get(key)
        if tensor is None or tuple(tensor.shape) != self.shapes[key]:
            raise ValueError(_unreadable(self.path, CHANGED))
        return tensor.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of what was loaded; the next read loads it again."""
        self._old = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was loaded, which another process loads for itself."""
        return {**self.__dict__, "_old": None}


def _stamp(path: Path) -> Stamp:
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error
    try:
        return stamp(descriptor)
    finally:
        os.close(descriptor)


def _is_zip(path: Path) -> bool:
    try:
        return read_start(path, limit=2) == b"PK"
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error


_HOLDS_CODE = (
    "has a {} with pickled objects other than tensors, which could run code; it was not loaded. Convert it to safetensors "
    "where you trust it, or leave it out"
)


def _open_zip(path: Path) -> TorchZip:
    try:
        return TorchZip(path)
    except CodeError as error:
        raise ValueError(_HOLDS_CODE.format(path.name)) from error
    except NotPlainError as error:
        raise ValueError(f"has a {path.name} {'that ' if str(error).startswith('is ') else ''}{error}") from error
    except Exception as error:  # Damaged and hostile archives make zipfile and pickletools raise nearly anything.
        raise ValueError(_unreadable(path, error)) from error


def _load_old(path: Path) -> dict[str, Tensor]:
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise ValueError(
            f"has its weights in {path.name}, in the format before torch 1.6, which torch {torch.__version__} cannot read "
            "without the risk of running code from it (CVE-2025-32434); install torch >= 2.6, or convert the adapter to "
            "safetensors"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged and hostile files make the unpickler raise nearly anything.
        # The unpickler names what it refused to import; it says other things about a file that is not a pickle at all.
        if "global" in str(error).lower():
            raise ValueError(_HOLDS_CODE.format(path.name)) from error
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in loaded.items()
    ):
        raise ValueError(f"has a {path.name} that is not a plain state dict of tensors; save it with save_pretrained")
    for key, tensor in loaded.items():
        if not _is_backed(tensor):
            raise ValueError(f"has a {path.name} whose {key!r} is not a dense tensor with data of its own")
    return {key: tensor.detach() for key, tensor in loaded.items()}


def _is_backed(tensor: Tensor) -> bool:
    # An expanded tensor of one number can claim any shape; copying it would fill the memory.
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return math.prod(tensor.shape) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _unreadable(path: Path, error: Exception | str) -> str:
    try:
        is_pointer = read_start(path, limit=40).startswith(b"version https://git-lfs")
    except OSError:
        is_pointer = False
    if is_pointer:
        return f"has a {path.name} that is only a Git LFS pointer; fetch the file itself, with git lfs pull"
    if str(error) == CHANGED:
        return f"has a {path.name} that was replaced or changed since its header was read; open the adapters again"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"has a {path.name} that is truncated or damaged ({reason}); download it again, or leave it out"
