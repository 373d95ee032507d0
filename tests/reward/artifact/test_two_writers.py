"""Two writers of one table of users lose nothing of each other's work."""

import os

import torch

from eigenpeft import LowRankRewardModel
from eigenpeft.artifacts.manifest import not_ours


def saved(folder, users=("ada", "bob")):
    model = LowRankRewardModel(torch.eye(3, 4))
    for user in users:
        put(model, user, 0)
    model.save_pretrained(folder)
    return model


def put(model, user, row):
    weights = torch.zeros(1, 3)
    weights[0, row] = 1.0
    model.users.put([user], user_weights=weights, n_pairs=[5])


def on_disk(folder):
    return LowRankRewardModel.from_pretrained(folder)


def test_users_of_both_writers_are_there(tmp_path):
    saved(tmp_path / "rw")
    first, second = on_disk(tmp_path / "rw"), on_disk(tmp_path / "rw")
    put(first, "carl", 1)
    put(second, "dora", 2)
    put(second, "bob", 1)
    first.users.remove("ada")
    first.save_users(tmp_path / "rw")
    second.save_users(tmp_path / "rw")
    assert list(on_disk(tmp_path / "rw").users) == ["bob", "carl", "dora"]
    assert list(second.users) == ["bob", "carl", "dora"]
    assert on_disk(tmp_path / "rw").users.user_weights(["bob"]).argmax() == 1
    assert not_ours(tmp_path / "rw") == []


def test_a_model_in_memory_does_not_bring_back_who_was_deleted(tmp_path):
    model = saved(tmp_path / "rw")
    other = on_disk(tmp_path / "rw")
    other.users.remove("ada")
    other.save_users(tmp_path / "rw")
    put(model, "carl", 1)
    model.save_users(tmp_path / "rw")
    assert list(on_disk(tmp_path / "rw").users) == ["bob", "carl"]


def test_a_copy_brings_all_its_users(tmp_path):
    saved(tmp_path / "rw")
    saved(tmp_path / "copy", users=("eve",))
    on_disk(tmp_path / "rw").save_users(tmp_path / "copy")
    assert list(on_disk(tmp_path / "copy").users) == ["ada", "bob", "eve"]


def test_many_processes_at_once(tmp_path):
    saved(tmp_path / "rw")
    children = []
    for i in range(5):
        child = os.fork()
        if child == 0:
            try:
                model = on_disk(tmp_path / "rw")
                put(model, f"new-{i}", i % 3)
                model.save_users(tmp_path / "rw")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 5
    assert list(on_disk(tmp_path / "rw").users) == ["ada", "bob", *(f"new-{i}" for i in range(5))]
    assert [path.name for path in tmp_path.iterdir()] == ["rw"]
