"""Damaged tables of users are refused with one message; threads read while another adds."""

import copy
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenpeft.errors import ArtifactError, RewardModelError
from eigenpeft.reward import LoReFitter, UserTable
from eigenpeft.reward.artifact.users import encode


@pytest.fixture
def saved(tmp_path):
    table = UserTable(2)
    table.put(
        ["ada", "bob", "eve"], user_weights=torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]), n_pairs=[3, 1, 2]
    )
    table.save(tmp_path / "users.safetensors")
    return tmp_path / "users.safetensors"


def flipped(tensors):
    bits = tensors["weights"].view(torch.int32)
    bits[0, 0] ^= 1 << 3  # a change far too small to leave the simplex
    return tensors


DAMAGES = {
    "not a number": (lambda t: t | {"weights": t["weights"].fill_(float("nan"))}, "not shares that sum to one"),
    "negative": (lambda t: t | {"weights": t["weights"] * -1}, "not shares that sum to one"),
    "half precision": (lambda t: t | {"weights": t["weights"].half()}, "of uint8, float16, int32"),
    "an id twice": (
        lambda t: t | {"ids": t["ids"][:1].expand_as(t["ids"]).contiguous()},
        "not in order, or come twice",
    ),
    "out of order": (lambda t: t | {"ids": t["ids"].flip(0).contiguous()}, "not in order, or come twice"),
    "one axis": (lambda t: t | {"ids": t["ids"].flatten()}, r"holds ids \(9,\)"),
    "no width": (lambda t: t | {"ids": t["ids"][:, :0].contiguous()}, "has ids of 0 bytes"),
    "not UTF-8": (lambda t: t | {"ids": t["ids"].index_fill(0, torch.tensor([2]), 255)}, "not UTF-8"),
    "no pairs": (lambda t: {name: t[name] for name in ("ids", "weights")}, "n_pairs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_or_without_a_hash(saved, damage):
    change, message = DAMAGES[damage]
    save_file(change(load_file(saved)), saved)
    with pytest.raises(ArtifactError, match=message):
        UserTable.open(saved, n_basis=2)


def test_a_bit_that_keeps_the_simplex_is_found_by_the_hash(saved):
    header = saved.read_bytes()
    tensors = flipped(load_file(saved))
    save_file(tensors, saved)  # without a hash, as tables of earlier versions: nothing can tell
    assert len(UserTable.open(saved, n_basis=2)) == 3
    start = header.index(b"\x00\x00\x00\x3f")  # 0.5, little-endian
    saved.write_bytes(header[:start] + b"\x08" + header[start + 1 :])
    with pytest.raises(ArtifactError, match="does not have its hash"):
        UserTable.open(saved, n_basis=2)


def test_threads_read_while_another_adds():
    table, errors = UserTable(2), []

    def read():
        try:
            for _ in range(300):
                assert len(table) >= 0
                assert "nobody" not in table
                list(table)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    for i in range(300):
        table.put([f"user {i}"], user_weights=torch.tensor([[0.5, 0.5]]), n_pairs=[1])
    for thread in readers:
        thread.join()
    assert errors == []
    assert len(table) == 300
    assert len(copy.deepcopy(table)) == len(pickle.loads(pickle.dumps(table))) == 300


def test_an_id_that_utf8_cannot_hold_is_refused():
    with pytest.raises(RewardModelError, match="not text that UTF-8 can hold"):
        encode("\ud800")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"n_basis": "x"}, r"n_basis='x' must be a whole number"),
        ({"n_basis": 2.5}, r"n_basis=2\.5 must be a whole number"),
        ({"n_basis": [1, "two"]}, "must be a whole number"),
        ({"deviation_scale": "wide"}, "deviation_scale='wide' must be a positive number"),
        ({"held_out": "half"}, "held_out='half' must be a share"),
        ({"max_iter": 1.5}, r"max_iter=1\.5 must be a whole number"),
        ({"n_components": 0}, "n_components=0 must be None or"),
        ({"strength": float("nan")}, "strength=nan must be positive"),
    ],
)
def test_settings_of_another_kind_are_named(option, message):
    with pytest.raises(RewardModelError, match=message):
        LoReFitter(**option).fit(torch.ones(4, 2), torch.zeros(4, 2), user_ids=["a", "a", "b", "b"])
