"""One weights file of an adapter: tensor shapes from its header, single tensors on request, and no code from a pickle."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# weights_only could be escaped before torch 2.6 (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


class WeightsFile(Protocol):
    """A weights file whose header has been read.

    Attributes:
        path: The file.
        shapes: Shape of every tensor.
        not_float: Keys of tensors that do not hold floating-point numbers.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    not_float: frozenset[str]

    def read(self, key: str) -> Tensor:
        """A copy of one tensor in its stored dtype, on the CPU.

        Args:
            key: Its key in the file.

        Raises:
            ValueError: If it cannot be read any more.
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
        if (folder / name).is_file():
            return kind(folder / name)
    raise ValueError(f"has neither {SAFETENSORS_NAME} nor {BIN_NAME}; download it again, or leave it out")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Args:
        path: The file.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class SafetensorsFile:
    """A `.safetensors` file; see `WeightsFile`.

    The header is read and checked once, by safetensors; tensors are then read from their places in the file, which is open
    only meanwhile. A mapping kept open would count every page ever read as memory of the process, and opening it again
    for each tensor would parse the header again each time (0.6 ms for a 7B model's adapter).

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[str, int, int]] = {}
        try:
            with safe_open(path, framework="pt", device="cpu") as checked, path.open("rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_size))
                for key in checked.keys():  # noqa: SIM118 (safe_open is no mapping)
                    entry = header[key]
                    start, stop = entry["data_offsets"]
                    self.shapes[key] = tuple(entry["shape"])
                    self._places[key] = entry["dtype"], 8 + header_size + start, stop - start
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(_unreadable(path, error)) from error
        self.not_float = frozenset(key for key, (dtype, _, _) in self._places.items() if dtype not in _FLOATS)

    def read(self, key: str) -> Tensor:
        """A copy of one tensor in its stored dtype.

        Args:
            key: Its key in the file.

        Raises:
            ValueError: If it cannot be read any more.
        """
        dtype, start, size = self._places[key]
        data = bytearray(size)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                n_read = file.readinto(data)
        except OSError as error:
            raise ValueError(_unreadable(self.path, error)) from error
        if n_read != size:
            raise ValueError(_unreadable(self.path, f"{key!r} ends after {n_read} of {size} bytes"))
        if not size:
            return torch.empty(self.shapes[key], dtype=_FLOATS[dtype])
        return torch.frombuffer(data, dtype=_FLOATS[dtype]).view(self.shapes[key])

    def close(self) -> None:
        """Nothing is open between two reads."""


class BinFile:
    """A file written by `torch.save`, memory-mapped if it is of the zip format (torch >= 1.6); see `WeightsFile`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tensors: dict[str, Tensor] | None = None
        tensors = self._open()
        self.shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        self.not_float = frozenset(key for key, tensor in tensors.items() if not tensor.is_floating_point())

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is None:
            self._tensors = _load_bin(self.path)
        return self._tensors

    def read(self, key: str) -> Tensor:
        """A copy of one tensor in its stored dtype.

        Args:
            key: Its key in the file.

        Raises:
            ValueError: If it cannot be read any more.
        """
        tensor = self._open().get(key)
        if tensor is None:
            raise ValueError(_unreadable(self.path, f"{key!r} is gone"))
        return tensor.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        self._tensors = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the mapping, which another process makes for itself."""
        return {**self.__dict__, "_tensors": None}


def _load_bin(path: Path) -> dict[str, Tensor]:
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise ValueError(
            f"has its weights in {path.name}, which torch {torch.__version__} cannot read without the risk of running "
            "code from it (CVE-2025-32434); install torch >= 2.6, or convert the adapter to safetensors"
        )
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # Damaged and hostile files make the unpickler raise nearly anything.
        # The unpickler names what it refused to import; it says other things about a file that is no pickle at all.
        if "global" in str(error).lower():
            raise ValueError(
                f"has a {path.name} with pickled objects other than tensors, which could run code; it was not loaded. "
                "Convert it to safetensors where you trust it, or leave it out"
            ) from error
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in loaded.items()
    ):
        raise ValueError(f"has a {path.name} that is no plain state dict of tensors; save it with save_pretrained")
    for key, tensor in loaded.items():
        if not _is_backed(tensor):
            raise ValueError(f"has a {path.name} whose {key!r} is no dense tensor with data of its own")
    return dict(loaded)


def _is_backed(tensor: Tensor) -> bool:
    # An expanded tensor of one number can claim any shape; copying it would fill the memory.
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return math.prod(tensor.shape) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _unreadable(path: Path, error: Exception | str) -> str:
    try:
        with path.open("rb") as file:
            is_pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        is_pointer = False
    if is_pointer:
        return f"has a {path.name} that is only a Git LFS pointer; fetch the file itself, with git lfs pull"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"has a {path.name} that is truncated or damaged ({reason}); download it again, or leave it out"
