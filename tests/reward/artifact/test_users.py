"""The table of users: found by id, changed in memory, merged on saving, mapped on opening."""

import pytest
import torch

from eigenpeft.errors import ArtifactError, RewardModelError, UnknownUserError
from eigenpeft.reward import UserTable


def weights(n, seed=0):
    return torch.softmax(torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)), dim=1)


def saved(table, tmp_path):
    table.save(tmp_path / "users.safetensors")
    return UserTable.open(tmp_path / "users.safetensors", n_basis=3)


@pytest.fixture
def ids():
    return ["bob", "ada", "Zoë", 7, "a much longer identifier than the others have", "b"]


def test_rows_come_back_in_the_order_asked(ids, tmp_path):
    table = UserTable(3)
    table.put(ids, user_weights=weights(6), n_pairs=range(6))
    for now in (table, saved(table, tmp_path)):
        assert len(now) == 6
        assert torch.equal(now.user_weights(ids), weights(6))
        assert torch.equal(now.user_weights(["7", "ada", "ada"]), weights(6)[[3, 1, 1]])
        assert [now.n_pairs(user) for user in ids] == list(range(6))
        assert "ada" in now
        assert "ad" not in now
        assert "x" * 200 not in now
        assert None not in now
        assert list(now) == sorted(map(str, ids), key=str.encode)


def test_changes_over_a_mapped_table(ids, tmp_path):
    table = UserTable(3)
    table.put(ids, user_weights=weights(6), n_pairs=range(6))
    table = saved(table, tmp_path)
    table.put(
        ["ada", "new and longer than any other identifier so far, by far"],
        user_weights=weights(2, seed=1),
        n_pairs=[20, 21],
    )
    table.remove("bob")
    table.put(["gone"], user_weights=weights(1), n_pairs=[1])
    table.remove("gone")
    for now in (table, saved(table, tmp_path)):
        assert len(now) == len(list(now)) == 6
        assert "bob" not in now
        assert "gone" not in now
        assert torch.equal(now.user_weights(["ada"]), weights(2, seed=1)[:1])
        assert now.n_pairs("ada") == 20
        assert torch.equal(now.user_weights(["Zoë"]), weights(6)[2:3])
    assert b"bob" not in (tmp_path / "users.safetensors").read_bytes()


def test_an_empty_table(tmp_path):
    table = saved(UserTable(3), tmp_path)
    assert len(table) == 0
    assert list(table) == []
    assert table.user_weights([]).shape == (0, 3)
    assert table.user_weights(["x"], unknown=torch.tensor([0.2, 0.3, 0.5])).tolist() == [pytest.approx([0.2, 0.3, 0.5])]


def test_errors(ids, tmp_path):
    table = UserTable(3)
    table.put(ids, user_weights=weights(6), n_pairs=range(6))
    with pytest.raises(UnknownUserError, match=r"'eve' is not among the 6 users.*add_user"):
        table.user_weights(["ada", "eve"])
    with pytest.raises(UnknownUserError, match=r"'eve' is not among the 6 users of this reward model\. Add"):
        table.user_weights(["eve", "ada", "eve"])  # one user in two rows
    with pytest.raises(UnknownUserError, match=r"\(nor are 2 more of those asked for\)"):
        table.user_weights(["eve", "kim", "eve", "lou", "kim"])
    with pytest.raises(UnknownUserError, match="'eve' is not among"):
        table.remove("eve")
    with pytest.raises(RewardModelError, match="'7' is listed more than once"):
        table.put([7, "7"], user_weights=weights(2), n_pairs=[1, 1])
    with pytest.raises(RewardModelError, match=r"weights of shape \(2, 3\) must be \(1, 3\)"):
        table.put(["x"], user_weights=weights(2), n_pairs=[1])
    with pytest.raises(RewardModelError, match=r"user .x., \[1\.0, 1\.0, 1\.0\], must be non-negative and sum to one"):
        table.put(["x"], user_weights=torch.ones(1, 3), n_pairs=[1])
    for bad in ("", "x" * 256, "a\0b"):
        with pytest.raises(RewardModelError, match="bytes; ids have 1 to 255 bytes"):
            table.put([bad], user_weights=weights(1), n_pairs=[1])
    with pytest.raises(RewardModelError, match="is a float; pass text or a whole number"):
        table.put([1.5], user_weights=weights(1), n_pairs=[1])
    table.save(tmp_path / "users.safetensors")
    with pytest.raises(ArtifactError, match="expected one row of 2 float32 weights"):
        UserTable.open(tmp_path / "users.safetensors", n_basis=2)
    data = (tmp_path / "users.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="is not a whole table of users"):
        UserTable.open(tmp_path / "half.safetensors", n_basis=3)


def test_random_changes_agree_with_a_dictionary(tmp_path):
    generator = torch.Generator().manual_seed(0)
    table, plain = UserTable(3), {}
    for step in range(300):
        user = f"user-{int(torch.randint(40, (1,), generator=generator))}"
        if user in plain and step % 3 == 0:
            table.remove(user)
            del plain[user]
        else:
            plain[user] = weights(1, seed=step)[0]
            table.put([user], user_weights=plain[user][None], n_pairs=[step])
        if step % 50 == 49:
            table = saved(table, tmp_path)
    assert sorted(plain) == list(table)
    assert torch.equal(table.user_weights(list(plain)), torch.stack(list(plain.values())))
