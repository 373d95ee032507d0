"""Safetensors files without a mapping: as safetensors reads them, and every fault of the header or the file by name."""

import copy
import json
import os
import pickle
import random

import pytest
import safetensors
import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eigenpeft.artifacts import tensor_file
from eigenpeft.artifacts.tensor_file import DTYPES, TensorFile
from eigenpeft.errors import ArtifactError, DamagedFileError


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape=(2,), first=0, last=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.safetensors"
    save_file({"rows": torch.arange(40.0).reshape(10, 4), "one": torch.tensor(3.0), "none": torch.zeros(0, 4)}, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reads_what_safetensors_reads(tmp_path, dtype):
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "b": torch.ones((), dtype=dtype),
        "c": torch.zeros(0, 2).to(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with (
        TensorFile(tmp_path / "x.safetensors") as ours,
        safe_open(tmp_path / "x.safetensors", framework="pt") as theirs,
    ):
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for key, tensor in tensors.items():
            read = ours.get_tensor(key)
            assert read.dtype == dtype
            assert torch.equal(
                read.view(torch.uint8) if read.ndim else read, tensor.view(torch.uint8) if read.ndim else tensor
            )
            assert tuple(theirs.get_slice(key).get_shape()) == ours.shapes[key]


@pytest.mark.parametrize(
    "rows_asked", [slice(None), slice(2, 5), slice(0, 0), slice(7, 99), slice(5, 2), slice(-3, None)]
)
def test_slices_are_rows(rows, rows_asked):
    with TensorFile(rows) as file:
        expected = torch.arange(40.0).reshape(10, 4)[rows_asked]
        assert torch.equal(file.get_slice("rows")[rows_asked], expected)
        assert (file.get_slice("rows").get_shape(), file.get_slice("rows").get_dtype()) == ([10, 4], "F32")
        with pytest.raises(DamagedFileError, match="'one' is one number and has no rows"):
            file.get_slice("one")[:1]
        with pytest.raises(DamagedFileError, match="has no tensor 'two'"):
            file.get_slice("two")


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"{", b"", "Expecting property name"),
        (b"[]", b"", "not a table of tensors"),
        (b"[" * 100_000, b"", "nested too deep"),
        ({"a": entry()}, b"1234567", "lies outside of the file"),
        ({"a": entry()}, b"123456789", "its tensors have 8 bytes, and it holds 9"),
        ({"a": entry(shape=(3,))}, b"12345678", r"has shape \(3,\) but 8 bytes"),
        ({"a": entry(shape=(2**40, 2**40))}, b"12345678", "but 8 bytes"),
        ({"a": entry(shape=(-2,))}, b"12345678", "entry of 'a' is not a dtype, a shape and two offsets"),
        ({"a": entry(shape=(2.0,))}, b"12345678", "entry of 'a' is not a dtype, a shape and two offsets"),
        ({"a": entry(shape=[True, 2])}, b"12345678", "entry of 'a' is not a dtype, a shape and two offsets"),
        ({"a": entry(shape=[1] * 99)}, b"1234", "entry of 'a' is not a dtype, a shape and two offsets"),
        ({"a": entry(first=8, last=0)}, b"12345678", "lies outside of the file"),
        ({"a": {"dtype": "F32"}}, b"", "entry of 'a' is not a dtype, a shape and two offsets"),
        ({"a": 5}, b"", "entry of 'a' is not a dtype, a shape and two offsets"),
        ({"a": entry(), "b": entry()}, b"12345678", "overlap, or leave a gap"),
        ({"a": entry(), "b": entry(first=12, last=20)}, b"1" * 20, "overlap, or leave a gap"),
        (b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), b"12345678", "names a tensor twice"),
        (b'{"\\ud800": %b}' % json.dumps(entry()).encode(), b"12345678", "half of a surrogate pair"),
        (b'{"a": 1%b}' % (b"0" * 5_000), b"", "integer string conversion"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, data, reason):
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ArtifactError, match=reason):
        TensorFile(path)


def test_a_dtype_of_a_newer_safetensors_stops_only_who_reads_it(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": entry(), "b": entry(first=8, last=9, dtype="F5")}, b"1" * 9)
    file = TensorFile(path)
    assert file.get_tensor("a").shape == (2,)
    with pytest.raises(DamagedFileError, match="'b' has the dtype F5, which cannot be read"):
        file.get_tensor("b")


def test_a_header_longer_than_the_file_or_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(DamagedFileError, match="its header ends after 10 bytes"):
        TensorFile(path)
    monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", 10)
    with pytest.raises(DamagedFileError, match="more than the 10 that are read"):
        TensorFile(write(path, {"a": entry()}, b"12345678"))


@pytest.mark.skipif(Version(safetensors.__version__) < Version("0.8"), reason="safetensors before 0.8 refuses more")
def test_what_safetensors_refuses_is_refused_here(rows):
    content, rng, n_refused = rows.read_bytes(), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(content)
        changed[rng.randrange(240)] = rng.randrange(256)  # in the header
        rows.write_bytes(changed)
        try:
            with safe_open(rows, framework="pt"):
                continue
        except SafetensorError as error:
            if "unknown variant" in str(error):  # a dtype that it does not know; here only reading it is refused
                continue
            n_refused += 1
        with pytest.raises(DamagedFileError):
            TensorFile(rows)
    assert n_refused > 50


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(DamagedFileError, match="not a regular file but a folder, a pipe or a device"):
        TensorFile(path)


def test_an_open_file_is_read_on_after_another_took_its_place(rows):
    file = TensorFile(rows)
    save_file({"rows": torch.zeros(10, 4)}, rows.with_name("new"))
    rows.with_name("new").replace(rows)
    assert file.get_tensor("rows")[1, 1] == 5
    file.close()
    with pytest.raises(DamagedFileError, match="replaced or changed"):
        file.get_tensor("rows")


def test_a_file_cut_in_place_is_an_error_and_no_signal(rows):
    file = TensorFile(rows)
    os.truncate(rows, 100)
    with pytest.raises(DamagedFileError, match="replaced or changed"):
        file.get_tensor("rows")
    os.truncate(rows, 0)
    with pytest.raises(DamagedFileError, match="replaced or changed"):
        file.get_slice("rows")[:2]


def test_copies_open_the_file_for_themselves(rows):
    file = TensorFile(rows)
    for other in (pickle.loads(pickle.dumps(file)), copy.deepcopy(file)):  # noqa: S301 (our own bytes)
        assert torch.equal(other.get_tensor("rows"), file.get_tensor("rows"))
        other.close()
    assert torch.equal(file.get_tensor("rows")[2], torch.tensor([8.0, 9, 10, 11]))
    error = pickle.loads(pickle.dumps(DamagedFileError("x", "cut")))  # noqa: S301 (our own bytes)
    assert (str(error.path), error.reason) == ("x", "cut")
