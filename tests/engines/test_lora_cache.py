"""The bound of the cache, whole folders, many processes."""

import multiprocessing
import os
import time

import pytest

from eigenpeft.engines import LoraCache
from eigenpeft.errors import EigenPeftError

KEYS = [f"{i:040x}-r8" for i in range(40)]


def writer(size):
    def write(folder):
        (folder / "a").write_bytes(bytes(size // 2))
        (folder / "b").write_bytes(bytes(size - size // 2))

    return write


def add(cache, key, size=100):
    return cache.add(key, n_bytes=size, write=writer(size))


def test_the_least_recently_used_go_and_the_bound_holds(tmp_path):
    cache = LoraCache(tmp_path, max_bytes=350)
    for i in range(3):
        assert add(cache, KEYS[i]).is_dir()
        os.utime(cache.path(KEYS[i]), (i, i))
    assert cache.touch(KEYS[0])  # used: now the newest
    add(cache, KEYS[3])
    assert [cache.path(key).is_dir() for key in KEYS[:4]] == [True, False, True, True]
    add(cache, KEYS[4], size=350)
    assert cache.n_bytes == 350
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [KEYS[4]]
    assert not cache.touch(KEYS[0])


def test_what_is_there_is_not_written_again(tmp_path):
    cache = LoraCache(tmp_path, max_bytes=350)
    add(cache, KEYS[0])
    cache.add(KEYS[0], n_bytes=100, write=lambda folder: pytest.fail("written twice"))


def test_too_large_an_adapter_is_refused_and_removes_nothing(tmp_path):
    cache = LoraCache(tmp_path, max_bytes=350)
    add(cache, KEYS[0])
    with pytest.raises(
        EigenPeftError, match="of 351 bytes does not fit into the cache of 350 bytes .*EIGENPEFT_CACHE_GB"
    ):
        add(cache, KEYS[1], size=351)
    assert cache.touch(KEYS[0])
    with pytest.raises(EigenPeftError, match="max_bytes=0 must be a positive number"):
        LoraCache(tmp_path, max_bytes=0)


def test_other_files_in_the_folder_stay_and_what_a_killed_process_left_goes(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "thesis").mkdir()
    cache = LoraCache(tmp_path, max_bytes=150)
    left = tmp_path / f".coming.{KEYS[5]}"
    left.mkdir()
    (left / "half").write_bytes(bytes(10))
    for key in KEYS[:3]:
        add(cache, key)
    assert not left.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "thesis").is_dir()


def test_a_failed_write_leaves_the_others(tmp_path):
    cache = LoraCache(tmp_path, max_bytes=350)
    add(cache, KEYS[0])

    def fail(folder):
        (folder / "half").write_bytes(bytes(10))
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        cache.add(KEYS[1], n_bytes=100, write=fail)
    assert cache.touch(KEYS[0])
    assert not cache.touch(KEYS[1])
    assert list(tmp_path.glob(".coming*")) == []
    add(cache, KEYS[1])  # the lock is free again


def many(folder, seed, problems):
    cache = LoraCache(folder, max_bytes=450)
    for i in range(60):
        key = KEYS[(i * (2 * seed + 1) + seed) % len(KEYS)]
        add(cache, key)
        with cache.locked():
            if not cache.touch(key):  # another process may have removed it since: then there is nothing to read
                continue
            sizes = [(file.name, file.stat().st_size) for file in sorted(cache.path(key).iterdir())]
            if sizes != [("a", 50), ("b", 50)]:
                problems.put(f"half of {key}: {sizes}")
            if cache.n_bytes > 450:
                problems.put(f"{cache.n_bytes} bytes")


def test_four_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    problems = context.Queue()
    workers = [context.Process(target=many, args=(tmp_path, seed, problems)) for seed in range(4)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 100
    for worker in workers:
        worker.join(max(0, deadline - time.monotonic()))
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert problems.empty()
    assert LoraCache(tmp_path, max_bytes=450).n_bytes <= 450
