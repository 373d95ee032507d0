"""Weights files: lazy, both formats, and what damaged or hostile ones say."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenpeft.collection.formats import weights
from eigenpeft.collection.formats.weights import file_sha256, open_weights
from tests.factories import random_factors, write_adapter

KEY = "base_model.model.layer.0.query.lora_A.weight"


@pytest.fixture(params=["safetensors", "bin"])
def folder(request, tmp_path):
    return write_adapter(tmp_path / "one", random_factors(), as_bin=request.param == "bin")


def test_shapes_and_tensors(folder):
    opened = open_weights(folder)
    assert opened.shapes[KEY] == (4, 20)
    assert len(opened.shapes) == 8
    assert opened.not_float == frozenset()
    torch.testing.assert_close(opened.read(KEY), random_factors()["layer.0.query"][1], rtol=0, atol=0)


def test_what_is_read_is_a_copy(folder):
    opened = open_weights(folder)
    opened.read(KEY).fill_(0)
    assert opened.read(KEY).abs().sum() > 0


def test_reads_again_after_close_and_in_another_process(folder):
    opened = open_weights(folder)
    opened.close()
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301 (our own bytes)
    torch.testing.assert_close(copy.read(KEY), opened.read(KEY))


def test_a_file_that_vanished_is_an_error_with_its_name(folder):
    opened = open_weights(folder)
    opened.close()
    opened.path.unlink()
    with pytest.raises(ValueError, match=rf"{opened.path.name} that is truncated or damaged"):
        opened.read(KEY)


@pytest.mark.parametrize("change", ["cut", "extended", "written over", "replaced"])
def test_a_file_that_changed_after_its_header_was_read_is_an_error_and_no_number(folder, change):
    opened = open_weights(folder)
    path, content = opened.path, opened.path.read_bytes()
    if change == "replaced":
        path.with_name("new").write_bytes(content)
        path.with_name("new").replace(path)
    else:
        os.utime(path, ns=(0, 0))
        path.write_bytes({"cut": content[:-4], "extended": content + b"1234", "written over": content[::-1]}[change])
    for key in opened.shapes:
        with pytest.raises(
            ValueError, match="was replaced or changed since its header was read; open the adapters again"
        ):
            opened.read(key)
    with pytest.raises(ValueError, match="was replaced or changed since its header was read"):
        file_sha256(path, expected=opened.stamp)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path, dtype):
    stored = {
        "a": torch.randn(3, 5).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
        "a.b/c": torch.randn(2, 1, 4).to(dtype),
    }
    save_file(stored, tmp_path / "adapter_model.safetensors")
    opened = open_weights(tmp_path)
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        read = opened.read(key)
        assert read.dtype == dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.float(), tensor.float())


def test_nothing_stays_open_between_two_reads(tmp_path):
    fds = Path("/proc/self/fd")
    if not fds.exists():
        pytest.skip("counts open files in /proc")
    opened = open_weights(write_adapter(tmp_path, random_factors()))
    opened.read(KEY)
    assert str(opened.path.resolve()) not in Path("/proc/self/maps").read_text()
    assert not [fd for fd in fds.iterdir() if fd.exists() and fd.resolve() == opened.path.resolve()]


def test_safetensors_is_preferred(tmp_path):
    write_adapter(tmp_path, random_factors(), as_bin=True)
    write_adapter(tmp_path, random_factors(seed=1))
    assert open_weights(tmp_path).path.name == "adapter_model.safetensors"


@pytest.mark.parametrize("kept", [0, 7, 300, 0.6, 0.99])
def test_truncated_files(folder, kept):
    path = next(folder.glob("adapter_model.*"))
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{path.name} that is truncated or damaged \(.+\); download it again"):
        open_weights(folder)


def test_git_lfs_pointer(folder):
    path = next(folder.glob("adapter_model.*"))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="only a Git LFS pointer"):
        open_weights(folder)


def test_an_error_page_saved_as_weights(folder):
    path = next(folder.glob("adapter_model.*"))
    path.write_bytes(b"<!doctype html><html><body>404 Not Found</body></html>" * 20)
    with pytest.raises(ValueError, match=rf"{path.name} that is truncated or damaged"):
        open_weights(folder)


def test_no_weights(tmp_path):
    with pytest.raises(ValueError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        open_weights(tmp_path)


def test_integers_are_told(tmp_path):
    save_file({KEY: torch.ones(4, 20, dtype=torch.int8)}, tmp_path / "adapter_model.safetensors")
    assert open_weights(tmp_path).not_float == {KEY}


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, as_zip):
    victim = tmp_path / "victim"
    torch.save({KEY: Touch(victim)}, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError, match="pickled objects other than tensors, which could run code"):
        open_weights(tmp_path)
    assert not victim.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({KEY: Touch(victim)}, protocol=2))
    with pytest.raises(ValueError, match="pickled objects other than tensors"):
        open_weights(tmp_path)
    assert not victim.exists()


def test_old_torch_does_not_open_bin_files(tmp_path, monkeypatch):
    # Of the zip format nothing is unpickled by anybody; only older files need torch's own reader.
    torch.save({KEY: torch.ones(2)}, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(ValueError, match="CVE-2025-32434"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {KEY: 1.0}, {1: torch.ones(2)}, {"state_dict": {KEY: torch.ones(2)}}]
)
def test_bin_files_that_are_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="not a plain state dict of tensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "tensor", [torch.ones(1, 1).expand(100_000, 100_000), torch.eye(3).to_sparse(), torch.empty(3, 3, device="meta")]
)
def test_tensors_without_data_of_their_own(tmp_path, tensor):
    torch.save({KEY: tensor}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"not a dense tensor with data of its own"):
        open_weights(tmp_path)


def test_bin_of_torch_before_1_6(tmp_path):
    expected = torch.arange(6.0).reshape(2, 3)
    torch.save({KEY: expected}, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(open_weights(tmp_path).read(KEY), expected)


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    write_adapter(tmp_path, random_factors())
    monkeypatch.setattr(weights.SafetensorsFile, "read", lambda *_: pytest.fail("a tensor was read"))
    open_weights(tmp_path)


def test_a_zip_whose_numbers_are_not_where_it_says_is_refused(tmp_path):
    torch.save({KEY: torch.ones(2)}, tmp_path / "adapter_model.bin")
    content = bytearray((tmp_path / "adapter_model.bin").read_bytes())
    name = content.index(b"/data/0")
    start = content.rindex(b"PK\x03\x04", 0, name)
    content[start : start + 4] = b"none"
    (tmp_path / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="a member of its zip archive is not where it should be"):
        open_weights(tmp_path)
