"""A `.bin` file of torch.save, in the zip format: its index read without unpickling, single tensors read from their places."""

import math
import os
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops
from typing import Any

import torch
from torch import Tensor

from eigenpeft.artifacts.reading import CHANGED, Stamp, open_regular, read_at, stamp

# The index of 100,000 tensors has about 20 MB.
MAX_INDEX_BYTES = 64 * 2**20
_MAX_MEMBERS = 1_000_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of its name and its extra field
# Every dtype whose numbers torch.save writes as they lie in memory.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16")
    + ("int8", "uint8", "bool")
}
_REBUILDS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_parameter_with_state")


@dataclass(frozen=True)
class Global:
    """A name that the index would import, if anybody unpickled it.

    Attributes:
        module: Module to import from, such as "torch._utils".
        name: What to import from it.
    """

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors, a member of the zip.

    Attributes:
        key: Its name below `data/`.
        dtype: Data type of its numbers.
        n_numbers: How many it has.
    """

    key: str
    dtype: torch.dtype
    n_numbers: int


@dataclass(frozen=True)
class TensorPlace:
    """Where the numbers of a tensor lie.

    Attributes:
        storage: What holds them.
        offset: Number of the first one.
        shape: Its shape.
        strides: Numbers from one entry to the next, on each axis.
        dtype: Its dtype.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class NotPlainError(ValueError):
    """The index holds something that is not a dense tensor with numbers of its own; the message says what."""


class CodeError(ValueError):
    """The index would import something that could run code."""


class TorchZip:
    """A file of torch.save whose tensors are read one by one; nothing is unpickled, inflated or mapped.

    Args:
        path: The file.

    Attributes:
        path: The file.
        places: Where each tensor lies, by key.

    Raises:
        CodeError: If the index holds objects other than tensors.
        NotPlainError: If it is not a dictionary of dense tensors.
        ValueError: If the file is damaged.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        descriptor = open_regular(path)
        try:
            self._stamp: Stamp = stamp(descriptor)
            with open(descriptor, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
                members = _stored_members(archive, self._stamp.size)
            index = next((name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
            if index is None:
                raise ValueError("its zip archive has no data.pkl")
            prefix = index.removesuffix("data.pkl")
            if (order := members.get(f"{prefix}byteorder")) and b"big" in _member(
                descriptor, order, 0, order.file_size
            ):
                raise ValueError("its numbers are of the other byte order")
            if members[index].file_size > MAX_INDEX_BYTES:
                raise ValueError(f"its data.pkl has more than the {MAX_INDEX_BYTES} bytes that are read")
            content = read_index(bytes(_member(descriptor, members[index], 0, members[index].file_size)))
            self.places = _checked_places(content)
            self._starts = {
                key: _data_start(descriptor, members[f"{prefix}data/{key}"])
                for key in {place.storage.key for place in self.places.values()}
                if f"{prefix}data/{key}" in members
            }
            for key, place in self.places.items():
                size = place.storage.n_numbers * place.storage.dtype.itemsize
                member = members.get(f"{prefix}data/{place.storage.key}")
                if member is None or member.file_size < size:
                    raise ValueError(f"the numbers of {key!r} are missing")
        finally:
            os.close(descriptor)

    @property
    def stamp(self) -> Stamp:
        """The state of the file when its index was read."""
        return self._stamp

    def read(self, key: str) -> Tensor:
        """A copy of one tensor in its stored dtype.

        Args:
            key: Its key.

        Raises:
            ValueError: If the file is not the one whose index was read.
            OSError: If it cannot be read.
        """
        place = self.places[key]
        if 0 in place.shape:
            return torch.empty(place.shape, dtype=place.dtype)
        size = place.dtype.itemsize
        n_spanned = 1 + sum((length - 1) * stride for length, stride in zip(place.shape, place.strides, strict=True))
        descriptor = open_regular(self.path)
        try:
            if stamp(descriptor) != self._stamp:
                raise ValueError(CHANGED)
            data = read_at(descriptor, self._starts[place.storage.key] + place.offset * size, n_spanned * size)
        finally:
            os.close(descriptor)
        if len(data) != n_spanned * size:
            raise ValueError(f"{key!r} ends after {len(data)} of {n_spanned * size} bytes")
        numbers = torch.frombuffer(data, dtype=place.dtype)
        return numbers.as_strided(place.shape, place.strides).clone(memory_format=torch.contiguous_format)


def _stored_members(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Members by name, none of them compressed: torch never does, and four megabytes can inflate to gigabytes."""
    members = archive.infolist()
    if len(members) > _MAX_MEMBERS:
        raise ValueError(f"its zip archive has {len(members)} members, more than the {_MAX_MEMBERS} that are read")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(
                f"its member {member.filename[:100]!r} is compressed or encrypted, as torch.save never does"
            )
        if member.header_offset + member.file_size > file_size:
            raise ValueError(f"its member {member.filename[:100]!r} lies outside of the file")
    return {member.filename: member for member in members}


def _data_start(descriptor: int, member: zipfile.ZipInfo) -> int:
    header = read_at(descriptor, member.header_offset, _LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        raise ValueError("a member of its zip archive is cut short")
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise ValueError("a member of its zip archive is not where it should be")
    return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _member(descriptor: int, member: zipfile.ZipInfo, start: int, size: int) -> bytearray:
    data = read_at(descriptor, _data_start(descriptor, member) + start, size)
    if len(data) != size:
        raise ValueError(f"its member {member.filename[:100]!r} is cut short")
    return data


def _checked_places(content: Any) -> dict[str, TensorPlace]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise NotPlainError("is not a plain state dict of tensors; save it with save_pretrained")
    for key, place in content.items():
        if isinstance(place, Global | _Object):
            raise NotPlainError(f"whose {key!r} is not a dense tensor with data of its own")
        if not isinstance(place, TensorPlace):
            raise NotPlainError("is not a plain state dict of tensors; save it with save_pretrained")
        n_numbers = place.storage.n_numbers
        if place.storage.dtype != place.dtype:
            n_numbers = n_numbers * place.storage.dtype.itemsize // place.dtype.itemsize
        last = place.offset + sum(
            (length - 1) * stride for length, stride in zip(place.shape, place.strides, strict=True)
        )
        # A tensor of one number that is repeated can claim any shape; copying it would fill the memory.
        if 0 not in place.shape and (last >= n_numbers or math.prod(place.shape) > n_numbers):
            raise NotPlainError(f"whose {key!r} is not a dense tensor with data of its own")
    return content


class _Object:
    """What a call in the index would have made that is not a dense tensor."""


class _Mark:
    """The start of a sequence on the stack."""


def read_index(data: bytes) -> Any:
    """What a pickle of tensors says, by following its instructions without importing or calling anything.

    Args:
        data: The pickle, as torch.save writes it.

    Returns:
        Its value, with a `TensorPlace` for each tensor.

    Raises:
        CodeError: If it calls anything but what rebuilds a tensor.
        ValueError: If it is not such a pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        argument: Any
        for opcode, argument, _ in genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            if opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif opcode.name in _CONSTANTS:
                stack.append(_CONSTANTS[opcode.name](argument))
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](stack)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise CodeError(f"global {opcode.name}")
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its data.pkl is damaged ({type(error).__name__})") from error
    raise ValueError("its data.pkl has no end")


def _global(argument: str) -> Global:
    module, _, name = argument.partition(" ")
    return Global(module, name)


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "GLOBAL": _global,
    "MARK": lambda _: _Mark(),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
} | dict.fromkeys(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    lambda argument: argument,
)


def _from_mark(stack: list[Any]) -> list[Any]:
    place = max(i for i, value in enumerate(stack) if isinstance(value, _Mark))
    values = stack[place + 1 :]
    del stack[place:]
    return values


def _set_items(stack: list[Any], values: list[Any]) -> None:
    target = stack[-1]
    if not isinstance(target, dict):
        raise TypeError("items are set on something that is not a dictionary")
    target.update(zip(values[::2], values[1::2], strict=True))


def _append(stack: list[Any], values: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise TypeError("entries are appended to something that is not a list")
    stack[-1].extend(values)


def _take(stack: list[Any], count: int) -> list[Any]:
    values = [stack.pop() for _ in range(count)]
    return values[::-1]


def _storage(stack: list[Any]) -> None:
    kind, type_, key, _, n_numbers = stack.pop()
    if kind != "storage" or not isinstance(key, str) or type(n_numbers) is not int or n_numbers < 0:
        raise TypeError("an entry is not the storage of a tensor")
    if type_.module not in ("torch", "torch.storage") or type_.name not in _STORAGES:
        stack.append(_Object())
        return
    stack.append(Storage(key, _STORAGES[type_.name], n_numbers))


def _call(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    if function == Global("collections", "OrderedDict") and not arguments:
        stack.append({})
    elif function == Global("torch", "Size"):
        stack.append(tuple(arguments[0]))
    elif isinstance(function, Global) and function.module == "torch._utils" and function.name in _REBUILDS:
        stack.append(_rebuilt(function.name, arguments))
    elif isinstance(function, Global) and function.module.partition(".")[0] == "torch":
        stack.append(_Object())  # sparse, quantised, meta: what torch makes of no numbers or of others
    else:
        raise CodeError(f"global {getattr(function, 'module', '')}.{getattr(function, 'name', '')}")


def _rebuilt(name: str, arguments: Any) -> Any:
    if name.startswith("_rebuild_parameter"):
        return arguments[0]
    storage, offset, shape, strides = arguments[:4]
    dtype = storage.dtype if isinstance(storage, Storage) else None
    if name == "_rebuild_tensor_v3":
        named = arguments[6]
        dtype = _DTYPES.get(named.name) if isinstance(named, Global) and named.module == "torch" else None
    sizes = (offset, *shape, *strides)
    if dtype is None or not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        return _Object()
    return TensorPlace(storage, offset, tuple(shape), tuple(strides), dtype)


def _build(stack: list[Any]) -> None:
    stack.pop()  # attributes of a state dict, such as its _metadata


_STEPS: dict[str, Callable[[list[Any]], None]] = {
    "TUPLE": lambda stack: stack.append(tuple(_from_mark(stack))),
    "TUPLE1": lambda stack: stack.append(tuple(_take(stack, 1))),
    "TUPLE2": lambda stack: stack.append(tuple(_take(stack, 2))),
    "TUPLE3": lambda stack: stack.append(tuple(_take(stack, 3))),
    "SETITEM": lambda stack: _set_items(stack, _take(stack, 2)),
    "SETITEMS": lambda stack: _set_items(stack, _from_mark(stack)),
    "APPEND": lambda stack: _append(stack, _take(stack, 1)),
    "APPENDS": lambda stack: _append(stack, _from_mark(stack)),
    "BINPERSID": _storage,
    "REDUCE": _call,
    "BUILD": _build,
}
